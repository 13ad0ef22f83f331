"""Elementary operations against their definitions."""

from __future__ import annotations

import torch

from muntin.layers import Product, SoftmaxProduct, Sum
from muntin.layers.windows import hidden


def test_product_by_formula() -> None:
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(Product()(a, b), torch.einsum("...ij,...jl->...il", a, b))


def test_softmax_product_by_formula() -> None:
    logits, values = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    expected = torch.einsum("bij,bjl->bil", logits.exp() / logits.exp().sum(-1, keepdim=True), values)
    torch.testing.assert_close(SoftmaxProduct()(logits, values), expected)


def test_softmax_product_with_hidden_entries() -> None:
    logits, values = torch.randn(3, 5), torch.randn(5, 2)
    bias = torch.tensor([0, 1, 0, 0, 1]) * hidden(torch.float32)
    shown = [0, 2, 3]
    torch.testing.assert_close(SoftmaxProduct()(logits, values, bias), SoftmaxProduct()(logits[:, shown], values[shown]))


def test_sum_of_branches() -> None:
    stream, first, second = torch.randn(3, 2, 4)
    before = stream.clone()
    torch.testing.assert_close(Sum()(stream, first, second), before + first + second)
    assert torch.equal(Sum()(stream), before) and torch.equal(stream, before)
