"""Large TIFFs in folders, which are read by window."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muntin.artifact import Signature
from muntin.artifact.classes import ClassInfo
from muntin.data import Augmentation, ClassSpec, Crops, FolderPair, FolderSource, prefetch, write_shards
from muntin.data.recipe_wizard import write_recipe
from muntin.errors import DataError, DependencyError
from muntin.images import rasters, write_image
from muntin.images.rasters import Raster
from muntin.runtime.host.memory import watch_memory
from muntin.training import evaluate, load_recipe
from own_sources import folder_source

rasterio = pytest.importorskip("rasterio", reason="the extra `raster` is not installed")
CLASSES = [ClassSpec(name="sea", value=3), ClassSpec(name="land", value=8)]
SIDE = 9_000


def write_raster(path: Path, pixels_HWC: np.ndarray[Any, Any], **options: Any) -> None:
    """A TIFF in tiles of 256 pixels."""
    pixels_HWC = pixels_HWC if pixels_HWC.ndim == 3 else pixels_HWC[:, :, None]
    height, width, count = pixels_HWC.shape
    layout = {"driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"} | options
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rasterio, about files without a place on the Earth
        with rasterio.open(path, "w", height=height, width=width, count=count, dtype=pixels_HWC.dtype, **layout) as dataset:
            dataset.write(pixels_HWC.transpose(2, 0, 1))


def scene(seed: int, height: int = 300, width: int = 420) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A picture, and a mask of 3, 8, 255 (ignored) and 77 (nodata)."""
    generator = np.random.default_rng(seed)
    cells = np.array([3, 8, 8, 255, 77], np.uint8)[generator.integers(0, 5, (height // 10, width // 10))]
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8), cells.repeat(10, 0).repeat(10, 1)


@pytest.fixture
def windowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also these small files are read by window."""
    monkeypatch.setattr(rasters, "WINDOWED_PIXELS", 10_000)


def write_scenes(root: Path, **options: Any) -> Path:
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        for number in range(2):
            image, mask = scene(len(split) * 10 + number)
            write_raster(root / split / "images" / f"{number}.tif", image, **options)
            write_raster(root / split / "masks" / f"{number}.tif", mask, nodata=77, **options)
    return root


def open_scenes(root: Path) -> FolderSource:
    pairs = [FolderPair(images=root / split / "images", masks=root / split / "masks") for split in ("train", "val", "test")]
    return folder_source(base=pairs[0], validation=pairs[1], test=pairs[2], classes=CLASSES)


def crops_of(source: FolderSource) -> Crops:
    return Crops(source.split("train"), task="segment", crop=64, batch_size=3, seed=1, augmentation=Augmentation(), rare=0.5)


STRIPS = {"tiled": False, "blockxsize": 420, "blockysize": 16}


@pytest.mark.parametrize("options", [{}, STRIPS, {"BIGTIFF": "YES"}, {"interleave": "band"}], ids=["tiles", "strips", "big", "bands"])
def test_batches_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """The same crops as of whole pictures, by any number of workers, and from any step on."""
    root = write_scenes(tmp_path / "data", **options)
    whole = open_scenes(root)
    assert not isinstance(whole.split("train")[0].image, Raster)
    expected = [crops_of(whole).batch(step) for step in range(4)]
    monkeypatch.setattr(rasters, "WINDOWED_PIXELS", 10_000)
    source = open_scenes(root)
    sample = source.split("train")[0]
    assert isinstance(sample.image, Raster) and isinstance(sample.target, Raster) and sample.bytes == 0
    np.testing.assert_array_equal(sample.image[:, :], whole.split("train")[0].image)
    np.testing.assert_array_equal(sample.labels[:, :], whole.split("train")[0].labels)
    assert set(np.unique(sample.labels[:, :])) == {0, 1, 255}
    assert source.check() == whole.check() == ()
    for stop in range(4):
        batches = [*prefetch(crops_of(source).batch, 0, stop, workers=1 + stop), *prefetch(crops_of(source).batch, stop, 4, workers=3)]
        for (_, (images, targets)), (same_images, same_targets) in zip(batches, expected, strict=True):
            assert torch.equal(images, same_images) and torch.equal(targets, same_targets)


class Brighter:
    """A session that answers class 1 where a pixel's first channel is above 127."""

    signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in ("sea", "land")))

    def __call__(self, images_BHWC: np.ndarray[Any, np.dtype[np.uint8]], /) -> np.ndarray[Any, np.dtype[np.float32]]:
        bright = (images_BHWC[:, :, :, 0] > 127).astype(np.float32)
        return np.stack([1 - bright, bright], axis=1)


def test_evaluation_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_scenes(tmp_path / "data")
    whole = evaluate(Brighter(), open_scenes(root).split("test"), tile=64)
    monkeypatch.setattr(rasters, "WINDOWED_PIXELS", 10_000)
    assert evaluate(Brighter(), open_scenes(root).split("test"), tile=64) == whole
    assert whole.samples == 2 and 0 < whole.counted < 2 * 300 * 420


def write_stripes(path: Path, values: list[int], count: int, height: int) -> None:
    """A raster of `SIDE` columns, which never lies in memory, of stripes of the values."""
    path.parent.mkdir(parents=True)
    layout = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", height=height, width=SIDE, count=count, dtype="uint8", **layout) as dataset:
            for number, top in enumerate(range(0, height, 512)):
                rows = min(512, height - top)
                stripe = np.full((count, rows, SIDE), values[number % len(values)], np.uint8)
                dataset.write(stripe, window=rasterio.windows.Window(0, top, SIDE, rows))


@pytest.mark.slow
def test_memory_of_a_large_raster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of 243 MB with a mask of 81 MB: a check, crops and a validation need a part of it."""
    monkeypatch.setattr(rasters, "WINDOWED_PIXELS", 1_000_000)
    monkeypatch.setattr(rasters, "CACHE_BYTES", 32 << 20)
    for split, height in (("train", SIDE), ("val", 1500), ("test", 1500)):
        write_stripes(tmp_path / split / "images" / "a.tif", [10, 200, 90], 3, height)
        write_stripes(tmp_path / split / "masks" / "a.tif", [3, 8, 8], 1, height)
    source = open_scenes(tmp_path)
    with watch_memory() as reading:
        assert source.check() == ()
        crops = Crops(source.split("train"), task="segment", crop=256, batch_size=4, seed=0, rare=0.5)
        for _, (images, _) in prefetch(crops.batch, 0, 5, workers=2):
            assert images.shape == (4, 3, 256, 256)
    with watch_memory() as validating:
        result = evaluate(Brighter(), source.split("validation"), tile=128)
    assert result.counted == 1500 * SIDE
    assert result.accuracy == pytest.approx(1024 / 1500)  # the last of three stripes is 90, and of the second class
    for watch in (reading, validating):  # 32 MiB of it are GDAL's cache
        assert watch.peak is None or watch.peak < SIDE * SIDE * 4 // 2


def test_recipe_for_rasters(tmp_path: Path, windowed: None) -> None:
    root = write_scenes(tmp_path / "data")
    path, survey = write_recipe(root)
    recipe = load_recipe(path)
    assert [entry.value for entry in recipe.data.classes] == [3, 8]
    assert (recipe.data.ignore, recipe.data.channels, recipe.data.crop) == (255, 3, 256)
    assert survey.notes == ()


def test_refused_rasters(tmp_path: Path, windowed: None) -> None:
    image, mask = scene(0)
    cases: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any], str]] = [
        (image.astype(np.uint16), mask, {}, r"holds uint16: pictures have 8 bits a channel; scale it \(gdal_translate"),
        (image[:, :, :2], mask, {}, "a.tif has 2 channels, 4 are wanted: set `channels` to 2"),
        (np.repeat(image, 2, 2), mask, {}, "a.tif has 6 channels, 4 are wanted"),
        (np.repeat(image, 2, 2)[:-1, :, :4], mask, {}, "a.tif is 420×299 and its mask .* 420×300: they must be of one size"),
        (np.repeat(image, 2, 2)[:, :, :4], mask.astype(np.float32), {}, "holds 1 channels of float32: a mask is one channel of integers"),
        (np.repeat(image, 2, 2)[:, :, :4], mask + 1, {}, r"a.tif holds the mask values 0, 4, 9, 78, allowed are 3, 8"),
    ]
    for number, (pixels, labels, options, says) in enumerate(cases):
        root = tmp_path / str(number)
        for split in ("train", "val", "test"):
            (root / split).mkdir(parents=True)
            write_raster(root / split / "images" / "a.tif", pixels, **options)
            write_raster(root / split / "masks" / "a.tif", labels)
        pairs = [FolderPair(images=root / split / "images", masks=root / split / "masks") for split in ("train", "val", "test")]
        with pytest.raises(DataError, match=says):
            folder_source(base=pairs[0], validation=pairs[1], test=pairs[2], classes=CLASSES, channels=4).check()


def test_damaged_raster(tmp_path: Path, windowed: None) -> None:
    root = write_scenes(tmp_path / "data")
    broken = root / "train" / "images" / "1.tif"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    broken.write_bytes(content)
    with pytest.raises(DataError, match=r"1.tif is damaged or cut off"):
        open_scenes(root).check()
    with pytest.raises(DataError, match="0 is a raster that is read by window, which a shard cannot hold"):
        write_shards(open_scenes(write_scenes(tmp_path / "other")), tmp_path / "shards")


def test_array_of_a_raster(tmp_path: Path, windowed: None) -> None:
    image = open_scenes(write_scenes(tmp_path / "data")).split("train")[0].image
    assert isinstance(image, Raster)
    assert (len(image), image.shape, image.ndim, image.dtype) == (300, (300, 420, 3), 3, np.uint8)
    whole = image[:, :]
    np.testing.assert_array_equal(image[290:400, -20:], whole[290:400, -20:])
    assert image[300:, 5:5].shape == (0, 0, 3)
    for use in (lambda: np.asarray(image), lambda: image[0], lambda: image[::2], lambda: image[:, :, :1]):
        with pytest.raises(TypeError, match=r"0.tif"):
            use()


def test_rasters_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_scenes(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setattr(rasters, "WINDOWED_PIXELS", 10_000)
    assert not isinstance(open_scenes(root).split("train")[0].image, Raster)  # few enough pixels to decode
    monkeypatch.setattr(rasters, "MAX_PIXELS", 100_000)
    with pytest.raises(DependencyError, match=r"0.tif has 420×300 pixels, more than are decoded at once .*\[raster\]"):
        open_scenes(root).check()


def test_nodata_of_a_class(tmp_path: Path) -> None:
    """A class of this value is learned; otherwise it is ignored."""
    root = write_scenes(tmp_path / "data")
    pairs = [FolderPair(images=root / split / "images", masks=root / split / "masks") for split in ("train", "val", "test")]
    source = folder_source(base=pairs[0], validation=pairs[1], test=pairs[2], classes=[*CLASSES, ClassSpec(name="empty", value=77)])
    assert set(np.unique(np.asarray(source.split("train")[0].target))) == {0, 1, 2, 255}


def test_upright_tiff(tmp_path: Path, windowed: None) -> None:
    """A TIFF that has to be turned is decoded as a whole."""
    from PIL import Image

    image, mask = scene(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.tif", tiffinfo={274: 6})
    write_image(tmp_path / "masks" / "a.png", np.rot90(mask, -1))
    base = FolderPair(images=tmp_path / "images", masks=tmp_path / "masks")
    with pytest.raises(DataError, match="split of the 1 pictures"):
        folder_source(base=base, validation=0.2, test=0.2, classes=CLASSES)
    assert not rasters.is_windowed(tmp_path / "images" / "a.tif")
