"""Pictures of any size, read by window: arrays, files that are decoded whole, `.npy` files, and rasters.

Axis letters: H, W rows and columns, C channels.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from muntin.errors import DataError
from muntin.images.decoding import image_size, pillow_pixels, read_image
from muntin.images.opening import MAX_PIXELS, NPY_HEAD, UInt8, map_array, opened_file
from muntin.images.rasters import BAND_ROWS, CACHE_BYTES, OpenRasters, Raster, is_raster, picture_raster

_MAX_CACHE_BYTES = 512 << 20
"""Limit of GDAL's cache for a raster whose rows of blocks need more than `CACHE_BYTES`."""


class PictureSource(Protocol):
    """A picture (H, W, C) of which slices of rows and columns give windows. Arrays are sources."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, key: tuple[slice, slice], /) -> npt.NDArray[Any]: ...


AnyPicture = PictureSource | Image.Image | Path | str
"""A picture as `muntin.predict` takes it: a source, an image of Pillow, or the path of a file."""


class ScaledSource:
    """A source whose values from `low` to `high` are read as 0 to 255; values outside become 0 or 255, and NaN 0.

    `original` converts restored pixels back. Raises DataError for a range that is empty or not finite.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, source: PictureSource, low: float, high: float) -> None:
        if not (isfinite(low) and isfinite(high) and low < high):
            raise DataError(f"a range from {low} to {high}: give two numbers, the lower first, of which one becomes 0 and the other 255")
        self.source, self.low, self.high = source, low, high
        self.shape = source.shape
        self.original_dtype = source.dtype

    def __getitem__(self, key: tuple[slice, slice], /) -> UInt8:
        values = self.source[key].astype(np.float32)
        values -= np.float32(self.low)
        values *= np.float32(255 / (self.high - self.low))
        np.nan_to_num(values, copy=False, nan=0, posinf=255, neginf=0)
        return np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8)

    def original(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Numbers from 0 to 255 as values of the source, in its type. Those outside become the ends of the range."""
        values: npt.NDArray[Any] = pixels.clip(0, 255).astype(np.float32 if self.original_dtype.itemsize <= 2 else np.float64)
        values *= (self.high - self.low) / 255
        values += self.low
        if self.original_dtype.kind != "f":
            limits = np.iinfo(self.original_dtype)
            np.rint(values, out=values).clip(limits.min, limits.max, out=values)
        return values.astype(self.original_dtype)


def open_source(
    path: Path | str, channels: int | None = 3, *, max_pixels: int = MAX_PIXELS, value_range: tuple[float, float] | None = None
) -> PictureSource:
    """Opens a picture for `muntin.predict`.

    A raster (`rasters.is_raster`: GeoTIFF, BigTIFF, COG, JPEG 2000) is read by window, whatever its size; a `.npy` file is mapped; other
    pictures are decoded, as by `read_image`. `value_range`: the values that are read as 0 and 255. It is needed for numbers that are not
    uint8, and may be given for all.

    Raises DataError as `read_image` does, for a file of other numbers than uint8 without `value_range`, and for a raster of one block.
    """
    path = Path(path)
    deep = value_range is not None
    source: PictureSource
    if is_raster(path):
        source = _opened_raster(path, channels, deep)
    elif deep and _is_npy(path):
        source = _mapped_numbers(path, channels, max_pixels)
    else:
        source = read_image(path, channels, max_pixels=max_pixels, mapped=True)
    return source if value_range is None else ScaledSource(source, *value_range)


def source_of(image: AnyPicture, channels: int | None = 3) -> PictureSource:
    """Return the source of a file (`open_source`) or of an image of Pillow; any other value is a source already."""
    if isinstance(image, Path | str):
        return open_source(image, channels)
    return pillow_pixels(image, channels) if isinstance(image, Image.Image) else image


def source_size(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a picture, from its header. Raises DataError as `image_size` does; a raster has no limit of pixels."""
    path = Path(path)
    if not is_raster(path):
        return image_size(path, max_pixels=max_pixels)
    with OpenRasters().dataset(path) as dataset:
        height, width = dataset.shape
    return height, width


def raster_of(source: PictureSource | None) -> Raster | None:
    """The raster that a source reads; None for another source."""
    if isinstance(source, ScaledSource):
        return raster_of(source.source)
    return source if isinstance(source, Raster) else None


def _opened_raster(path: Path, channels: int | None, deep: bool) -> Raster:
    files = OpenRasters()
    raster = picture_raster(path, files, channels, deep=True)
    if raster.dtype != np.uint8 and not deep:
        raise DataError(
            f"{path} holds {raster.dtype}, and models take 8 bits a channel: give the values that become 0 and 255 (`--range LOW HIGH`, in "
            "Python `value_range`), the same as for the pictures that the model was trained on"
        )
    with raster.dataset() as dataset:
        block_rows = dataset.block_shapes[0][0]
        row_bytes = block_rows * dataset.width * dataset.count * raster.dtype.itemsize
    files.cache_bytes = min(
        max(CACHE_BYTES, (1 + -(-BAND_ROWS // block_rows)) * row_bytes), _MAX_CACHE_BYTES
    )  # what a row of tiles touches
    return raster


def _is_npy(path: Path) -> bool:
    with opened_file(path) as (_, head):
        return head.startswith(NPY_HEAD)


def _mapped_numbers(path: Path, channels: int | None, max_pixels: int) -> npt.NDArray[Any]:
    """A mapped array (H, W, C) of any real numbers. Raises DataError."""
    with opened_file(path) as (stream, _):
        array = map_array(path, stream, max_pixels)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype.kind not in "uif" or channels not in (None, array.shape[2]):
        expected = "real numbers" if channels is None else f"real numbers in {channels} channels"
        raise DataError(f"{path} holds {array.dtype} of shape {array.shape}: {expected} are needed")
    return array
