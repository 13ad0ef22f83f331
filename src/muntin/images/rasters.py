"""Rasters (GeoTIFF, BigTIFF, COG, JPEG 2000) that are read by window, so that they never lie in memory as a whole.

Needs rasterio, the extra `raster`. Axis letters: H, W rows and columns, C channels.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import TiffImagePlugin

from muntin.errors import DataError, DependencyError, install
from muntin.images.opening import DAMAGE, MAX_PIXELS, PictureFile, UInt8, damaged, decoder_of, opened_file, quiet_pillow

WINDOWED_PIXELS = 1 << 24
"""Pixels (4096 x 4096) beyond which a TIFF is read by window."""
BAND_ROWS = 512
"""Rows that are read at once where a whole raster is gone through."""
CACHE_BYTES = 128 << 20
"""GDAL's cache of decoded blocks, of the process."""
_OPEN_FILES = 8
"""Files that a thread keeps open."""
_MAX_BLOCK = 1 << 26
"""Pixels of a block that is decoded at once."""
_ORIENTATION_TAG, _NODATA_TAG, _BITS_TAG, _BANDS_TAG = 0x0112, 42113, 258, 277
_PLACE_TAGS = (33550, 33922, 34264, 34735)
"""Tags of a GeoTIFF that place it on the Earth: size of a pixel, tie points, transformation, coordinate system."""
_WHOLE_BANDS = 4
"""Maximum number of channels of TIFFs that are decoded as a whole."""
RASTER_SUFFIXES = (".jp2", ".j2k")
"""Suffixes of pictures that are read only by window. TIFFs have both ways."""
_JPEG_2000 = (b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
"""First bytes of JPEG 2000: in its file format, and bare."""


@dataclass(frozen=True, kw_only=True)
class TiffHeader:
    """Tags that decide how a TIFF is read. `nodata`: the value of pixels that hold nothing, as GDAL stores it. `placed`: on the Earth."""

    height: int
    width: int
    orientation: int
    nodata: float | None
    bits: int
    bands: int
    placed: bool


def tiff_header(file: PictureFile) -> TiffHeader | None:
    """The header of a TIFF file outside a shard; None for other files, and for a header that cannot be read."""
    if not isinstance(file, Path) or file.suffix.lower() not in (".tif", ".tiff"):
        return None
    with opened_file(file) as (stream, head):
        if decoder_of(head) is not TiffImagePlugin.TiffImageFile:
            return None
        try:
            with quiet_pillow():
                tags = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if head[2:3] == b"+" or head[3:4] == b"+" else 8))
                stream.seek(tags.next)
                tags.load(stream)
            nodata = str(tags.get(_NODATA_TAG, "")).strip("\0 ")
            return TiffHeader(
                height=int(tags[TiffImagePlugin.IMAGELENGTH]), width=int(tags[TiffImagePlugin.IMAGEWIDTH]),
                orientation=int(tags.get(_ORIENTATION_TAG, 1)), nodata=float(nodata) if nodata else None,
                bits=int(np.max(tags.get(_BITS_TAG, 1))), bands=int(tags.get(_BANDS_TAG, 1)),
                placed=any(tag in tags for tag in _PLACE_TAGS),
            )  # fmt: skip
        except DAMAGE:
            return None


class OpenRasters:
    """The files that each thread keeps open, the most recently used ones: a GDAL data set must not be shared by threads."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self.cache_bytes = CACHE_BYTES
        """GDAL's cache of decoded blocks, of the process."""

    @contextmanager
    def dataset(self, path: Path) -> Iterator[Any]:
        """The open data set of a file. Damage found here or in the block is a DataError."""
        import rasterio
        from rasterio.errors import RasterioError

        datasets: OrderedDict[Path, Any] = self._threads.__dict__.setdefault("datasets", OrderedDict())
        try:
            with rasterio.Env(GDAL_CACHEMAX=self.cache_bytes, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
                if path not in datasets:
                    with quiet_pillow():  # its warning about files without a place on the Earth
                        datasets[path] = rasterio.open(path, driver="JP2OpenJPEG" if is_jpeg_2000(path) else "GTiff")
                    if len(datasets) > _OPEN_FILES:
                        datasets.popitem(last=False)[1].close()
                datasets.move_to_end(path)
                yield datasets[path]
        except RasterioError as error:
            raise damaged(path, error) from error


class Raster:
    """A picture (H, W, C) or a mask (H, W) in a file, with the `shape`, `dtype` and `ndim` of an array.

    Slices of rows and columns read that window and give an array. `convert` changes each window, such as mask values into class numbers.
    Several threads may read it. `masked`: the file marks pixels without data, by a value, an alpha channel or a mask.
    """

    def __init__(
        self,
        path: Path,
        files: OpenRasters,
        *,
        shape: tuple[int, ...],
        bands: tuple[int, ...],
        convert: Callable[[Any], UInt8] | None = None,
        dtype: npt.DTypeLike = np.uint8,
        masked: bool = False,
    ) -> None:
        self.path, self.shape, self.ndim, self.dtype, self.masked = path, shape, len(shape), np.dtype(dtype), masked
        self._files, self._bands, self._convert = files, bands, convert
        self._single = len(shape) == 2 and len(bands) == 1

    @property
    def cache_bytes(self) -> int:
        """GDAL's cache of decoded blocks. It is one for the whole process: who writes while this is read, keeps it."""
        return self._files.cache_bytes

    def dataset(self) -> AbstractContextManager[Any]:
        """The open data set, for this thread."""
        return self._files.dataset(self.path)

    def empty(self, rows: slice, columns: slice) -> npt.NDArray[np.bool_]:
        """True for pixels of a window that hold no data in any channel."""
        from rasterio.windows import Window

        (top, bottom), (left, right) = rows.indices(self.shape[0])[:2], columns.indices(self.shape[1])[:2]
        with self.dataset() as dataset, quiet_pillow():  # its warning about a file with both nodata and alpha
            mask: npt.NDArray[np.bool_] = dataset.dataset_mask(window=Window(left, top, right - left, bottom - top)) == 0
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes in memory: none."""
        return 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> UInt8:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 2 or any(not isinstance(part, slice) or part.step not in (None, 1) for part in keys):
            raise TypeError(f"{self.path}: a raster is read by slices of rows and columns")
        spans = [part.indices(size)[:2] for part, size in zip((*keys, slice(None))[:2], self.shape, strict=False)]
        (top, left), (height, width) = zip(*((start, max(0, stop - start)) for start, stop in spans), strict=True)
        with self.dataset() as dataset:
            pixels_HWC = self._read(dataset, top, left, height, width)
        return pixels_HWC if self._convert is None else self._convert(pixels_HWC)

    def __array__(self, *_: Any, **__: Any) -> UInt8:
        raise TypeError(f"{self.path} is read by window: take slices of it")

    def _read(self, dataset: Any, top: int, left: int, height: int, width: int) -> npt.NDArray[Any]:
        from rasterio.windows import Window

        pixels_HWC = np.empty((height, width, len(self._bands)), dataset.dtypes[0])
        if height * width:  # read into their places: planes would have to be transposed
            dataset.read(self._bands, window=Window(left, top, width, height), out=pixels_HWC.transpose(2, 0, 1))
        return pixels_HWC[:, :, 0] if self._single else pixels_HWC


def picture_raster(path: Path, files: OpenRasters, channels: int | None, *, deep: bool = False) -> Raster:
    """A picture to read by window; `channels` as of `read_image`. Raises DataError where values would be invented or cut.

    `deep`: allows numbers of any real type, as the file has them; else 8 bits a channel.
    """
    from rasterio.enums import MaskFlags

    with files.dataset(path) as dataset:
        _check_blocks(path, dataset)
        count, kinds = dataset.count, set(dataset.dtypes)
        if len(dataset.subdatasets) > 1:
            raise DataError(f"{path} holds {len(dataset.subdatasets)} pages, and one picture is wanted: store each in a file of its own")
        if deep and (len(kinds) > 1 or np.dtype(dataset.dtypes[0]).kind not in "uif"):
            raise DataError(f"{path} holds {', '.join(sorted(kinds))}: channels have one type of real numbers; store it in float32")
        if kinds != {"uint8"} and not deep:
            raise DataError(
                f"{path} holds {', '.join(sorted(kinds))}: pictures have 8 bits a channel; scale it (gdal_translate -ot Byte -scale), "
                "and the pictures that the model is used on in the same way"
            )
        if dataset.colorinterp[0].name == "palette":
            raise DataError(f"{path} holds indices of a palette: store its colours (gdal_translate -expand rgb)")
        size, dtype = dataset.shape, np.dtype(dataset.dtypes[0])
        masked = any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums)
    wanted = count if channels is None else channels
    bands = {(1, 3): (1, 1, 1), (2, 3): (1, 1, 1), (2, 1): (1,), (4, 3): (1, 2, 3)}.get((count, wanted), tuple(range(1, wanted + 1)))
    if wanted != count and (count, wanted) not in ((1, 3), (2, 3), (2, 1), (4, 3)):
        raise DataError(f"{path} has {count} channels, {wanted} are wanted: set `channels` to {count}")
    return Raster(path, files, shape=(*size, wanted), bands=bands, dtype=dtype, masked=masked)


def mask_raster(path: Path, files: OpenRasters, convert: Callable[[Any], UInt8] | None) -> Raster:
    """A mask to read by window: integers (H, W), or colours (H, W, 3). `convert`: makes class numbers (H, W) of them; None: as stored."""
    with files.dataset(path) as dataset:
        _check_blocks(path, dataset)
        kind, count = np.dtype(dataset.dtypes[0]), dataset.count
        if not (count == 1 and kind.kind in "ui") and not (count in (3, 4) and kind == np.uint8):
            raise DataError(f"{path} holds {count} channels of {kind}: a mask is one channel of integers, or three of uint8")
        size = dataset.shape
    bands = (1,) if count == 1 else (1, 2, 3)
    return Raster(path, files, shape=size if count == 1 or convert else (*size, 3), bands=bands, convert=convert)


def is_jpeg_2000(file: PictureFile) -> TypeGuard[Path]:
    """Return True for a JPEG 2000 file outside a shard."""
    if not isinstance(file, Path) or file.suffix.lower() not in RASTER_SUFFIXES:
        return False
    with opened_file(file) as (_, head):
        return head.startswith(_JPEG_2000)


def is_windowed(file: PictureFile) -> TypeGuard[Path]:
    """Return True for a TIFF that is read by window: a large one. Raises DependencyError for one that cannot be read in another way."""
    header = tiff_header(file)
    if header is None or (pixels := header.height * header.width) <= WINDOWED_PIXELS or header.orientation != 1:
        return False
    return _has_rasterio() or _refuse(
        f"{file} has {header.width}×{header.height} pixels, more than are decoded at once ({MAX_PIXELS:,}); to read it by window",
        pixels <= MAX_PIXELS,
    )


def raster_at(path: Path) -> bool:
    """Return `is_raster`, and False for a file that cannot be read: this is reported when it is computed."""
    try:
        return is_raster(path)
    except (DataError, DependencyError):
        return False


def is_raster(file: PictureFile) -> TypeGuard[Path]:
    """Return True for a file whose results are rasters, too: JPEG 2000, and a TIFF that is large, placed on the Earth, or has nodata, more
    than 8 bits or more than four channels. Raises DependencyError for one that cannot be read in another way.
    """
    if is_jpeg_2000(file):
        return _has_rasterio() or _refuse(f"{file} is JPEG 2000; to read it", False)
    header = tiff_header(file)
    if header is None or header.orientation != 1:
        return False
    if header.bits > 8 or header.bands > _WHOLE_BANDS:
        return _has_rasterio() or _refuse(f"{file} has {header.bands} channels of {header.bits} bits; to read it", False)
    if header.height * header.width > MAX_PIXELS or not (header.placed or header.nodata is not None):
        return is_windowed(file)
    return _has_rasterio()


def _has_rasterio() -> bool:
    try:
        import rasterio  # noqa: F401
    except ImportError:
        return False
    return True


def _refuse(problem: str, decodable: bool) -> Literal[False]:
    """Return False for a file that can be decoded as a whole. Raises DependencyError for others."""
    if decodable:
        return False
    raise DependencyError(f"{problem}, rasterio is needed: {install('raster')}")


def sampled(raster: Raster, windows: int = 4, side: int = BAND_ROWS) -> npt.NDArray[Any]:
    """The pixels of windows x windows squares at even distances, joined to one array."""
    tops, lefts = (sorted({n * max(0, size - side) // (windows - 1) for n in range(windows)}) for size in raster.shape[:2])
    return np.concatenate([np.concatenate([raster[top : top + side, left : left + side] for left in lefts], axis=1) for top in tops])


def bands(array: UInt8 | Raster, rows: int = BAND_ROWS) -> Iterator[tuple[int, UInt8]]:
    """(first row, rows) from the top down: of a raster some rows at a time, of an array all at once."""
    if not isinstance(array, Raster):
        yield 0, array
        return
    for top in range(0, len(array), rows):
        yield top, array[top : top + rows]


def _check_blocks(path: Path, dataset: Any) -> None:
    if prod(dataset.block_shapes[0]) > _MAX_BLOCK:
        raise DataError(f"{path} is one block that has to be decoded as a whole: store it in tiles (gdal_translate -co TILED=YES)")
