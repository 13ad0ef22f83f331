from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from muntin.compression.sparsity.patterns import Pattern, parse_pattern, taps_first, taps_last
from muntin.errors import MuntinError

PATTERNS = ["1:2", "2:4", "1:4", "4:8", "3:8", "8:16", "block:4x4:0.5", "block:1x8:0.25", "block:16x2:0.9"]


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
    if pattern.kept:
        assert bool((zeros_per_group(sparse, pattern.group) == pattern.group - pattern.kept).all())
    else:
        zeros = int((~mask).sum())
        assert zeros == int(pattern.share * weight.numel() / (pattern.rows * pattern.group) + 1e-9) * pattern.rows * pattern.group


def test_largest_stay() -> None:
    saliency = torch.tensor([[[3.0, 1, 2, 4, 0, 0, 0, 9]]])
    assert parse_pattern("2:4").mask(saliency).tolist() == [[[True, False, False, True, True, False, False, True]]]
    blocks = torch.tensor([[1.0] * 4 + [9, 0, 0, 0], [1] * 4 + [0] * 4])[:, None]
    assert parse_pattern("block:2x4", 0.5).mask(blocks)[:, 0].tolist() == [[False] * 4 + [True] * 4] * 2


def test_groups_with_more_zeros() -> None:
    """Zeros beyond the pattern's may become values again, up to N."""
    weight = torch.tensor([[0.0, 0, 7, 0, 1, 2, 0, 0]])
    held = parse_pattern("2:4").held(weight)
    assert held is not None and held.tolist() == [[True, False, True, False, True, True, False, False]]


@pytest.mark.parametrize("text", ["2:4", "block:4x4:0.5", "block:1x32:0.0001", "7:16"])
def test_text_is_read_again(text: str) -> None:
    assert parse_pattern(text).text == text


def test_blocks_have_a_share() -> None:
    assert parse_pattern("block:4x8", 0.75) == Pattern(kept=0, rows=4, group=8, share=0.75) == parse_pattern("block:4x8:0.75")
    assert parse_pattern("block:4x8").share == 0.5


@pytest.mark.parametrize(
    ("text", "share", "message"),
    [
        ("3:4", None, "N from 1 to M/2"), ("0:4", None, "N from 1"), ("2:32", None, "M of 2, 4, 8, 16"), ("2:6", None, "M of 2"),
        ("half", None, "give N:M"),
        ("2:4", 0.5, "leave it out"), ("block:4x4", 1.0, "from 0.0001"), ("block:4x4", 1e-5, "from 0.0001"),
        ("block:0x4", None, "sides of 1, 2, 4"),
        (24, None, "give N:M"),
        ("2:4 ", None, "give N:M"), ("block:4x5", None, "sides of 1, 2, 4"), ("block:2x2", None, "at least 8 weights"),
    ],
)  # fmt: skip
def test_other_patterns_are_refused(text: str, share: float | None, message: str) -> None:
    with pytest.raises(MuntinError, match=message):
        parse_pattern(text, share)


@pytest.mark.parametrize(("text", "message"), [("4:8", "12 inputs are no multiple of 8"), ("block:4x4", "6 outputs are no multiple of 4")])
def test_sides_that_do_not_fit(text: str, message: str) -> None:
    assert parse_pattern(text).misfit(torch.zeros(6, 12, 3, 3)) == message
