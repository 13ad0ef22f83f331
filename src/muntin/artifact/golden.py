"""Sizes of an artefact's golden images."""

from __future__ import annotations

GOLDEN_SIDE = 48
"""Largest height and width of the golden images, pixels."""


def golden_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes, at most height x width; the second one is odd, which reveals a size that was fixed in the model."""
    height, width = min(GOLDEN_SIDE, height), min(GOLDEN_SIDE, width)
    return (height, width), (height * 5 // 8 | 1, width * 7 // 8 | 1)
