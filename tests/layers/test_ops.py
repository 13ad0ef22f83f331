"""Elementary operations against their definitions."""

from __future__ import annotations

import pytest
import torch

from muntin.layers import Product, Softmax, Sum
from muntin.layers.windows import HIDDEN


def test_product_is_the_matrix_product_of_the_last_two_axes() -> None:
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(Product()(a, b), torch.einsum("...ij,...jl->...il", a, b))


@pytest.mark.parametrize("dim", [-1, 1])
def test_softmax_is_the_share_of_the_exponentials(dim: int) -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(Softmax(dim)(logits), logits.exp() / logits.exp().sum(dim, keepdim=True))


def test_softmax_ignores_what_its_bias_hides() -> None:
    logits = torch.randn(3, 5)
    bias = torch.tensor([0, HIDDEN, 0, 0, HIDDEN])
    weights = Softmax(-1)(logits, bias)
    assert (weights[:, [1, 4]] == 0).all()
    torch.testing.assert_close(weights[:, [0, 2, 3]], torch.softmax(logits[:, [0, 2, 3]], -1))


def test_sum_adds_any_number_of_branches_and_leaves_the_stream_alone() -> None:
    stream, first, second = torch.randn(3, 2, 4)
    before = stream.clone()
    torch.testing.assert_close(Sum()(stream, first, second), before + first + second)
    assert torch.equal(Sum()(stream), before) and torch.equal(stream, before)


def test_the_softmax_tells_its_dimension() -> None:
    assert "dim=-1" in repr(Softmax(-1))
