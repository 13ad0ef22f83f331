"""Sinks: bands become whole files, or none."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.artifact.classes import ClassInfo
from muntin.errors import DataError
from muntin.images import ArraySink, TooManyPixelsError, geotiff, open_sink, open_source, read_image, read_mask

Write = Callable[..., None]
CLASSES = [ClassInfo(name="sea", color=(10, 20, 200)), ClassInfo(name="land", color=(90, 160, 60))]


def labels(height: int = 90, width: int = 70, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 2, (height, width)).astype(dtype)


def photo(height: int = 90, width: int = 70, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, 3), endpoint=True).astype(dtype)


def fill(sink: Any, image: np.ndarray[Any, Any], rows: int = 37, empty: Any = None, stop: int | None = None) -> None:
    sink.begin(image.shape, image.dtype)
    for top in range(0, len(image) if stop is None else stop, rows):
        sink.write(top, image[top : top + rows].copy(), None if empty is None else empty[top : top + rows])


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_of_labels(tmp_path: Path) -> None:
    for name in ("a.png", "a.npy"):
        with open_sink(tmp_path / name, classes=CLASSES) as sink:
            fill(sink, labels())
            assert not (tmp_path / name).exists()
        np.testing.assert_array_equal(read_mask(tmp_path / name), labels())
    assert read_mask(tmp_path / "a.png", colors=True)[0, 0].tolist() == list(CLASSES[labels()[0, 0]].color)
    with open_sink(tmp_path / "deep.png", classes=CLASSES) as sink:
        fill(sink, labels(dtype=np.uint16))
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), labels())
    array = np.zeros((90, 70), np.uint16)
    fill(ArraySink(array), labels())
    np.testing.assert_array_equal(array, labels())
    with pytest.raises(DataError, match=r"an array of uint16 \(90, 70\) for a result of uint8 \(9, 70\)"):
        fill(ArraySink(array), labels(9))


def test_files_of_pictures_and_scores(tmp_path: Path) -> None:
    for name in ("a.png", "a.npy", "a.bmp"):
        with open_sink(tmp_path / name) as sink:
            fill(sink, photo())
        np.testing.assert_array_equal(read_image(tmp_path / name), photo())
    scores = photo().astype(np.float32)
    with open_sink(tmp_path / "scores.npy") as sink:
        fill(sink, scores)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy", mmap_mode="r"), scores)


@pytest.fixture
def georeferenced(tmp_path: Path, write_raster: Write) -> Path:
    rasterio = pytest.importorskip("rasterio")
    image = photo()
    image[10:30, 20:45] = 0
    transform = rasterio.Affine(0.01, 0, 7, 0, -0.02, 47)
    write_raster(tmp_path / "in.tif", image, crs="EPSG:4326", transform=transform, nodata=0)
    return tmp_path / "in.tif"


def test_geotiff_of_labels(tmp_path: Path, georeferenced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rasterio

    monkeypatch.setattr(geotiff, "BLOCK", 32)
    monkeypatch.setattr(geotiff, "_SMALLEST", 20)
    source = open_source(georeferenced)
    empty = (source[:, :] == 0).all(-1)
    with open_sink(tmp_path / "out.tif", like=source, classes=CLASSES) as sink:
        fill(sink, labels(), empty=empty)
    with rasterio.open(georeferenced) as before, rasterio.open(tmp_path / "out.tif") as after:
        assert (after.crs, after.transform, after.nodata, after.count) == (before.crs, before.transform, 255, 1)
        assert after.block_shapes == [(32, 32)] and after.compression.value == "DEFLATE"
        assert after.overviews(1) == [2, 4, 8]
        expected = np.where(empty, 255, labels())
        np.testing.assert_array_equal(after.read(1), expected)
        small = after.read(1, out_shape=(45, 35))
        assert set(np.unique(small)) == {0, 1, 255}  # the nearest label, no mean
        assert after.colormap(1)[1] == (90, 160, 60, 255)
    assert {path.name for path in tmp_path.iterdir()} == {"in.tif", "out.tif"}


@pytest.mark.parametrize("scale", [1, 2])
def test_geotiff_of_a_picture(tmp_path: Path, georeferenced: Path, scale: int) -> None:
    import rasterio

    source = open_source(georeferenced)
    empty = (source[:, :] == 0).all(-1).repeat(scale, 0).repeat(scale, 1)
    image = photo(90 * scale, 70 * scale)
    image[-1, -1] = 0
    with open_sink(tmp_path / "out.tif", like=source) as sink:
        fill(sink, image, empty=empty)
    with rasterio.open(georeferenced) as before, rasterio.open(tmp_path / "out.tif") as after:
        assert after.bounds == before.bounds and after.nodata == 0 and after.shape == (90 * scale, 70 * scale)
        pixels = after.read().transpose(1, 2, 0)
        np.testing.assert_array_equal((pixels == 0).all(-1), empty)
        np.testing.assert_array_equal(pixels[~empty], image.clip(1)[~empty])  # a black pixel with data is no pixel without


@pytest.mark.parametrize(("dtype", "count"), [(np.uint16, 3), (np.float32, 3), (np.uint8, 1), (np.uint8, 5)])
def test_geotiff_of_other_numbers(tmp_path: Path, dtype: type, count: int) -> None:
    rasterio = pytest.importorskip("rasterio")
    image = np.repeat(photo(dtype=np.uint16).astype(dtype), 2, 2)[:, :, :count]
    with open_sink(tmp_path / "out.tif") as sink:
        fill(sink, image)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(tmp_path / "out.tif") as dataset:
        np.testing.assert_array_equal(dataset.read().transpose(1, 2, 0), image)
        assert dataset.crs is None and dataset.nodata is None


@pytest.mark.parametrize("name", ["a.npy", "a.png", "a.tif"])
@pytest.mark.parametrize("size", [200, 9000])
def test_full_disk(tmp_path: Path, name: str, size: int) -> None:
    if name == "a.tif":
        pytest.importorskip("rasterio")
    (tmp_path / name).write_bytes(b"former")
    with pytest.raises(DataError, match=rf"cannot write .*{name}: .*; make room or choose another place"), full_disk(size):  # noqa: SIM117
        with open_sink(tmp_path / name) as sink:
            fill(sink, photo())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"former")]


@pytest.mark.parametrize("name", ["a.npy", "a.png", "a.tif"])
def test_interrupted_writing(tmp_path: Path, name: str) -> None:
    if name == "a.tif":
        pytest.importorskip("rasterio")
    with pytest.raises(KeyboardInterrupt), open_sink(tmp_path / name) as sink:
        fill(sink, photo(), stop=50)
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=f"{name} is not written: 37 rows were given"), open_sink(tmp_path / name) as sink:
        fill(sink, photo(), stop=37)
    assert list(tmp_path.iterdir()) == []


def test_refused_sinks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.gif: the suffix must be one of"):
        open_sink(tmp_path / "a.gif")
    with pytest.raises(TooManyPixelsError, match="more than the limit of 6,299"), open_sink(tmp_path / "a.png", max_pixels=6299) as sink:
        fill(sink, photo())
    for name in ("none/a.npy", "none/a.tif"):
        with pytest.raises(DataError, match="its folder does not exist"), open_sink(tmp_path / name) as sink:
            fill(sink, photo())
    with pytest.raises(DataError, match=r"at row 9: row 0 of \(90, 70, 3\) is next"), open_sink(tmp_path / "a.npy") as sink:
        sink.begin(photo().shape, photo().dtype)
        sink.write(9, photo()[9:])
    with pytest.raises(DataError, match="call `begin` first"), open_sink(tmp_path / "a.npy") as sink:
        sink.write(0, photo())
    (tmp_path / "a.npy").mkdir()
    with pytest.raises(DataError, match="Is a directory"), open_sink(tmp_path / "a.npy") as sink:
        fill(sink, photo())
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
