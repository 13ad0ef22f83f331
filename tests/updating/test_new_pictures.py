"""Folders of new pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.data.source import SPLITS
from muntin.errors import DataError
from muntin.images import write_image
from muntin.tasks.classes import ClassSpec
from muntin.updating.new_pictures import NewPictures, digest_of

CLASSES = tuple(ClassSpec(name=name) for name in ("a", "b", "c"))


def opened(folder: Path, **changes: Any) -> NewPictures:
    values: dict[str, Any] = {"task": "segment", "classes": CLASSES, "ignore": 255, "channels": 3, "validation": 0.2, "test": 0.3}
    return NewPictures(folder, **values | changes)


def class_pictures(folder: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            write_image(folder / name / f"{number}.png", np.full((8, 8, 3), 20 * number + len(name), np.uint8))
    return folder


def test_splits_and_digest(write_new: Callable[..., Path]) -> None:
    folder = write_new()
    first, again = opened(folder), opened(folder)
    assert [len(first.split(name)) > 0 for name in SPLITS] == [True] * 3
    digest = first.listing_digest()
    assert digest == again.listing_digest()
    masks = sorted((folder / "masks").iterdir())
    masks[0].write_bytes(masks[-1].read_bytes())
    assert opened(folder).listing_digest() != digest == first.listing_digest()


def test_known_pictures_are_left_out(write_new: Callable[..., Path]) -> None:
    folder = write_new(count=12)
    known = set(list(opened(folder).digests.values())[:4])
    rest = opened(folder, known=known)
    assert len(rest.digests) == 8 and sum(len(rest.split(name)) for name in SPLITS) == 8
    assert any("4 pictures" in note and "earlier update" in note for note in rest.notes)
    with pytest.raises(DataError, match="holds no new picture"):
        opened(folder, known=set(opened(folder).digests.values()))


def test_class_folders_may_be_absent(tmp_path: Path) -> None:
    folder = class_pictures(tmp_path / "new", a=5, b=4)
    source = opened(folder, task="classify")
    assert source.task == "classify" and [entry.name for entry in source.classes] == ["a", "b", "c"]
    class_pictures(folder, zebra=1)
    with pytest.raises(DataError, match=r"zebra are no classes .* `--class zebra` adds"):
        opened(folder, task="classify")


def test_folders_named_as_init_knows_them(write_new: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_new(count=12)
    parts = {"train": range(6), "Val": range(6, 9), "test": range(9, 12)}
    for name, numbers in parts.items():
        for kind, other in (("images", "imgs"), ("masks", "labels")):
            files = sorted((folder / kind).iterdir())
            (tmp_path / "split" / name / other).mkdir(parents=True)
            for number in numbers:
                shutil.copy(files[number], tmp_path / "split" / name / other)
    source = opened(tmp_path / "split")
    assert [len(source.split(name)) for name in SPLITS] == [6, 3, 3]
    with pytest.raises(DataError, match="Val/imgs holds no new picture"):
        opened(tmp_path / "split", known={digest_of(path) for path in (tmp_path / "split" / "Val" / "imgs").iterdir()})


def test_class_folders_in_splits(tmp_path: Path) -> None:
    class_pictures(tmp_path / "new" / "train", a=5, b=4)
    class_pictures(tmp_path / "new" / "test", c=2)
    source = opened(tmp_path / "new", task="classify")
    assert len(source.split("test")) == 2 and len(source.split("train")) + len(source.split("validation")) == 9


def test_value_of_an_unknown_class(write_new: Callable[..., Path]) -> None:
    folder = write_new(relabel={2: 5})
    with pytest.raises(DataError, match=r"holds the mask values .*5.*: `--class NAME=5` adds a class of this value"):
        opened(folder).check()


def test_unusable_folders(tmp_path: Path, write_new: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path / "none")
    (tmp_path / "half" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="no folder masks"):
        opened(tmp_path / "half")
    with pytest.raises(DataError, match="2 new pictures: at least 3 are needed"):
        opened(write_new(count=2))
