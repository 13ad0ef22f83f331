"""Prediction of a picture of any size, from any source into any sink: in one call, or in overlapping tiles that are blended.

The next tiles are read while the engine computes, and finished rows are written while the next ones are computed. Memory: one tile for each
call in flight, the scores of the rows in which tiles overlap (`runtime.blending`), and two bands of the result; without a sink, the result.
All tiles have one size: the last of a row is moved inward instead of shrunk, so that an engine compiles once. A call has one tile: several
streams take less time on CPUs, and calls of several tiles then gain nothing.

A model that does not take every size still answers every picture:

    classify            the middle of the picture, with the proportions of the nearest allowed size, is resized to that size
    segment, restore    a side longer than the largest allowed one is divided into tiles of it; another one is extended to the next allowed
                        side by repeating the last row or column, and the answer is cut

Sides of tiles: `muntin predict` takes that of the export, else `TILE`, and so does a server short of memory; `/predict` takes
`serving.http.image_route.TILE`, evaluation `training.evaluation.tile_of`; each of them the nearest side that the model takes.

Axis letters: H, W rows and columns, C channels, K channels of the scores. Lower case h, w are those of a tile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Sides, Signature
from muntin.artifact.answers import OutputName
from muntin.errors import ArtifactError, DataError
from muntin.images import middle_part, middle_square
from muntin.images.rasters import Raster
from muntin.images.sinks import PictureSink
from muntin.images.sources import AnyPicture, PictureSource, ScaledSource, raster_of, source_of
from muntin.runtime.blending import TileAxis, best_class, blended
from muntin.runtime.exact_tiles.tiles import exact_tiles
from muntin.runtime.inputs import check_pixels
from muntin.runtime.session import Session

TILE = 512
"""Default side of a tile, pixels."""
Progress = Callable[[int, int], None]
Band = tuple[int, NDArray[Any], NDArray[np.bool_] | None]
"""First row, finished rows of the result, channels last, and a mask of their pixels without data; None where there is no such mask."""


class Predictor(Protocol):
    """The part of a session that `predict` uses: a signature, and scores (B, K, scale*H, scale*W) of uint8 images (B, H, W, C)."""

    @property
    def signature(self) -> Signature: ...

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]: ...


@runtime_checkable
class MappedPredictor(Predictor, Protocol):
    """A predictor that computes batches while the next ones are read. Its answers are arrays that the caller may change."""

    def map(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]: ...


def check_image_session(session: object) -> None:
    """Raises DataError for a session of named tensors."""
    if isinstance(session, Session) and not session.images:
        raise DataError(
            f"pictures are computed by a session of images, and this one takes named tensors ({session.signature.text}): call it with a "
            "dictionary of arrays"
        )


@overload
def predict(
    session: Predictor,
    image_HWC: AnyPicture,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
    output: OutputName | None = None,
    progress: Progress | None = None,
    into: None = None,
) -> NDArray[Any]: ...


@overload
def predict(
    session: Predictor,
    image_HWC: AnyPicture,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
    output: OutputName | None = None,
    progress: Progress | None = None,
    into: PictureSink,
) -> None: ...


def predict(
    session: Predictor,
    image_HWC: AnyPicture,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    exact: bool = False,
    output: OutputName | None = None,
    progress: Progress | None = None,
    into: PictureSink | None = None,
) -> NDArray[Any] | None:
    """Computes one picture of any size.

    `image_HWC`: uint8 (H, W, channels), the path of a file, or an image of Pillow; a memory-mapped array and other sources
    (`images.open_source`) are read tile by tile. `tile`: side of a tile, pixels, one that the model takes; None computes the whole picture
    in one call where the model takes sides as long. `overlap`: pixels that neighbouring tiles share, 0 to tile - 1, by default a quarter of
    the tile. `progress` is called with (tiles done, number of tiles). `into`: a sink (`images.open_sink`) that receives finished rows, with
    channels last; then None is returned.

    Returns, by `output` (default: the task's own): "labels" (scale·H, scale·W) in the signature's `label_type`, "scores"
    (K, scale·H, scale·W) float32, blended but otherwise as the model gives them, "image" (scale·H, scale·W, channels) uint8, or the values
    of a source that was scaled. A model with one answer a picture returns scores (K,) of the picture's middle square, resized to the
    signature's `side`, and has no tiles and no sink. Pictures of sizes that the model does not take are resized, tiled or extended as the
    module says.

    `exact`: the answer of one untiled call, whatever the picture's size, by the plan of the session's artefact (`runtime.exact_tiles`).
    `tile` is then the side of its tiles, by default 1024, and neighbours share no pixels.

    Raises DataError for arguments that are not allowed, ArtifactError for `exact` where the artefact has no plan.
    """
    check_image_session(session)
    signature = session.signature
    output = _check_output(signature, output)
    image_HWC = source_of(image_HWC, signature.channels)
    tile, overlap = _check_arguments(session, image_HWC, tile=tile, overlap=overlap, exact=exact)
    if signature.answer.one:
        if into is not None:
            raise DataError(f'into a sink from a "{signature.task}" model: a picture has one answer, leave `into` out')
        (scores_K,) = _answers(session, iter([_classified_part(image_HWC, signature)[None]]), 1)
        if progress is not None:
            progress(1, 1)
        return scores_K
    if exact:
        bands = _exact_bands(session, image_HWC, output, tile, progress, masked=into is not None)
    else:
        bands = _bands(session, image_HWC, output, *_axes(signature, image_HWC, tile, overlap), progress, masked=into is not None)
    height, width = (signature.scale * size for size in image_HWC.shape[:2])
    if into is not None:
        dtype = _image_type(image_HWC) if output == "image" else np.dtype(signature.label_type if output == "labels" else np.float32)
        into.begin((height, width) if output == "labels" else (height, width, signature.outputs), dtype)
        with _written_behind(into) as write:
            for band in bands:
                write(*band)
        return None
    result = _collected(bands, height)
    return result.transpose(2, 0, 1) if output == "scores" else result


def _collected(bands: Iterator[Band], height: int) -> NDArray[Any]:
    """All bands as one array, in memory of the bands' order of axes. A single band is not copied."""
    _, first, _ = next(bands)
    if len(first) == height:
        return first
    result = np.empty_like(first, shape=(height, *first.shape[1:]))  # keeps the order of axes
    result[: len(first)] = first
    for top, band, _ in bands:
        result[top : top + len(band)] = band
    return result


def label_bands(
    session: Predictor, image_HWC: PictureSource, *, tile: int | None = None
) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
    """The labels of `predict` in parts from the top down: (first row, labels). A part has some rows of the whole width."""
    check_image_session(session)
    tile, overlap = _check_arguments(session, image_HWC, tile=tile, overlap=None, exact=False)
    axes = _axes(session.signature, image_HWC, tile, overlap)
    for top, labels, _ in _bands(session, image_HWC, "labels", *axes, None, masked=False):
        yield top, labels


def _check_arguments(
    session: Predictor, image_HWC: PictureSource, *, tile: int | None, overlap: int | None, exact: bool
) -> tuple[int | None, int | None]:
    signature, shape = session.signature, getattr(image_HWC, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 3:
        description = f"type {type(image_HWC).__name__}" if shape is None else f"shape {shape}"
        raise DataError(f"an image of {description}: give a uint8 array (H, W, {signature.channels})")
    check_pixels(image_HWC[None] if isinstance(image_HWC, np.ndarray) else image_HWC[:1, :1][None], signature)
    return check_tiles(session, tile=tile, overlap=overlap, exact=exact)


def _axes(signature: Signature, image_HWC: PictureSource, tile: int | None, overlap: int | None) -> tuple[TileAxis, TileAxis]:
    sizes, scale, (height, width) = signature.sizes, signature.scale, image_HWC.shape[:2]
    rows, columns = tile_side(height, tile, sizes.height), tile_side(width, tile, sizes.width)
    return TileAxis(height, rows, overlap, scale), TileAxis(width, columns, overlap, scale)


def tile_side(size: int, tile: int | None, sides: Sides) -> int:
    """The side of the tiles along an axis of `size` pixels: `tile`, or for a shorter axis and without `tile` the nearest allowed side."""
    return sides.at_least(size if tile is None else min(tile, size))


def allowed_tile(signature: Signature, tile: int) -> int | None:
    """The largest tile up to `tile` pixels that a model takes, else the smallest; None for a classifier, and where no square is allowed."""
    return None if signature.answer.one else signature.sizes.square(tile)


def size_note(size: Sequence[int], signature: Signature, tile: int | None = None) -> str:
    """Say what `predict` does with a picture of a height and width that the model does not take; empty if it takes it, or its tiles."""
    sizes, (height, width) = signature.sizes, size
    if signature.side is not None or sizes.every:
        return ""
    taken = f"as the model takes {sizes.text}"
    if signature.answer.one:
        rows, columns = sizes.at_least(height, width)
        return "" if sizes.takes(height, width) else f"of {height} x {width} pixels, the middle is resized to {rows} x {columns}, {taken}"
    rows, columns = tile_side(height, tile, sizes.height), tile_side(width, tile, sizes.width)
    notes = [f"computed in tiles of {rows} x {columns}"] if tile is None and (height > rows or width > columns) else []
    if height < rows or width < columns:
        notes.append(f"extended to {max(height, rows)} x {max(width, columns)} by repeating the last row and column, and the answer is cut")
    return f"{height} x {width} pixels are {' and '.join(notes)}, {taken}" if notes else ""


def _classified_part(image_HWC: PictureSource, signature: Signature) -> NDArray[np.uint8]:
    """The part of a picture that a classifier sees, in an allowed size."""
    if signature.side is not None:
        return middle_square(image_HWC, signature.side)
    height, width = image_HWC.shape[:2]
    if signature.sizes.takes(height, width):
        return image_HWC[:, :]
    return middle_part(image_HWC, *signature.sizes.at_least(height, width))


def _bands(
    session: Predictor,
    image_HWC: PictureSource,
    output: OutputName,
    rows: TileAxis,
    columns: TileAxis,
    progress: Progress | None,
    *,
    masked: bool,
) -> Iterator[Band]:
    """Finished rows of the result from the top down, each band in an array of its own. `masked`: with masks of pixels without data."""
    signature, scale, total = session.signature, rows.scale, len(rows.spans) * len(columns.spans)
    height, width = (scale * size for size in image_HWC.shape[:2])
    masks: deque[NDArray[np.bool_]] = deque()
    raster = _masked_raster(image_HWC) if masked else None

    def images() -> Iterator[NDArray[np.uint8]]:
        for row in rows.spans:
            for column in columns.spans:
                top, left = row.start, column.start
                tile_HWC = image_HWC[top : top + rows.tile, left : left + columns.tile]
                if raster is not None:
                    masks.append(raster.empty(slice(top, top + row.finished // scale), slice(left, left + column.finished // scale)))
                yield np.ascontiguousarray(extended(tile_HWC, rows.tile, columns.tile))[None]

    band: NDArray[Any] | None = None
    empty_HW: NDArray[np.bool_] | None = None
    for done, window in enumerate(blended(_answers(session, images(), total), rows, columns), 1):
        top, left, scores_Khw = window.top, window.left, window.scores[:, : height - window.top, : width - window.left]
        if band is None:
            whole = output == "scores" and window.last
            band = scores_Khw.transpose(1, 2, 0) if whole else _empty(output, signature, image_HWC, scores_Khw.shape[1], width)
            empty_HW = None if raster is None else np.empty(band.shape[:2], np.bool_)
        part = np.s_[:, left : left + scores_Khw.shape[2]]
        if output != "scores" or not (window.last and left == 0):
            _emit(output, band[part], scores_Khw, image_HWC)
        if empty_HW is not None:
            empty_HW[part] = masks.popleft().repeat(scale, 0).repeat(scale, 1)
        if progress is not None:
            progress(done, total)
        if window.last:
            yield top, band, empty_HW
            band = None


def _exact_bands(
    session: Predictor, image_HWC: PictureSource, output: OutputName, tile: int | None, progress: Progress | None, *, masked: bool
) -> Iterator[Band]:
    """The same from exact tiles, a band for each row of them."""
    signature, scale, (height, width) = session.signature, session.signature.scale, image_HWC.shape[:2]
    work = exact_tiles(session, tile)
    taken = signature.sizes.at_least(height, width)
    if taken[0] < height or taken[1] < width:
        raise DataError(
            f"a picture of {height} x {width} pixels: the model takes {signature.sizes.text}: leave exact out for blended tiles"
        )
    raster = _masked_raster(image_HWC) if masked else None

    def read(top: int, left: int, bottom: int, right: int) -> NDArray[np.uint8]:
        first, start = min(top, height - 1), min(left, width - 1)
        part_HWC = extended(image_HWC[first:bottom, start:right], bottom - first, right - start)
        return np.ascontiguousarray(part_HWC[top - first :, left - start :])

    band: NDArray[Any] | None = None
    for (top, left, bottom, right), scores_Khw in work.blocks(read, *taken, progress):
        rows = min(bottom, height) - top
        if rows > 0 and left < width:
            if band is None:
                band = _empty(output, signature, image_HWC, scale * rows, scale * width)
            part = band[:, scale * left : scale * right]
            _emit(output, part, scores_Khw[:, : part.shape[0], : part.shape[1]], image_HWC)
        if band is not None and right == taken[1]:
            empty_HW = None if raster is None else raster.empty(slice(top, top + rows), slice(0, width))
            yield scale * top, band, None if empty_HW is None else empty_HW.repeat(scale, 0).repeat(scale, 1)
            band = None


def _masked_raster(image_HWC: PictureSource) -> Raster | None:
    """The raster of a source, if it has pixels without data."""
    raster = raster_of(image_HWC)
    return raster if raster is not None and raster.masked else None


def _emit(output: OutputName, part: NDArray[Any], scores_Khw: NDArray[np.float32], image_HWC: PictureSource) -> None:
    """Write scores to their part of a band."""
    if output == "labels":
        best_class(scores_Khw, part)
    elif output == "image":
        part[...] = _pixels(scores_Khw, image_HWC)
    else:
        part[...] = scores_Khw.transpose(1, 2, 0)


def _answers(session: Predictor, images: Iterator[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.float32]]:
    """Scores of each image (1, H, W, C), in arrays that the caller may change. Raises ArtifactError for a shape other than the signature's.

    Several images are computed by `map` where the session has it.
    """
    sizes: deque[tuple[int, ...]] = deque()

    def sized() -> Iterator[NDArray[np.uint8]]:
        for image_1HWC in images:
            sizes.append(image_1HWC.shape[:3])
            yield image_1HWC

    mapped = isinstance(session, MappedPredictor) and count > 1
    for scores in session.map(sized()) if isinstance(session, MappedPredictor) and mapped else map(session, sized()):
        expected = session.signature.scores_shape(*sizes.popleft())
        if scores.shape != expected:
            raise ArtifactError(
                f"the session gave scores of shape {scores.shape} where its signature says {expected}: export the model again"
            )
        yield scores[0] if count == 1 or (mapped and scores.flags.writeable) else scores[0].copy()


@contextmanager
def _written_behind(sink: PictureSink) -> Iterator[Callable[[int, NDArray[Any], NDArray[np.bool_] | None], None]]:
    """Yields a function that writes a band in another thread, after the band before it. The next call, or the end, raises its error."""
    pending: list[Future[None]] = []

    def write(top: int, band: NDArray[Any], empty_HW: NDArray[np.bool_] | None) -> None:
        if pending:
            pending.pop().result()
        pending.append(pool.submit(sink.write, top, band, empty_HW))

    with ThreadPoolExecutor(1, "muntin-writer") as pool:
        yield write
    if pending:
        pending.pop().result()


def extended(image_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An image with its last row and column repeated up to a size; itself where it has that size."""
    rows, columns = height - image_HWC.shape[0], width - image_HWC.shape[1]
    return np.pad(image_HWC, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else image_HWC


def _image_type(image_HWC: PictureSource) -> np.dtype[Any]:
    """Type of a restored picture."""
    return image_HWC.original_dtype if isinstance(image_HWC, ScaledSource) else np.dtype(np.uint8)


def _pixels(scores_KHW: NDArray[np.float32], image_HWC: PictureSource) -> NDArray[Any]:
    """The restored picture (H, W, K) of scores from 0 to 255, in the values of its source."""
    scores_HWK = scores_KHW.transpose(1, 2, 0)
    return image_HWC.original(scores_HWK) if isinstance(image_HWC, ScaledSource) else np.rint(scores_HWK).clip(0, 255).astype(np.uint8)


def _empty(output: OutputName, signature: Signature, image_HWC: PictureSource, height: int, width: int) -> NDArray[Any]:
    """Memory of some rows of the result, channels last."""
    if output == "labels":
        return np.empty((height, width), signature.label_type)
    if output == "scores":
        return np.empty((signature.outputs, height, width), np.float32).transpose(1, 2, 0)
    return np.empty((height, width, signature.outputs), _image_type(image_HWC))


def _check_output(signature: Signature, output: OutputName | None) -> OutputName:
    allowed = signature.answer.outputs
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
    if session.signature.answer.one:
        raise DataError(f'tile={tile} for a "{session.signature.task}" model: a picture has one answer, leave tile out')
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
    if session.signature.answer.one:
        raise DataError(f'exact=True for a "{session.signature.task}" model: a picture has one answer, leave it out')
    if overlap is not None:
        raise DataError(f"overlap={overlap} with exact=True: exact tiles share no pixels, leave it out")
    if tile is not None and (not _is_whole(tile) or tile < 1):
        raise DataError(f"tile={tile!r}: give a whole number of pixels from 1, or None")
    return None if tile is None else int(tile)


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
