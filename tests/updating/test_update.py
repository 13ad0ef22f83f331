"""Updates from beginning to end: accepted, poisoned, with a class that gets worse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import DataError, RecipeError
from muntin.tasks.classes import ClassSpec
from muntin.training import Checkpoint
from muntin.updating.update import (
    PushRecord,
    UpdateResult,
    newest_accepted,
    read_push,
    update_config,
    update_folders,
    update_run,
    write_push,
)
from muntin.updating.versions import publish
from products import UPDATE, copy_of, product

LOOSE = ["update.accept.max_slowdown=50"]  # other programs may run meanwhile
pytestmark = pytest.mark.usefixtures("fixed_sizes")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an accepted update, of this module's own."""
    return copy_of(product("updated") / "run", tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def accepted(own_run: Path) -> UpdateResult:
    """The update, as after a kill: it is not made again."""
    return update_run(own_run, product("updated") / "new", overrides=UPDATE, threads=1)


def test_accepted_update(accepted: UpdateResult, own_run: Path, tmp_path: Path) -> None:
    verdict = accepted.verdict
    assert accepted.accepted and verdict is not None and accepted.artifact is not None, verdict
    assert accepted.directory == own_run / "updates" / "1" == newest_accepted(own_run)
    names = [check.name for check in verdict.checks]
    assert {"loss on old data", "loss of 'roof' on old data", "gain on new data", "problems of verification"} <= set(names)
    assert verdict.artifact == accepted.artifact.digest and verdict.old_pictures >= 2
    assert re.match(r"accepted: old data [01]\.\d{3} -> ", verdict.summary)
    version, copied = publish(accepted.artifact, verdict, tmp_path / "versions")
    assert version == "1" and copied.manifest.measured["update"]["data"] == verdict.data  # type: ignore[index, call-overload]
    assert publish(accepted.artifact, verdict, tmp_path / "versions")[0] == "1"  # as after a kill
    with pytest.raises(DataError, match="not accepted by the gate"):
        publish(accepted.artifact, verdict.model_copy(update={"accepted": False}), tmp_path / "versions")


@pytest.mark.slow
def test_poisoned_and_worse_updates_are_refused(accepted: UpdateResult, own_run: Path, write_new: Callable[..., Path]) -> None:
    poisoned = update_run(own_run, write_new("poison", seed=1500, relabel={1: 2, 2: 1}), overrides=[*LOOSE, "update.share=0.1"], threads=1)
    assert not poisoned.accepted and poisoned.verdict is not None and poisoned.directory.name == "2"
    assert "swapped labels in new data" in [check.name for check in poisoned.verdict.failed]
    assert poisoned.parent.path.parent.parent.name == "1"  # the accepted update goes on
    changes = [*LOOSE, "update.share=0.5", "update.learning_rate=0.01", "update.strategy=naive", "update.accept.max_relabel_gain=1"]
    worse = update_run(own_run, write_new("worse", seed=1800, relabel={2: 0}), overrides=changes, threads=1)  # roofs are not drawn
    assert not worse.accepted and worse.verdict is not None
    assert "loss of 'roof' on old data" in [check.name for check in worse.verdict.failed]
    assert newest_accepted(own_run).name == "1" and [folder.name for folder in update_folders(own_run)] == ["1", "2", "3"]


def test_repeated_update_is_not_made_again(own_run: Path, write_new: Callable[..., Path]) -> None:
    folder = write_new("again", seed=2500)
    first = update_run(own_run, folder, overrides=[*LOOSE, "update.share=0.02", "update.accept.max_drop=0"], threads=1)
    times = {path: path.stat().st_mtime_ns for path in first.directory.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    if first.accepted:  # it would be the next update's parent
        write_push(PushRecord(url="http://127.0.0.1:1", version="9", serves=False, reason="rolled back"), first.directory)
        assert newest_accepted(own_run) != first.directory and read_push(first.directory) is not None
    again = update_run(own_run, folder, overrides=[*LOOSE, "update.share=0.02", "update.accept.max_drop=0"], threads=1)
    assert again.directory == first.directory and again.verdict == first.verdict
    unchanged = [
        path for path, time in times.items() if path.suffix in (".safetensors", ".json", ".png") and path.stat().st_mtime_ns == time
    ]
    assert {"verdict.json", "manifest.json", "listing.json", "checkpoint.json"} <= {path.name for path in unchanged}


def test_new_class_that_no_held_out_picture_shows(own_run: Path, write_new: Callable[..., Path]) -> None:
    added = (ClassSpec(name="tree", value=9),)
    result = update_run(own_run, write_new("none", seed=3000), added=added, overrides=[*LOOSE, "update.share=0.02"], threads=1)
    assert result.verdict is not None and not result.accepted
    (check,) = [check for check in result.verdict.failed if "tree" in check.name]
    assert "add pictures" in check.note


def test_joint_needs_all_old_pictures(accepted: UpdateResult, own_run: Path, write_new: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"updates/1 is an update, which keeps a part .* by RUN/checkpoints"):
        update_run(own_run, write_new("joint", seed=3500), overrides=["update.strategy=joint"], threads=1)


def test_other_sections_cannot_be_set(parent: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=r"only update\.KEY=VALUE"):
        update_config(parent.recipe, ["training.steps=3"])
    assert update_config(parent.recipe, ["update.accept.max_drop=0.5"]).accept.max_drop == 0.5


def test_damaged_record(tmp_path: Path) -> None:
    record: Any = read_push(tmp_path)
    assert record is None
    (tmp_path / "pushed.json").write_text("{}")
    with pytest.raises(DataError, match=r"pushed\.json: damaged"):
        read_push(tmp_path)
