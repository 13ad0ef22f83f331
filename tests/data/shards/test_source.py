from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muntin.data import (
    Augmentation,
    ClassSpec,
    Crops,
    DataConfig,
    FolderPair,
    FolderSource,
    open_source,
    prefetch,
    write_shards,
)
from muntin.data.recipe_wizard import write_recipe
from muntin.data.source import SPLITS
from muntin.errors import DataError
from muntin.images import encode_png, write_image
from muntin.training import load_recipe
from own_sources import folder_source, shard_source

CLASSES = (ClassSpec(name="sea", value=7), ClassSpec(name="land", value=9))


def scene(number: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.uint8]]]:
    generator = np.random.default_rng(number)
    image = generator.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
    return image, generator.choice(np.array([7, 9, 255], np.uint8), image.shape[:2])


@pytest.fixture
def folders(tmp_path: Path) -> FolderSource:
    """Eight pictures with masks in folders."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(8):
        image, mask = scene(number)
        write_image(tmp_path / "images" / f"{number}.a.png", image)
        write_image(tmp_path / "masks" / f"{number}.a.png", mask)
    base = FolderPair(images=tmp_path / "images", masks=tmp_path / "masks")
    return folder_source(base=base, validation=0.2, test=0.2, classes=CLASSES, seed=3)


def write_entries(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def picture() -> bytes:
    return encode_png(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def classified(path: Path, labels: Sequence[str]) -> Path:
    entries = [(f"{number:03d}", label) for number, label in enumerate(labels)]
    return write_entries(
        path, {f"{key}.{end}": data for key, label in entries for end, data in (("png", picture()), ("cls", label.encode()))}
    )


def test_written_shards_equal_the_folders(tmp_path: Path, folders: FolderSource) -> None:
    paths = write_shards(folders, tmp_path / "shards", shard_mib=0)
    assert [path.name for path in paths["validation"]][:1] == ["validation-000000.tar"]
    assert {path.name for shards in paths.values() for path in shards} | {"classes.json"} == {
        path.name for path in (tmp_path / "shards").iterdir()
    }
    shards = shard_source(
        base=tmp_path / "shards" / "train-*.tar", validation=tmp_path / "shards" / "validation-*.tar", test=paths["test"][0]
    )
    assert shards.check() == ()
    assert (shards.task, shards.classes, shards.notes) == ("segment", folders.classes, ())
    for name in SPLITS:
        one, other = folders.split(name), shards.split(name)
        assert list(one.sizes()) == list(other.sizes())
        for sample, packed in zip(one, other, strict=True):
            assert packed.name == sample.name.replace(".", "_")  # webdataset ends a key at the first dot
            np.testing.assert_array_equal(sample.image, packed.image)
            np.testing.assert_array_equal(sample.labels, packed.labels)


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_batches_with_any_number_of_workers(tmp_path: Path, folders: FolderSource, cache_mib: int) -> None:
    """A run that is stopped at any step sees the same batches afterwards, from folders and from shards."""
    write_shards(folders, tmp_path / "shards")

    def crops() -> Crops:
        data = {"source": "shards", "images": "train-*.tar", "validation": {"images": "validation-*.tar"}, "test": {"images": "test-*.tar"}}
        source = open_source(DataConfig.model_validate({**data, "cache_mib": cache_mib}), task="segment", root=tmp_path / "shards")
        return Crops(source.split("train"), task="segment", crop=24, batch_size=3, seed=5, augmentation=Augmentation(), rare=0.5)

    reference = Crops(folders.split("train"), task="segment", crop=24, batch_size=3, seed=5, augmentation=Augmentation(), rare=0.5)
    expected = [reference.batch(step) for step in range(6)]
    for stop in range(6):
        batches = [*prefetch(crops().batch, 0, stop, workers=1 + stop % 3), *prefetch(crops().batch, stop, 6, workers=3)]
        assert [step for step, _ in batches] == list(range(6))
        assert all(
            torch.equal(a, b) for (_, batch), other in zip(batches, expected, strict=True) for a, b in zip(batch, other, strict=True)
        )


def test_shares_of_the_entries(tmp_path: Path) -> None:
    classified(tmp_path / "a.tar", ["0", "1", "1"] * 4)
    source = shard_source(base=tmp_path, validation=0.3, test=0.3, seed=1)
    assert [entry.name for entry in source.classes] == ["class-0", "class-1"]
    names = [[sample.name for sample in source.split(name)] for name in SPLITS]
    assert sorted(name for split in names for name in split) == [f"{number:03d}" for number in range(12)]
    classified(tmp_path / "b.tar", ["0"] * 3)  # more entries move no others
    again = shard_source(base=tmp_path, validation=0.3, test=0.3, seed=1)
    for name, before in zip(SPLITS, names, strict=True):
        assert [sample.name for sample in again.split(name)][: len(before)] == before


@pytest.mark.parametrize(
    ("labels", "given", "listed", "names", "numbers"),
    [
        (["dog", "cat", "dog"], (), None, ["cat", "dog"], [1, 0, 1]),
        (["2", "0", "1"], (), ["a", "b", "c"], ["a", "b", "c"], [2, 0, 1]),
        (["dog", "1", "dog"], ("dog", "cat"), ["a", "b", "c"], ["dog", "cat"], [0, 1, 0]),
    ],
)
def test_classes_of_shards(
    tmp_path: Path, labels: list[str], given: tuple[str, ...], listed: list[str] | None, names: list[str], numbers: list[int]
) -> None:
    if listed is not None:
        (tmp_path / "classes.json").write_text(json.dumps(listed))
    path = classified(tmp_path / "a.tar", labels)
    for name in "bc":
        (tmp_path / f"{name}.tar").write_bytes(path.read_bytes())
    source = shard_source(
        base=path, validation=tmp_path / "b.tar", test=tmp_path / "c.tar", classes=[ClassSpec(name=name) for name in given]
    )
    assert [entry.name for entry in source.classes] == names
    assert [sample.target for sample in source.split("train")] == numbers


def test_entries_that_cannot_be_used(tmp_path: Path) -> None:
    mask = encode_png(np.zeros((12, 12), np.uint8))
    entries = {
        "a.png": picture(), "a.mask.png": mask, "b.png": picture(), "b.SEG.PNG": mask, "c.png": picture()[:60], "c.mask.png": mask,
        "d.png": picture(), "e.png": picture(), "e.jpg": picture(), "e.mask.png": mask, "f.mask.png": mask, "g.json": b"{}", ".x.png": b"",
    }  # fmt: skip
    shard = write_entries(tmp_path / "a.tar", entries)
    validation, test = (write_entries(tmp_path / name, {"a.png": picture(), "a.mask.png": mask}) for name in ("b.tar", "c.tar"))
    classes = [ClassSpec(name="sea"), ClassSpec(name="land")]
    options: dict[str, Any] = {"base": shard, "validation": validation, "test": test, "classes": classes}
    source = shard_source(**options)
    with pytest.raises(DataError) as error:
        source.check()
    text = str(error.value)
    assert text.startswith(f"{shard}/e.png and e.jpg have the same key: rename or remove one; 3 pictures cannot be used, also ")
    assert "a.tar/d.png (no mask)" in text and "a.tar/c.png" in text
    assert source.notes == ("1 key without a picture, not used: f", "1 file of other kinds, not used: .json")
    skip = [shard / "e.jpg", shard / "d.png", shard / "c.mask.png"]
    left = shard_source(**options, skip=skip, root=tmp_path)
    assert left.check() == ("no training picture holds land: a model cannot learn what it does not see",)
    assert [sample.name for sample in left.split("train")] == ["a", "b", "e"]
    assert left.notes[-1] == "left out by data.skip: a.tar/e.jpg, a.tar/d.png, a.tar/c.mask.png"
    only = shard_source(**options, skip=skip[:2])
    with pytest.raises(DataError, match=r"a.tar/c.png is damaged or cut off.*, or name it under data.skip"):
        only.check()


def test_refused_sources_of_shards(tmp_path: Path) -> None:
    shard = classified(tmp_path / "a.tar", ["0", "1", "5"])
    for options, says in (
        ({"base": tmp_path / "none"}, "the folder .*none does not exist"),
        ({"base": tmp_path / "b*.tar"}, "holds no shards: name a folder of .tar files"),
        ({"base": shard, "validation": shard}, "a.tar is in the train and in the validation split"),
        ({"base": shard, "validation": 0.001}, "the validation split of the 3 pictures in .*a.tar is empty"),
        ({"base": shard, "classes": [ClassSpec(name="a"), ClassSpec(name="b")]}, "has the class '5', none of a, b: correct 002.cls"),
    ):
        with pytest.raises(DataError, match=says):
            shard_source(**{"validation": 0.3, "test": 0.3, "seed": 6, **options}).split("train")
    (tmp_path / "classes.json").write_text('[{"nam": 1}]')
    with pytest.raises(DataError, match=r"classes.json is no list of class names"):
        shard_source(base=shard, validation=0.3, test=0.3)


def test_refused_writing_of_shards(tmp_path: Path, folders: FolderSource) -> None:
    with pytest.raises(DataError, match="exists and is not empty"):
        write_shards(folders, tmp_path / "images")
    (tmp_path / "images" / "3.a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"3.a.png is damaged"):
        write_shards(folders, tmp_path / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]


@pytest.mark.parametrize("split", [False, True])
def test_recipe_for_shards(tmp_path: Path, folders: FolderSource, split: bool) -> None:
    shards = write_shards(folders, tmp_path / "shards")
    if not split:
        for name, paths in shards.items():
            for number, path in enumerate(paths):
                path.rename(path.with_name(f"part{name}{number}.tar"))
    path, survey = write_recipe(tmp_path / "shards")
    recipe = load_recipe(path)
    source = open_source(recipe.data, task=recipe.task, root=path.parent)
    assert (recipe.task, recipe.data.source, source.task) == ("segment", "shards", "segment")
    assert [entry.name for entry in source.classes] == ["sea", "land"]
    assert sum(survey.classes.shares) == pytest.approx(2 / 3, abs=0.05)
    assert source.check() == ()
    sizes = [len(source.split(name)) for name in SPLITS]
    assert sum(sizes) == 8 and (sizes == [len(folders.split(name)) for name in SPLITS] or not split)


def test_recipe_for_classified_shards(tmp_path: Path) -> None:
    classified(tmp_path / "train-0.tar", ["1", "0", "2", "2"])
    classified(tmp_path / "val-0.tar", ["1", "0"])
    (tmp_path / "train-1.tar").write_bytes(picture())
    with pytest.raises(DataError, match=r"train-1.tar is damaged or cut off at its start"):
        write_recipe(tmp_path)
    write_entries(tmp_path / "train-1.tar", {"x.png": picture()[:50], "x.cls": b"0"})
    path, survey = write_recipe(tmp_path)
    recipe = load_recipe(path)
    assert (recipe.task, str(recipe.data.images), recipe.data.skip) == ("classify", "train-*.tar", (Path("train-1.tar/x.png"),))
    assert survey.classes.shares == (0.4, 0.2, 0.4)
    assert open_source(recipe.data, task=recipe.task, root=tmp_path).check() == ()
