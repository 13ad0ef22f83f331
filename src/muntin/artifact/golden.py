"""Which pictures an artefact's golden answers are of."""

from __future__ import annotations

GOLDEN_SIDE = 48
"""Largest height and width of the golden images, pixels."""


def golden_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes no larger than an example of height x width, the second of odd sides: what was baked into a model is found."""
    height, width = min(GOLDEN_SIDE, height), min(GOLDEN_SIDE, width)
    return (height, width), (height * 5 // 8 | 1, width * 7 // 8 | 1)
