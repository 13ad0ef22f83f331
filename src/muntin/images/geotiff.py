"""GeoTIFFs written by rows, from the top down. Needs rasterio, the extra `raster`.

Axis letters: H, W rows and columns, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from muntin.errors import DependencyError, install
from muntin.images.opening import quiet_pillow, silence_libtiff
from muntin.images.rasters import CACHE_BYTES, Raster

BLOCK = 512
"""Side of a tile of the file, pixels."""
_SMALLEST = 256
"""Longest side of the smallest overview, pixels."""


class GeoTiffWriter:
    """Writes one file. Shapes, `like`, `colors` and nodata: as of `sinks.GeoTiffSink`. Raises OSError when the system refuses.

    Rows are collected to whole rows of tiles, so that each tile is compressed and written once.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, like: Raster | None, colors: Sequence[tuple[int, int, int]]
    ) -> None:
        try:
            import rasterio
        except ImportError as error:
            raise DependencyError(f"{path.name} is a GeoTIFF, which rasterio writes: {install('raster')}") from error
        self._path, self._shape, self._labels = path, shape, len(shape) == 2
        self._cache_bytes = CACHE_BYTES if like is None else like.cache_bytes
        self.nodata = _nodata(like, dtype, labels=self._labels)
        self._rows = np.empty((BLOCK, *shape[1:]), dtype)
        self._top = self._filled = 0
        count = 1 if self._labels else shape[2]
        options: dict[str, Any] = {
            "driver": "GTiff", "height": shape[0], "width": shape[1], "count": count, "dtype": dtype, "nodata": self.nodata,
            "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "bigtiff": "IF_SAFER", "compress": "deflate", "zlevel": 1,
            "interleave": "pixel", "predictor": 1 if self._labels else 3 if dtype.kind == "f" else 2,
            "photometric": "rgb" if count == 3 and dtype == np.uint8 else "minisblack",
        }  # fmt: skip
        if like is not None:
            options |= _place(like, shape[:2])
        with self._gdal(), quiet_pillow():  # its warning about files without a place on the Earth
            self._dataset: Any = rasterio.open(path, "w", **options)
        if like is not None and not self._labels:
            self._name_channels(like, count)
        if self._labels and colors and dtype.itemsize <= 2:
            with self._gdal():
                self._dataset.write_colormap(1, {number: (*color, 255) for number, color in enumerate(colors)})

    def write(self, band: npt.NDArray[Any], empty_HW: npt.NDArray[np.bool_] | None) -> None:
        """Writes the next rows."""
        if empty_HW is not None and self.nodata is not None:
            self._mark(band, empty_HW)
        while len(band):
            count = min(len(band), BLOCK - self._filled)
            self._rows[self._filled : self._filled + count] = band[:count]
            self._filled, band = self._filled + count, band[count:]
            if self._filled == BLOCK:
                self._flush()

    def finish(self) -> None:
        """Writes the last rows and the overviews, and closes the file."""
        import rasterio
        from rasterio.enums import Resampling

        self._flush()
        self.close()
        factors = [2**n for n in range(1, 32) if max(self._shape[:2]) > _SMALLEST * 2 ** (n - 1)]
        with self._gdal(), quiet_pillow():
            if factors:
                with rasterio.open(self._path, "r+", driver="GTiff") as dataset:
                    dataset.build_overviews(factors, Resampling.nearest if self._labels else Resampling.average)
            for level in (None, *range(len(factors))):
                _check_tiles(self._path, level)

    def close(self) -> None:
        """Closes the file. Idempotent."""
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            with self._gdal():
                dataset.close()

    def _flush(self) -> None:
        from rasterio.windows import Window

        if not self._filled:
            return
        rows, window = self._rows[: self._filled], Window(0, self._top, self._shape[1], self._filled)
        with self._gdal():
            self._dataset.write(rows[None] if self._labels else rows.transpose(2, 0, 1), window=window)
        self._top, self._filled = self._top + self._filled, 0

    def _mark(self, band: npt.NDArray[Any], empty_HW: npt.NDArray[np.bool_]) -> None:
        """Sets pixels without data to nodata, and moves others off this value."""
        if not self._labels and band.dtype.kind in "ui":
            highest = np.iinfo(band.dtype).max
            band[band == self.nodata] = self.nodata - 1 if self.nodata == highest else self.nodata + 1
        band[empty_HW] = self.nodata

    @contextmanager
    def _gdal(self) -> Iterator[None]:
        """GDAL's cache in bounds; its errors as OSErrors."""
        import rasterio
        from rasterio._err import CPLE_BaseError
        from rasterio.errors import RasterioError

        silence_libtiff(rasterio._io.__file__)
        try:
            with rasterio.Env(GDAL_CACHEMAX=self._cache_bytes, CPL_LOG=os.devnull):  # what GDAL prints when a file is closed
                yield
        except (RasterioError, CPLE_BaseError) as error:
            raise OSError(str(error)) from error

    def _name_channels(self, like: Raster, count: int) -> None:
        """Takes over what the channels are."""
        with like.dataset() as dataset:
            descriptions, kinds = dataset.descriptions, dataset.colorinterp
        if len(kinds) == count:
            with self._gdal():
                self._dataset.descriptions = descriptions
                self._dataset.colorinterp = kinds


def _nodata(like: Raster | None, dtype: np.dtype[Any], *, labels: bool) -> Any:
    """The value of pixels without data; None where there are none, or no value for them."""
    if like is None or not like.masked:
        return None
    if labels:
        return int(np.iinfo(dtype).max)
    if dtype != like.dtype:
        return float("nan") if dtype.kind == "f" else None
    with like.dataset() as dataset:
        value = dataset.nodata
    return value if value is None or dtype.kind == "f" else int(value)


def _place(like: Raster, size: tuple[int, ...]) -> dict[str, Any]:
    """Options that place a file of a size where a raster lies."""
    with like.dataset() as dataset:
        rows, columns = size[0] / dataset.height, size[1] / dataset.width
        points, system = dataset.gcps
        if points:
            for point in points:
                point.row, point.col = point.row * rows, point.col * columns
            return {"gcps": points, "crs": system}
        if dataset.crs is None and dataset.transform.is_identity:
            return {}
        a, b, c, d, e, f = dataset.transform[:6]
        return {"crs": dataset.crs, "transform": type(dataset.transform)(a / columns, b / rows, c, d / columns, e / rows, f)}


def _check_tiles(path: Path, level: int | None) -> None:
    """Raises OSError unless the file holds every tile of the picture or of an overview: rasterio raises no error when a file is closed.

    Assumes that all channels of a pixel lie in one tile.
    """
    import rasterio

    size = path.stat().st_size
    with rasterio.open(path, driver="GTiff", **({} if level is None else {"overview_level": level})) as dataset:
        rows, columns = (-(-side // block) for side, block in zip(dataset.shape, dataset.block_shapes[0], strict=True))
    with rasterio.open(path, driver="GTiff") as dataset:
        for place in (f"{column}_{row}" for row in range(rows) for column in range(columns)):
            start, length = (dataset.get_tag_item(f"BLOCK_{name}_{place}", "TIFF", bidx=1, ovr=level) for name in ("OFFSET", "SIZE"))
            if start is None or length is None or int(start) + int(length) > size:
                raise OSError("not all of it could be written")
