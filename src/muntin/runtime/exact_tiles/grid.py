"""Tiles of a pass: the own part of each, and the part of the picture from which it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from muntin.artifact.tile_plan import TilePass
from muntin.runtime.exact_tiles.maps import PixelBox

PixelSpan = tuple[int, int]


def tiles(height: int, width: int, tile: int, walk: TilePass) -> Iterator[tuple[PixelBox, PixelBox]]:
    """Own box and read box of each tile, rows first. `tile`: side in pixels, at least; own boxes do not overlap.

    Read boxes have two heights and two widths at most, so that an engine compiles four forms: they are longer than needed at the
    picture's edges.
    """
    side = -(-tile // walk.step) * walk.step
    rows, columns = (_spans(size, side, walk) for size in (height, width))
    for ((top, bottom), (first, last)), ((left, right), (start, end)) in product(rows, columns):
        yield (top, left, bottom, right), (first, start, last, end)


def _spans(size: int, side: int, walk: TilePass) -> list[tuple[PixelSpan, PixelSpan]]:
    before, after = walk.halo
    length = side + before + after
    final = (size - length) // walk.step * walk.step  # where the last read span begins
    spans = []
    for low in range(0, size, side):
        high = min(low + side, size)
        if walk.gives_values:  # every cell counts once
            spans.append(((low, high), (low, high)))
            continue
        first = max(0, min(low - before, final))
        spans.append(((low, high), (first, size if first >= final else first + length)))
    return spans
