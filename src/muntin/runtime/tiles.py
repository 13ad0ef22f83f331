"""Prediction of a whole picture in overlapping, blended tiles.

Each tile's scores are weighted by a taper that falls towards the tile's edges (a raised cosine over the overlap, never zero), except at
edges of the picture. The weights of all tiles that cover a pixel sum to 1. The taper is separable and the tiles form a grid, so weights are
normalised once for each axis and nothing is divided afterwards. MONAI's `sliding_window_inference` is the reference; it also tapers towards
the picture's edges, and keeps the scores of the whole picture, where this module keeps only the rows that later tiles touch.

All tiles have one size: the last of a row is moved inward instead of shrunk, so that an engine compiles once. Memory: one band of scores
(K * scale*tile * scale*W float32), one tile's call, and the result.

A model that does not take every size still answers every picture:

    classify            the middle of the picture, with the proportions of the nearest allowed size, is resized to that size
    segment, restore    a side longer than the largest allowed one is divided into tiles of it; another one is extended to the next allowed
                        side by repeating the last row or column, and the answer is cut

Sides of tiles: `muntin predict` takes that of the export, else `TILE`, and so does a server short of memory; `/predict` takes
`serving.http.image_route.TILE`, evaluation `training.evaluation.tile_of`; each of them the nearest side that the model takes.

Axis letters: H, W rows and columns, C channels, K channels of the scores. Lower case h, w are those of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Sides, Signature
from muntin.errors import ArtifactError, DataError
from muntin.images import middle_part, middle_square
from muntin.images.rasters import Raster
from muntin.runtime.exact_tiles.run import exact_tiles
from muntin.runtime.session import check_pixels
from muntin.runtime.tensors import TensorSession

TILE = 512
"""Default side of a tile, pixels."""
Output = Literal["labels", "scores", "image"]
Progress = Callable[[int, int], None]

# Outputs of each task; the first is the default.
_OUTPUTS: dict[str, tuple[Output, ...]] = {
    "segment": ("labels", "scores"),
    "classify": ("scores",),
    "restore": ("image", "scores"),
}


class Predictor(Protocol):
    """The part of a session that `predict` uses: a signature, and scores (B, K, scale*H, scale*W) of uint8 images (B, H, W, C)."""

    @property
    def signature(self) -> Signature: ...

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]: ...


def check_image_session(session: object) -> None:
    """Raises DataError for a session of named tensors."""
    if isinstance(session, TensorSession):
        raise DataError(
            f"pictures are computed by a session of images, and this one takes named tensors ({session.signature.text}): call it with a "
            "dictionary of arrays"
        )


def predict(
    session: Predictor,
    image_HWC: NDArray[np.uint8] | Raster,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
    output: Output | None = None,
    progress: Progress | None = None,
) -> NDArray[Any]:
    """Computes one picture of any size.

    `image_HWC`: uint8 (H, W, channels); a memory-mapped array and a raster are read tile by tile. `tile`: side of a tile, pixels, one that
    the model takes; None computes the whole picture in one call where the model takes sides as long. `overlap`: pixels that neighbouring
    tiles share, 0 to tile - 1, by default a quarter of the tile. `progress` is called with (tiles done, number of tiles).

    Returns, by `output` (default: the task's own): "labels" (scale*H, scale*W) in the signature's `label_type`, "scores"
    (K, scale*H, scale*W) float32, blended but otherwise as the model gives them, "image" (scale*H, scale*W, channels) uint8.
    "classify" returns scores (K,) of the picture's middle square, resized to the signature's `side`, and has no tiles. Pictures of sizes
    that the model does not take are resized, tiled or extended as the module says.

    `exact`: the answer of one untiled call, whatever the picture's size, by the plan of the session's artefact (`runtime.exact_tiles`).
    `tile` is then the side of its tiles, by default 1024, and neighbours share no pixels.

    Raises DataError for arguments that are not allowed, ArtifactError for `exact` where the artefact has no plan.
    """
    check_image_session(session)
    signature = session.signature
    output = _check_output(signature, output)
    tile, overlap = _check_arguments(session, image_HWC, tile=tile, overlap=overlap, exact=exact)
    if exact:
        return _exact(session, image_HWC, tile, output, progress)
    if signature.task == "classify":
        scores_K = _call(session, _classified_part(image_HWC, signature))
        if progress is not None:
            progress(1, 1)
        return scores_K
    rows, columns = _axes(signature, image_HWC, tile, overlap)
    height, width = (signature.scale * size for size in image_HWC.shape[:2])
    result: NDArray[Any] | None = None
    for row, scores_KhW in _bands(session, image_HWC, rows, columns, progress):
        if result is None:
            result = _empty(output, signature, len(scores_KhW), height, width)
        done = slice(row, min(row + scores_KhW.shape[1], height))
        _emit(output, result[:, done] if output == "scores" else result[done], scores_KhW[:, : height - row, :width])
    if result is None:
        raise AssertionError("a picture has at least one tile")
    return result


def _exact(
    session: Predictor, image_HWC: NDArray[np.uint8] | Raster, tile: int | None, output: Output, progress: Progress | None
) -> NDArray[Any]:
    signature, (height, width) = session.signature, image_HWC.shape[:2]
    scale, taken = signature.scale, signature.sizes.at_least(height, width)
    if taken[0] < height or taken[1] < width:
        raise DataError(
            f"a picture of {height} x {width} pixels: the model takes {signature.sizes.text}: leave exact out for blended tiles"
        )

    def read(top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
        first, start = min(top, height - 1), min(left, width - 1)
        part_HWC = extended(image_HWC[first:bottom, start:right], bottom - first, right - start)
        return np.ascontiguousarray(part_HWC[top - first :, left - start :])

    result = _empty(output, signature, signature.outputs, scale * height, scale * width)
    for (top, left, bottom, right), scores_Khw in exact_tiles(session, tile).blocks(read, *taken, progress):
        part = (
            result[..., scale * top : scale * bottom, scale * left : scale * right]
            if output != "image"
            else (result[scale * top : scale * bottom, scale * left : scale * right])
        )
        rows, columns = part.shape[:2] if output == "image" else part.shape[-2:]
        if rows and columns:
            _emit(output, part, scores_Khw[:, :rows, :columns])
    return result


def label_bands(
    session: Predictor, image_HWC: NDArray[np.uint8] | Raster, *, tile: int | None = None
) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
    """The labels of `predict` for "segment" in parts from the top down: (first row, labels). A part has some rows of the whole width."""
    check_image_session(session)
    signature = session.signature
    tile, overlap = _check_arguments(session, image_HWC, tile=tile, overlap=None, exact=False)
    height, width = (signature.scale * size for size in image_HWC.shape[:2])
    for row, scores_KhW in _bands(session, image_HWC, *_axes(signature, image_HWC, tile, overlap), None):
        yield row, scores_KhW[:, : height - row, :width].argmax(axis=0).astype(signature.label_type)


def _check_arguments(
    session: Predictor, image_HWC: NDArray[np.uint8] | Raster, *, tile: int | None, overlap: int | None, exact: bool
) -> tuple[int | None, int | None]:
    signature = session.signature
    if not isinstance(image_HWC, np.ndarray | Raster) or image_HWC.ndim != 3:
        description = f"shape {image_HWC.shape}" if isinstance(image_HWC, np.ndarray | Raster) else f"type {type(image_HWC).__name__}"
        raise DataError(f"an image of {description}: give a uint8 array (H, W, {signature.channels})")
    check_pixels(image_HWC[:1, :1][None] if isinstance(image_HWC, Raster) else image_HWC[None], signature)
    return check_tiles(session, tile=tile, overlap=overlap, exact=exact)


def _axes(signature: Signature, image_HWC: NDArray[np.uint8] | Raster, tile: int | None, overlap: int | None) -> tuple[_Axis, _Axis]:
    height, width = image_HWC.shape[:2]
    sizes, scale = signature.sizes, signature.scale
    return _Axis(height, tile, overlap, scale, sizes.height), _Axis(width, tile, overlap, scale, sizes.width)


def tile_side(size: int, tile: int | None, sides: Sides) -> int:
    """The side of the tiles along an axis of `size` pixels: `tile`, or for a shorter axis and without `tile` the nearest allowed side."""
    return sides.at_least(size if tile is None else min(tile, size))


def allowed_tile(signature: Signature, tile: int) -> int | None:
    """The largest tile up to `tile` pixels that a model takes, else the smallest; None for a classifier, and where no square is allowed."""
    return None if signature.task == "classify" else signature.sizes.square(tile)


def size_note(size: Sequence[int], signature: Signature, tile: int | None = None) -> str:
    """Say what `predict` does with a picture of a height and width that the model does not take; empty if it takes it, or its tiles."""
    sizes, (height, width) = signature.sizes, size
    if signature.side is not None or sizes.every:
        return ""
    taken = f"as the model takes {sizes.text}"
    if signature.task == "classify":
        rows, columns = sizes.at_least(height, width)
        return "" if sizes.takes(height, width) else f"of {height} x {width} pixels, the middle is resized to {rows} x {columns}, {taken}"
    rows, columns = tile_side(height, tile, sizes.height), tile_side(width, tile, sizes.width)
    notes = [f"computed in tiles of {rows} x {columns}"] if tile is None and (height > rows or width > columns) else []
    if height < rows or width < columns:
        notes.append(f"extended to {max(height, rows)} x {max(width, columns)} by repeating the last row and column, and the answer is cut")
    return f"{height} x {width} pixels are {' and '.join(notes)}, {taken}" if notes else ""


def _classified_part(image_HWC: NDArray[np.uint8] | Raster, signature: Signature) -> NDArray[np.uint8]:
    """The part of a picture that a classifier sees, in an allowed size."""
    if signature.side is not None:
        return middle_square(image_HWC, signature.side)
    height, width = image_HWC.shape[:2]
    if signature.sizes.takes(height, width):
        return image_HWC[:, :]
    return middle_part(image_HWC, *signature.sizes.at_least(height, width))


class _Axis:
    """Tiles along one axis: their starts in pixels of the image, their weights in pixels of the scores, one row for each tile.

    `size`: of the axis, extended to one tile where it is shorter.
    """

    def __init__(self, size: int, tile: int | None, overlap: int | None, scale: int, sides: Sides) -> None:
        self.scale = scale
        self.tile = tile_side(size, tile, sides)
        self.size = max(size, self.tile)
        overlap = self.tile // 4 if overlap is None else overlap
        self.starts = tile_origins(self.size, self.tile, overlap)
        self.weights = tile_weights(self.starts, self.tile, overlap, scale)


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


def _bands(
    session: Predictor, image_HWC: NDArray[np.uint8] | Raster, rows: _Axis, columns: _Axis, progress: Progress | None
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Finished rows from the top down: (first row, scores (K, rows, scale*W)), in a buffer that the next iteration overwrites."""
    scale, done, total = rows.scale, 0, len(rows.starts) * len(columns.starts)
    open_KhW: NDArray[np.float32] | None = None
    for top, below, weights_h in zip(rows.starts, (*rows.starts[1:], rows.size), rows.weights, strict=True):
        for left, weights_w in zip(columns.starts, columns.weights, strict=True):
            tile_HWC = image_HWC[top : top + rows.tile, left : left + columns.tile]
            scores_Khw = _call(session, extended(tile_HWC, rows.tile, columns.tile))
            if open_KhW is None:
                open_KhW = np.zeros((len(scores_Khw), scale * rows.tile, scale * columns.size), np.float32)
            open_KhW[:, :, scale * left : scale * (left + columns.tile)] += scores_Khw * np.outer(weights_h, weights_w).astype(np.float32)
            done += 1
            if progress is not None:
                progress(done, total)
        if open_KhW is None:
            raise AssertionError("a row has at least one tile")
        finished = scale * (below - top)
        yield scale * top, open_KhW[:, :finished]
        kept = open_KhW.shape[1] - finished
        if kept:
            open_KhW[:, :kept] = open_KhW[:, finished:].copy()
        open_KhW[:, kept:] = 0


def extended(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An image with its last row and column repeated up to a size; itself where it has that size."""
    rows, columns = height - image_HWC.shape[0], width - image_HWC.shape[1]
    return np.pad(image_HWC, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else image_HWC


def _call(session: Predictor, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scores of one image. Raises ArtifactError for a shape other than the signature's."""
    images_1HWC = np.ascontiguousarray(image_HWC)[None]
    scores = session(images_1HWC)
    expected = session.signature.scores_shape(*images_1HWC.shape[:3])
    if scores.shape != expected:
        raise ArtifactError(f"the session gave scores of shape {scores.shape} where its signature says {expected}: export the model again")
    first: NDArray[np.float32] = scores[0]
    return first


def _empty(output: Output, signature: Signature, channels: int, height: int, width: int) -> NDArray[Any]:
    if output == "labels":
        return np.empty((height, width), signature.label_type)
    if output == "scores":
        return np.empty((channels, height, width), np.float32)
    return np.empty((height, width, channels), np.uint8)


def _emit(output: Output, part: NDArray[Any], scores_Khw: NDArray[np.float32]) -> None:
    """Write scores to their part of the result."""
    if output == "labels":
        part[:] = scores_Khw.argmax(axis=0)
    elif output == "scores":
        part[:] = scores_Khw
    else:
        part[:] = np.rint(scores_Khw).clip(0, 255).transpose(1, 2, 0)


def _check_output(signature: Signature, output: Output | None) -> Output:
    allowed = _OUTPUTS[signature.task]
    if output is None:
        return allowed[0]
    if output not in allowed:
        raise DataError(f'output="{output}" of a "{signature.task}" model: give one of {", ".join(allowed)}')
    return output


def check_tiles(session: Predictor, *, tile: int | None, overlap: int | None, exact: bool = False) -> tuple[int | None, int | None]:
    """Returns the tile's side and the overlap for `predict`. Raises DataError for values that are not allowed."""
    if exact:
        return _check_exact(session, tile, overlap), None
    if tile is None:
        if overlap is not None:
            raise DataError(f"overlap={overlap} without tile: give the tile's side too, or leave overlap out")
        return None, None
    if session.signature.task == "classify":
        raise DataError(f'tile={tile} for a "classify" model: a picture has one answer, leave tile out')
    if not _is_whole(tile) or tile < 1:
        raise DataError(f"tile={tile!r}: give a whole number of pixels from 1, or None for the whole picture in one call")
    tile, sizes = int(tile), session.signature.sizes  # NumPy's integers may overflow
    if not sizes.takes(tile, tile):
        square = sizes.square(tile)
        advice = "leave tile out" if square is None else f"give {square}, or leave tile out"
        raise DataError(f"tile={tile}: the model takes {sizes.text}: {advice}")
    if overlap is None:
        return tile, None
    if not _is_whole(overlap) or not 0 <= overlap < tile:
        raise DataError(f"overlap={overlap!r} with tile={tile}: give a whole number of pixels from 0 to {tile - 1}")
    return tile, int(overlap)


def _check_exact(session: Predictor, tile: int | None, overlap: int | None) -> int | None:
    if session.signature.task == "classify":
        raise DataError('exact=True for a "classify" model: a picture has one answer, leave it out')
    if overlap is not None:
        raise DataError(f"overlap={overlap} with exact=True: exact tiles share no pixels, leave it out")
    if tile is not None and (not _is_whole(tile) or tile < 1):
        raise DataError(f"tile={tile!r}: give a whole number of pixels from 1, or None")
    return None if tile is None else int(tile)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
