"""Sources: arrays, files and rasters give the same windows as the whole picture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.errors import DataError, DependencyError
from muntin.images import open_source, write_image
from muntin.images.rasters import is_raster
from muntin.images.sources import ScaledSource, raster_of, source_size

Write = Callable[..., None]
PLACE: dict[str, Any] = {"crs": "EPSG:4326"}


def photo(height: int = 100, width: int = 130, channels: int = 3, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True).astype(dtype)


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.tif", "a.jp2"])
def test_windows_of_every_kind(tmp_path: Path, write_raster: Write, name: str) -> None:
    path, image = tmp_path / name, photo()
    if name in ("a.png", "a.npy"):
        write_image(path, image)
    else:
        write_raster(path, image, **PLACE)
    source = open_source(path)
    assert (raster_of(source) is not None) == is_raster(path) == (name in ("a.tif", "a.jp2"))
    assert source.shape == image.shape and source.dtype == np.uint8 and source_size(path) == image.shape[:2]
    np.testing.assert_array_equal(source[:, :], image)
    np.testing.assert_array_equal(source[70:200, 5:90], image[70:200, 5:90])


@pytest.mark.parametrize(
    ("options", "channels", "dtype", "raster"),
    [
        ({}, 3, np.uint8, False),
        (PLACE, 3, np.uint8, True),
        ({"nodata": 0}, 3, np.uint8, True),
        ({}, 3, np.uint16, True),
        ({}, 6, np.uint8, True),
    ],
)
def test_tiffs_that_are_rasters(
    tmp_path: Path, write_raster: Write, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], channels: int, dtype: type, raster: bool
) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, photo(channels=channels, dtype=dtype), **options)
    assert is_raster(path) == raster
    monkeypatch.setitem(sys.modules, "rasterio", None)
    if dtype == np.uint16 or channels > 4:
        with pytest.raises(DependencyError, match=r"a.tif has . channels of \d+ bits; to read it, rasterio is needed: .*\[raster\]"):
            is_raster(path)
    else:
        assert not is_raster(path)  # decoded whole
        np.testing.assert_array_equal(open_source(path)[:, :], photo())


def test_turned_tiff_is_no_raster(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.tif", tiffinfo={274: 6, 42113: "0"})
    assert open_source(tmp_path / "a.tif").shape == (130, 100, 3)


@pytest.mark.parametrize("name", ["a.tif", "a.npy"])
def test_range_of_deep_pictures(tmp_path: Path, write_raster: Write, name: str) -> None:
    path, image = tmp_path / name, photo(dtype=np.uint16)
    if name == "a.npy":
        np.save(path, image)
    else:
        write_raster(path, image)
    with pytest.raises(DataError, match=r"a.* holds uint16"):
        open_source(path)
    source = open_source(path, value_range=(1000, 51_000))
    assert isinstance(source, ScaledSource) and source.dtype == np.uint8 and source.original_dtype == np.uint16
    expected = np.rint(((image.astype(np.float64) - 1000) / 50_000 * 255).clip(0, 255))
    assert np.abs(source[10:40, 3:80] - expected[10:40, 3:80]).max() <= 1
    assert np.mean(source[:, :] == expected) > 0.999
    restored = source.original(source[:, :].astype(np.float32))
    assert restored.dtype == np.uint16
    assert np.abs(restored.astype(int) - image.clip(1000, 51_000)).max() <= 99  # half of 50,000 / 255


def test_range_of_floats_and_bytes(tmp_path: Path) -> None:
    values = np.array([[[-1.0], [0.25], [np.nan], [np.inf], [-np.inf]]], np.float32)
    source = ScaledSource(values, 0, 0.5)
    assert source[:, :].ravel().tolist() == [0, 128, 0, 255, 0]
    assert source.original(np.array([0, 255, 300], np.float32)).tolist() == [0, 0.5, 0.5]
    write_image(tmp_path / "a.png", np.array([[50, 100, 200]], np.uint8))
    assert open_source(tmp_path / "a.png", 1, value_range=(50, 150))[:, :].ravel().tolist() == [0, 128, 255]


def test_refused_sources(tmp_path: Path, write_raster: Write) -> None:
    write_raster(tmp_path / "five.tif", photo(channels=5))
    write_raster(tmp_path / "complex.tif", photo(channels=1).astype(np.complex64))
    np.save(tmp_path / "one.npy", photo(channels=1, dtype=np.uint16))
    cases: list[tuple[str, Any, str]] = [
        ("five.tif", None, "five.tif has 5 channels, 3 are wanted"),
        ("complex.tif", (0, 1), "complex.tif holds complex64"),
        ("one.npy", (0, 1), r"one.npy holds uint16 of shape \(100, 130, 1\): real numbers in 3 channels"),
        ("none.tif", None, "none.tif does not exist"),
        ("one.npy", (5, 5), "a range from 5 to 5: give two numbers, the lower first"),
    ]
    for name, value_range, says in cases:
        with pytest.raises(DataError, match=says):
            open_source(tmp_path / name, 1 if value_range == (5, 5) else 3, value_range=value_range)


def test_pages_of_a_raster(tmp_path: Path) -> None:
    pages = [Image.fromarray(photo(channels=1, dtype=np.uint16)[:, :, 0])] * 2
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a.tif holds 2 pages, and one picture is wanted"):
        open_source(tmp_path / "a.tif", 1, value_range=(0, 1))


@pytest.mark.parametrize("kind", ["value", "alpha", "none"])
def test_pixels_without_data(tmp_path: Path, write_raster: Write, kind: str) -> None:
    image = photo(channels=4)
    image[20:50, 30:70] = 0
    image[0, 0, :3] = 0, 5, 0  # one channel alone has the value
    image[..., 3] = np.where((image[..., :3] == 0).all(-1), 0, 255)
    options = {
        "value": {"nodata": 0},
        "alpha": {"photometric": "rgb", "alpha": "yes"},
        "none": {"photometric": "minisblack", "alpha": "no"},
    }
    write_raster(tmp_path / "a.tif", image, **options[kind], **PLACE)
    raster = raster_of(open_source(tmp_path / "a.tif"))
    assert raster is not None and raster.masked == (kind != "none")
    if raster.masked:
        np.testing.assert_array_equal(raster.empty(slice(0, 60), slice(25, 500)), (image[:60, 25:] == 0).all(-1))
