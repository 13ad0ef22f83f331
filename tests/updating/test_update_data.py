"""The folder of an update's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.data import open_source
from muntin.errors import DataError
from muntin.images import read_mask
from muntin.tasks.classes import ClassSpec
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.updating.new_pictures import NewPictures
from muntin.updating.update_data import (
    NEW,
    OLD,
    UpdatePlan,
    all_classes,
    of_kind,
    read_listing,
    update_data_config,
    windows_to_judge,
    write_data,
)


def plan_of(parent: Checkpoint, folder: Path, added: tuple[ClassSpec, ...] = (), **config: Any) -> UpdatePlan:
    classes = all_classes(parent, added)
    new = NewPictures(folder, task="segment", classes=classes, ignore=255, channels=3, validation=0.2, test=0.3)
    settings = parent.recipe.update.model_copy(update=config)
    return UpdatePlan(parent=parent, old=source_of(parent), new=new, config=settings, classes=classes)


def write(plan: UpdatePlan, directory: Path, relabel: Any = None) -> Any:
    """Write the data; return the source that a run opens."""
    directory.mkdir()
    write_data(plan, directory, describe=None, relabel=relabel, report=lambda stage: None)
    return open_source(update_data_config(plan.parent, plan.classes), task=plan.parent.recipe.task, root=directory)


def test_old_and_new_pictures_with_their_values(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(parent, write_new(relabel={2: 7}), (ClassSpec(name="tree", value=7),), memory=3)
    source = write(plan, tmp_path / "update")
    train = source.split("train")
    old, new = of_kind(train, OLD), of_kind(train, NEW)
    assert (len(old), len(new)) == (3, len(plan.new.split("train"))) and len(old) + len(new) == len(train)
    assert [entry.name for entry in source.classes] == ["sea", "field", "roof", "tree"]
    assert 3 in np.unique(new[0].labels[:, :]) and 2 not in np.unique(new[0].labels[:, :])
    mask = next((tmp_path / "update" / "data" / "train" / "masks").glob(f"{NEW}*"))
    assert 7 in np.unique(read_mask(mask))  # the value of the user's masks
    listing = read_listing(tmp_path / "update")
    assert listing is not None and plan.same(listing) and listing.added == ("tree",) and listing.old["train"] == 3
    assert not plan_of(parent, tmp_path / "new", (ClassSpec(name="tree", value=7),), memory=2).same(listing)


def test_background_is_relabelled_and_not_judged(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path) -> None:
    def relabel(image: Any, labels: Any, judging: bool) -> Any:
        return np.where(labels == 0, 255 if judging else 1, labels).astype(np.uint8)

    plan = plan_of(parent, write_new())
    source = write(plan, tmp_path / "update", relabel)
    assert 0 not in np.unique(of_kind(source.split("train"), NEW)[0].labels[:, :])
    assert set(np.unique(of_kind(source.split("test"), NEW)[0].labels[:, :])) <= {1, 2, 255}
    assert 0 in np.unique(of_kind(source.split("train"), OLD)[0].labels[:, :])
    listing = read_listing(tmp_path / "update")
    assert listing is not None and listing.relabelled > 1000


def test_windows_to_judge(parent: Checkpoint) -> None:
    test = source_of(parent).split("test")
    assert len(windows_to_judge(test, 24)) == 4 * len(test)
    assert sum(int(sample.labels[:, :].size) for sample in windows_to_judge(test, 20)) == 48 * 48 * len(test)


def test_class_that_exists(parent: Checkpoint) -> None:
    with pytest.raises(DataError, match="--class roof: the model has this class"):
        all_classes(parent, (ClassSpec(name="roof"),))


def test_damaged_listing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "listing.json").write_text("{}")
    with pytest.raises(DataError, match=r"damaged .* update again"):
        read_listing(tmp_path)
    assert read_listing(tmp_path / "none") is None
