"""Sizes of an artefact's golden images."""

from __future__ import annotations

from muntin.artifact.sizes import Sizes

GOLDEN_SIDE = 48
"""Largest height and width of the golden images, pixels; larger where the model takes no smaller ones."""


def golden_sizes(height: int, width: int, sizes: Sizes = Sizes()) -> tuple[tuple[int, int], ...]:  # noqa: B008 - immutable
    """Return one or two allowed sizes, at most height x width where that is possible.

    The second one is odd if odd sides are allowed, which reveals a size that was fixed in the model.
    """
    height, width = min(GOLDEN_SIDE, height), min(GOLDEN_SIDE, width)
    return tuple(dict.fromkeys((sizes.at_least(height, width), sizes.at_least(height * 5 // 8 | 1, width * 7 // 8 | 1))))
