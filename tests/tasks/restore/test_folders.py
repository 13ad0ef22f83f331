from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.data import FolderSource
from muntin.data.config import DataConfig, open_source, with_scale
from muntin.data.source import SPLITS
from muntin.errors import DataError
from muntin.images import read_image, write_image
from muntin.tasks.restore.degradation import reduced
from smooth_pictures import smooth_picture


def open_data(root: Path, **fields: Any) -> FolderSource:
    config = DataConfig.model_validate({"source": "folders", "validation": 0.3, "test": 0.3, "seed": 1, **fields})
    source = open_source(with_scale(config, root=root), task="restore", root=root)
    assert isinstance(source, FolderSource)
    return source


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Eight pairs, the clean pictures three times as large."""
    for number in range(8):
        clean = smooth_picture(24, 36, number)
        for folder, picture in (("images", reduced(clean, 3)), ("targets", clean)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"p{number}.png", picture)
    return tmp_path


def test_degraded_photographs(photographs: Path) -> None:
    source = open_data(photographs.parent, images="photos", degrade={"noise": 10, "scale": 2})
    assert (source.task, source.classes, sum(len(source.split(name)) for name in SPLITS)) == ("restore", (), 10)
    assert source.check() == ()
    for name in SPLITS:
        samples = source.split(name)
        for sample, size in zip(samples, samples.sizes(), strict=True):
            original = read_image(photographs / f"{sample.name}.png", 3)
            height, width = size
            assert sample.image.shape == (height, width, 3)
            np.testing.assert_array_equal(sample.clean, original[: 2 * height, : 2 * width])
            error = sample.image.astype(float) - reduced(sample.clean, 2)
            assert 7 < error.std() < 13
            assert sample.restores
            with pytest.raises(TypeError, match="clean"):
                _ = sample.labels
    (photographs / "test").mkdir()  # a folder inside that of the training pictures
    (photographs / "p0.png").rename(photographs / "test" / "p0.png")
    apart = open_data(photographs.parent, images="photos", degrade={"noise": 10, "scale": 2}, test={"images": "photos/test"})
    assert [sample.name for sample in apart.split("test")] == ["p0"] and len(apart.split("train")) + len(apart.split("validation")) == 9
    (photographs / "test" / "p0.png").rename(photographs / "p0.png")
    again = open_data(photographs.parent, images="photos", degrade={"noise": 10, "scale": 2}, cache_mib=0)
    np.testing.assert_array_equal(source.split("test")[0].image, again.split("test")[0].image)


def test_pairs_with_their_scale(pairs: Path) -> None:
    source = open_data(pairs, images="images", targets="targets")
    sample = source.split("train")[0]
    assert sample.clean.shape[0] == 3 * sample.image.shape[0]
    np.testing.assert_array_equal(sample.clean, read_image(pairs / "targets" / f"{sample.name}.png", 3))
    np.testing.assert_array_equal(sample.image, read_image(pairs / "images" / f"{sample.name}.png", 3))
    assert sample.degradation is None


def test_own_folders_of_splits(pairs: Path, photographs: Path) -> None:
    own = {"images": "photos", "targets": "photos"}
    fields = {"images": "images", "targets": "targets", "scale": 3}
    with pytest.raises(DataError, match="in two splits"):
        open_data(pairs, **fields, validation={"images": "images", "targets": "targets"})
    with pytest.raises(DataError, match="exactly where"):
        open_data(pairs, **fields, validation={"images": "photos"})
    source = open_data(pairs, **fields, validation=own)
    assert len(source.split("validation")) == 10
    for folder in ("images", "targets"):
        (pairs / folder / "2024").mkdir()
        (pairs / folder / "p3.png").rename(pairs / folder / "2024" / "p0.png")
    nested = open_data(pairs, **{**fields, "seed": 2}, validation=own)
    assert {sample.name for name in ("train", "test") for sample in nested.split(name)} == {
        "2024/p0",
        *(f"p{number}" for number in range(8) if number != 3),
    }


def test_unpaired_and_unequal_pictures(pairs: Path) -> None:
    (pairs / "targets" / "p0.png").unlink()
    write_image(pairs / "targets" / "extra.png", smooth_picture(9, 9))
    source = open_data(pairs, images="images", targets="targets")
    assert any("extra.png" in note for note in source.notes)
    with pytest.raises(DataError, match=r"p0\.png has no clean picture"):
        source.check()
    skipped = open_data(pairs, images="images", targets="targets", skip=["images/p0.png"])
    assert skipped.check() == ()
    write_image(pairs / "targets" / "p1.png", smooth_picture(24, 35))
    with pytest.raises(DataError, match="must be 36×24"):
        open_data(pairs, images="images", targets="targets", skip=["images/p0.png"], scale=3).check()
    write_image(pairs / "targets" / "p1.png", smooth_picture(12, 35))
    with pytest.raises(DataError, match="1 to 4 times"):
        open_data(pairs, images="images", targets="targets")


def test_damaged_and_tiny_photographs(photographs: Path) -> None:
    (photographs / "p3.png").write_bytes(b"no picture")
    write_image(photographs / "tiny.png", np.zeros((1, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"p3|tiny") as error:
        open_data(photographs.parent, images="photos", degrade={"scale": 2}).check()
    assert "2 pictures" in str(error.value) or "tiny" in str(error.value)
    assert "data.skip" in str(error.value)
