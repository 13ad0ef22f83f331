"""Scores of overlapping tiles, blended into finished windows of a picture.

Each tile's scores are weighted by a taper that falls towards the tile's edges (a raised cosine over the overlap, never zero), except at
edges of the picture. The weights of all tiles that cover a pixel sum to 1. The taper is separable and the tiles form a grid, so weights are
normalised once for each axis and nothing is divided afterwards. MONAI's `sliding_window_inference` is the reference; it also tapers towards
the picture's edges, and keeps the scores of the whole picture.

Tiles come row by row. A tile's left and upper parts are finished by what earlier tiles left for them; its right part is kept for the next
tile, its lower part for the next row of tiles. So memory holds K * (overlapping rows) * W floats and two tiles. A tile's scores are
multiplied in one pass, which takes NumPy less time than the parts that overlap one by one, and only those are copied.

Axis letters: H, W rows and columns of the picture, K channels of the scores. Lower case h, w are those of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PRODUCTS = 8
"""Kinds of tiles whose weights are kept: those at the start, in the middle and at the end of a row of tiles, and some more."""
_CHUNK = 1 << 16
"""Pixels whose labels are computed at once: their scores of two classes stay in a core's cache."""


def tile_origins(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Starts of the tiles that cover an axis; the last one is moved inward. A tile as long as the axis is the only one."""
    if tile >= size:
        return (0,)
    step = tile - min(overlap, tile - 1)
    return (*range(0, size - tile, step), size - tile)


def tile_weights(origins: tuple[int, ...], tile: int, overlap: int, scale: int) -> NDArray[np.float64]:
    """The weights of each tile along an axis, (len(origins), scale*tile), all positive: where tiles overlap they sum to 1."""
    length, ramp = tile * scale, max(overlap, 0) * scale
    distance = np.arange(length) + 0.5  # to the first edge, from a pixel's centre
    rising = np.sin(np.pi / 2 * np.minimum(distance / ramp, 1.0)) ** 2 if ramp else np.ones(length)
    tapers = np.ones((len(origins), length))
    # At the picture's end only the tile before the last one tapers: the last one may start a pixel before that edge.
    tapers[1:] = rising
    tapers[:-1] = np.minimum(tapers[:-1], rising[::-1])
    total = np.zeros((origins[-1] + tile) * scale)
    for origin, taper in zip(origins, tapers, strict=True):
        total[origin * scale :][:length] += taper
    return np.stack([taper / total[origin * scale :][:length] for origin, taper in zip(origins, tapers, strict=True)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """A tile along one axis. `start`: in pixels of the picture; all others in pixels of the scores.

    `first`: the start. `shared`: pixels from the start that earlier tiles cover, too. `finished`: pixels from the start that no later tile
    covers. `weights`: of each pixel.
    """

    start: int
    first: int
    shared: int
    finished: int
    weights: NDArray[np.float32]


class TileAxis:
    """Tiles along one axis of `size` pixels, which is extended to one tile where it is shorter; overlap None: a quarter of the tile."""

    def __init__(self, size: int, tile: int, overlap: int | None, scale: int) -> None:
        self.tile, self.size, self.scale = tile, max(size, tile), scale
        overlap = tile // 4 if overlap is None else overlap
        starts, length = tile_origins(self.size, tile, overlap), scale * tile
        weights = tile_weights(starts, tile, overlap, scale).astype(np.float32)
        shared = (0, *(length - scale * (after - before) for before, after in pairwise(starts)))
        self.spans = tuple(
            Span(start=start, first=scale * start, shared=before, finished=length - after, weights=row)
            for start, before, after, row in zip(starts, shared, (*shared[1:], 0), weights, strict=True)
        )
        self.kept = max(shared)
        """Largest number of pixels, of the scores, that a tile shares with the next one."""


class _Products:
    """Products of the weights along both axes, (h, w). Most tiles have equal ones: those of the last few kinds of tiles are kept."""

    def __init__(self) -> None:
        self._last: dict[tuple[bytes, bytes], NDArray[np.float32]] = {}

    def __call__(self, row: Span, column: Span) -> NDArray[np.float32]:
        key = row.weights.tobytes(), column.weights.tobytes()
        if key not in self._last:
            if len(self._last) >= _PRODUCTS:
                self._last.pop(next(iter(self._last)))
            self._last[key] = np.outer(row.weights, column.weights)
        return self._last[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Finished scores (K, rows, columns). `top`, `left`: their place. `last`: it completes its band of rows."""

    scores: NDArray[np.float32]
    top: int
    left: int
    last: bool


def blended(answers: Iterable[NDArray[np.float32]], rows: TileAxis, columns: TileAxis) -> Iterator[Window]:
    """Finished windows, band by band, from the scores (K, h, w) of each tile, row by row. The scores are changed in place."""
    kept_KhW: NDArray[np.float32] | None = None
    arriving, weights_hw = iter(answers), _Products()
    for row in rows.spans:
        right_Khw: NDArray[np.float32] | None = None
        left_over = rows.scale * rows.tile - row.finished
        for column in columns.spans:
            scores_Khw = next(arriving)
            if len(rows.spans) > 1 or len(columns.spans) > 1:
                scores_Khw *= weights_hw(row, column)
            if right_Khw is not None:
                scores_Khw[:, :, : column.shared] += right_Khw
            right_Khw = scores_Khw[:, :, column.finished :]
            done_Khw = scores_Khw[:, :, : column.finished]
            place = slice(column.first, column.first + column.finished)
            if kept_KhW is None:
                kept_KhW = np.empty((len(scores_Khw), rows.kept, columns.scale * columns.size), np.float32)
            if row.shared:
                done_Khw[:, : row.shared] += kept_KhW[:, : row.shared, place]
            if left_over:
                kept_KhW[:, :left_over, place] = done_Khw[:, row.finished :]
            last = column is columns.spans[-1]
            yield Window(scores=done_Khw[:, : row.finished], top=row.first, left=column.first, last=last)


def best_class(scores_KHW: NDArray[np.float32], labels_HW: NDArray[Any]) -> None:
    """Writes the class of the highest score, the first of equal ones: `argmax` along K, which takes NumPy several times as long.

    `labels_HW`: uint8 or uint16. Scores must be numbers.
    """
    rows = max(1, _CHUNK // max(1, labels_HW.shape[1]))
    for top in range(0, labels_HW.shape[0], rows):
        part_KhW, labels = scores_KHW[:, top : top + rows], labels_HW[top : top + rows]
        best = part_KhW[0].copy()
        labels[...] = 0
        for k in range(1, len(part_KhW)):
            higher = (part_KhW[k] > best).view(np.uint8).astype(labels.dtype, copy=False)
            higher *= labels.dtype.type(k)
            np.maximum(labels, higher, out=labels)  # a later class has a higher number than those before
            np.maximum(best, part_KhW[k], out=best)
