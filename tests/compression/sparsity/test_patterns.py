from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from muntin.compression.sparsity.pattern import parse_pattern, taps_first, taps_last
from muntin.errors import MuntinError

PATTERNS = ["1:2", "2:4", "1:4", "4:8", "3:8", "8:16"]


def zeros_per_group(weight: Tensor, group: int) -> Tensor:
    return (taps_first(weight).unflatten(-1, (-1, group)) == 0).sum(-1)


@given(text=st.sampled_from(PATTERNS), kernel=st.sampled_from([(), (1, 1), (3, 2)]), seed=st.integers(0, 99))
def test_mask_is_held(text: str, kernel: tuple[int, ...], seed: int) -> None:
    weight = torch.randn(16, 32, *kernel, generator=torch.Generator().manual_seed(seed))
    pattern = parse_pattern(text)
    mask = taps_last(pattern.mask(taps_first(weight).square()), weight)
    sparse = weight.masked_fill(~mask, 0)
    assert pattern.held(weight) is None
    held = pattern.held(sparse)
    assert held is not None and torch.equal(held, mask)
    assert bool((zeros_per_group(sparse, pattern.group) == pattern.group - pattern.kept).all())


def test_largest_stay() -> None:
    saliency = torch.tensor([[[3.0, 1, 2, 4, 0, 0, 0, 9]]])
    assert parse_pattern("2:4").mask(saliency).tolist() == [[[True, False, False, True, True, False, False, True]]]


def test_groups_with_more_zeros() -> None:
    """Zeros beyond the pattern's may become values again, up to N."""
    weight = torch.tensor([[0.0, 0, 7, 0, 1, 2, 0, 0]])
    held = parse_pattern("2:4").held(weight)
    assert held is not None and held.tolist() == [[True, False, True, False, True, True, False, False]]


@pytest.mark.parametrize("text", ["2:4", "7:16"])
def test_text_is_read_again(text: str) -> None:
    assert parse_pattern(text).text == text


@pytest.mark.parametrize("text", ["3:4", "0:4", "2:32", "2:6", "half", 24, "2:4 ", "block:4x4"])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(MuntinError, match=r"give N:M, .* with M of 2, 4, 8, 16, and N from 1 to M/2"):
        parse_pattern(text)


def test_inputs_that_do_not_fit() -> None:
    assert parse_pattern("4:8").misfit(torch.zeros(6, 12, 3, 3)) == "12 inputs are no multiple of 8"
