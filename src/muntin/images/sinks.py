"""Files that receive a picture in bands of rows from the top down, and have their name only when they are complete.

    with open_sink("labels.tif", like=source, classes=classes) as sink:
        muntin.predict(session, source, tile=512, into=sink)

`.npy` files and GeoTIFFs are written as the bands come; other pictures are collected and encoded at the end. A file is written under a
hidden name in its folder. The name is removed after an error; a process that is killed leaves it, and nothing under the final name.

Axis letters: H, W rows and columns, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from muntin.artifact.atomic_files import hidden_sibling, put_in_place, refuse_folder
from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images.geotiff import GeoTiffWriter
from muntin.images.opening import IMAGE_SUFFIXES, MAX_PIXELS, check_pixels, reason
from muntin.images.rasters import Raster
from muntin.images.sources import PictureSource, raster_of
from muntin.images.writing import encode_image, encode_png

Mask = npt.NDArray[np.bool_]


class PictureSink(Protocol):
    """Receives a picture. `begin` is called once, with the shape (H, W) or (H, W, C) and the type; then `write` for each band of rows.

    `empty_HW`: True for pixels without data, None where all have some. The sink may change the band.
    """

    def begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None: ...

    def write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None = None) -> None: ...


class ArraySink:
    """A sink into an array that is there already, such as a `numpy.memmap`. Raises DataError for another shape."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if self.array.shape != shape or not np.can_cast(dtype, self.array.dtype):
            raise DataError(f"an array of {self.array.dtype} {self.array.shape} for a result of {dtype} {shape}: give one of this kind")

    def write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None = None) -> None:
        self.array[top : top + len(band)] = band


class FileSink(ABC):
    """A sink into a file. Use it as a context: at the end of the block the file is complete and gets its name.

    Raises DataError when the system refuses, or when the block ends before all rows were written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._part = hidden_sibling(self.path)
        self._shape: tuple[int, ...] | None = None
        self._next_row = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                if self._shape is None or self._next_row < self._shape[0]:
                    raise DataError(f"{self.path} is not written: {self._next_row} rows were given: write all rows of the picture")
                with self._refusals():
                    refuse_folder(self.path)
                    self._end()
                    put_in_place(self._part, self.path)
        finally:
            with suppress(OSError):  # after an error, of which the caller hears
                self._close()
            self._part.unlink(missing_ok=True)

    def begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        with self._refusals():
            self._begin(shape, dtype)
        self._shape, self._next_row = shape, 0

    def write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None = None) -> None:
        if self._shape is None or top != self._next_row or band.shape[1:] != self._shape[1:]:
            expected = "call `begin` first" if self._shape is None else f"row {self._next_row} of {self._shape} is next, with all columns"
            raise DataError(f"{self.path}: a band of shape {band.shape} at row {top}: {expected}")
        with self._refusals():
            self._write(top, band, empty_HW)
        self._next_row += len(band)

    @abstractmethod
    def _begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Creates the file `self._part`."""

    @abstractmethod
    def _write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None) -> None:
        """Writes the next rows."""

    @abstractmethod
    def _end(self) -> None:
        """Completes the file."""

    @abstractmethod
    def _close(self) -> None:
        """Closes what is open. Called at the end and after errors."""

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns the system's errors into DataErrors."""
        try:
            yield
        except OSError as error:
            advice = "its folder does not exist" if not self.path.parent.is_dir() else reason(error)
            raise DataError(f"cannot write {self.path}: {advice}; make room or choose another place") from error


class NpySink(FileSink):
    """A `.npy` file, written row by row. Pixels without data hold what was predicted."""

    _stream: IO[bytes] | None = None

    def _begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._stream = self._part.open("xb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def _write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None) -> None:
        assert self._stream is not None
        self._stream.write(np.ascontiguousarray(band).data)

    def _end(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class EncodedSink(FileSink):
    """A PNG, JPEG, WebP, BMP or TIFF, which is collected in memory. `colors`: of labels, as of `encode_png`.

    Raises TooManyPixelsError for more pixels than `max_pixels`, DataError for numbers that the format cannot hold.
    """

    def __init__(self, path: Path | str, colors: Sequence[tuple[int, int, int]] = (), *, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        self._colors, self._max_pixels = colors, max_pixels

    def _begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        check_pixels(self.path, (shape[1], shape[0]), self._max_pixels)
        self._pixels = np.empty(shape, dtype)

    def _write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None) -> None:
        self._pixels[top : top + len(band)] = band

    def _end(self) -> None:
        if self.path.suffix.lower() == ".png" and self._pixels.ndim == 2:
            content: bytes | memoryview = encode_png(self._pixels, self._colors if self._pixels.dtype == np.uint8 else ())
        else:
            content = encode_image(self.path, self._pixels)
        self._part.write_bytes(content)

    def _close(self) -> None:
        pass


class GeoTiffSink(FileSink):
    """A tiled, compressed GeoTIFF, BigTIFF where it may need more than 4 GiB, with overviews. Needs rasterio.

    `like`: the raster whose place on the Earth it takes, scaled to the size, and whose pixels without data have none here, too: labels then
    have their type's highest value, which is no class, pictures the nodata value of `like`, scores NaN, and the file declares it. A pixel
    of a picture that has data and this value gets the next one. `colors`: colour table of labels.
    """

    def __init__(self, path: Path | str, *, like: Raster | None = None, colors: Sequence[tuple[int, int, int]] = ()) -> None:
        super().__init__(path)
        self._like, self._colors = like, colors
        self._writer: GeoTiffWriter | None = None

    def _begin(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._writer = GeoTiffWriter(self._part, shape, dtype, like=self._like, colors=self._colors)

    def _write(self, top: int, band: npt.NDArray[Any], empty_HW: Mask | None) -> None:
        assert self._writer is not None
        self._writer.write(band, empty_HW)

    def _end(self) -> None:
        assert self._writer is not None
        self._writer.finish()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def open_sink(
    path: Path | str, *, like: PictureSource | None = None, classes: Sequence[ClassInfo] = (), max_pixels: int = MAX_PIXELS
) -> FileSink:
    """A sink for a file: `.npy`, a GeoTIFF (`.tif`, `.tiff`), or a picture in the format of the suffix.

    `like`: the source that is computed, whose place on the Earth and nodata a GeoTIFF takes. `classes`: give labels their colours.
    `max_pixels`: limit of pictures that are collected in memory. Raises DataError for another suffix.
    """
    path = Path(path)
    colors, suffix = [entry.color for entry in classes], path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise DataError(f"cannot write {path}: the suffix must be one of {', '.join(IMAGE_SUFFIXES)}")
    if suffix in (".tif", ".tiff"):
        return GeoTiffSink(path, like=raster_of(like), colors=colors)
    return NpySink(path) if suffix == ".npy" else EncodedSink(path, colors, max_pixels=max_pixels)
