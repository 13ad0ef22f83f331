"""PNG files with bit depths that Pillow does not write, and rasters."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def write_png() -> Callable[..., None]:
    """`write_png(path, width=..., height=..., depth=..., kind=..., rows=...)`: `kind` is PNG's colour type, `rows` unfiltered."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def write(path: Path, *, width: int, height: int, depth: int, kind: int, rows: bytes) -> None:
        head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))

    return write


@pytest.fixture(scope="session")
def write_raster() -> Callable[..., None]:
    """`write_raster(path, pixels_HWC, crs=..., transform=..., nodata=...)`: a TIFF in tiles of 64 pixels, or JPEG 2000 by its suffix."""
    rasterio = pytest.importorskip("rasterio", reason="the extra `raster` is not installed")

    def write(path: Path, pixels_HWC: np.ndarray[Any, Any], **options: Any) -> None:
        height, width, count = pixels_HWC.shape
        if path.suffix == ".jp2":
            layout: dict[str, Any] = {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}
        else:
            layout = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rasterio, about files without a place on the Earth
            size = {"height": height, "width": width, "count": count, "dtype": pixels_HWC.dtype}
            with rasterio.open(path, "w", **size, **layout, **options) as dataset:
                dataset.write(pixels_HWC.transpose(2, 0, 1))

    return write
