"""The loop from labelled pictures to versions, killed between its parts."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from muntin.errors import DataError
from muntin.updating import update as updates
from muntin.updating.watch import FolderWatch, WatchedUpdate, WatchSettings, _copy, keep_watching
from products import copy_of

QUICK = ("update.share=0.02", "update.accept.max_slowdown=50", "update.accept.max_drop=1", "update.accept.min_gain=-1")


pytestmark = pytest.mark.usefixtures("fixed_sizes")


def make_watch(run: Path, tmp_path: Path, every: int = 12) -> FolderWatch:
    own = copy_of(run, tmp_path)
    folder = tmp_path / "arriving"
    folder.mkdir()
    return FolderWatch(own, folder, WatchSettings(every=every, overrides=QUICK, threads=1), None)


def test_pictures_count_when_they_are_complete(run: Path, tmp_path: Path, write_scenes: Callable[..., None]) -> None:
    watch = make_watch(run, tmp_path, every=5)
    assert watch.waiting() == 0 and watch.step() is None
    write_scenes(watch.folder, "a", 6, 900)
    assert watch.waiting() == 0  # they may still be written
    assert watch.waiting(now=time.time() + 10) == 6
    (watch.folder / "masks" / "a-0.png").unlink()
    assert watch.waiting(now=time.time() + 10) == 5
    with pytest.raises(DataError, match="no such folder"):
        FolderWatch(watch.run, tmp_path / "none", watch.settings, None)
    for kind in ("images", "masks"):
        (watch.folder / kind).rename(watch.folder / kind.title())
    assert watch.waiting(now=time.time() + 10) == 5
    shutil.copytree(watch.folder, tmp_path / "whole" / "train")
    with pytest.raises(DataError, match="a watch makes its own"):
        FolderWatch(watch.run, tmp_path / "whole", watch.settings, None)


def test_links_are_left_out(run: Path, tmp_path: Path, write_scenes: Callable[..., None]) -> None:
    """Who may put pictures into the folder cannot have other files of the machine copied."""
    watch = make_watch(run, tmp_path, every=1)
    write_scenes(tmp_path / "elsewhere", "a", 2, 900)
    write_scenes(watch.folder, "b", 1, 910)
    for kind in ("images", "masks"):
        (watch.folder / kind / "a-0.png").symlink_to(tmp_path / "elsewhere" / kind / "a-0.png")
        (watch.folder / kind / "site").symlink_to(tmp_path / "elsewhere" / kind)
    assert watch.links() == 3 and watch.waiting(now=time.time() + 10) == 1
    assert watch._collect(time.time() + 10) == 1
    assert [path.name for path in (watch.inbox / "1" / "images").rglob("*.png")] == ["b-0.png"]
    (watch.folder / "masks" / "b-0.png").unlink()
    (watch.folder / "masks" / "b-0.png").symlink_to(tmp_path / "elsewhere" / "masks" / "a-0.png")
    with pytest.raises(OSError, match="b-0"):
        _copy(watch.folder / "masks" / "b-0.png", tmp_path / "copy.png")


def test_rounds_and_kills(run: Path, tmp_path: Path, write_scenes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    watch = make_watch(run, tmp_path)
    write_scenes(watch.folder, "a", 12, 900)
    for kind in ("images", "masks"):
        (watch.folder / kind / "site").mkdir()
        (watch.folder / kind / "a-1.png").rename(watch.folder / kind / "site" / "a-1.png")
    later = time.time() + 10

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("muntin.updating.watch.offer_update", killed)
        watch.step(now=later)
    assert len([*(watch.inbox / "1").rglob("*.png")]) == 24 and (watch.inbox / "1" / "masks" / "site" / "a-1.png").is_file()
    assert not (watch.inbox / "1" / "done.json").exists() and (watch.run / "updates" / "1" / "verdict.json").is_file()
    write_scenes(watch.folder, "b", 3, 1200)
    edited = watch.folder / "images" / "a-0.png"
    edited.write_bytes((watch.folder / "images" / "b-0.png").read_bytes())  # in place: the round has copies
    again = FolderWatch(watch.run, watch.folder, watch.settings, None)
    done = again.step(now=later)
    assert done is not None and done.result is not None and done.result.accepted and done.version == watch.run / "versions" / "1"
    assert json.loads((watch.inbox / "1" / "done.json").read_text())["update"] == "1"
    assert [path.name for path in updates.update_folders(watch.run)] == ["1"]
    later = time.time() + 10
    assert again.waiting(now=later) == 3 and again.step(now=later) is None
    write_scenes(watch.folder, "c", 9, 1500)
    told: list[WatchedUpdate] = []
    for path in watch.folder.rglob("*.png"):
        os.utime(path, (0, 0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("muntin.updating.update.export_checkpoint", killed)
        again.step()
    changed = replace(watch.settings, overrides=(*QUICK, "update.memory=9"))
    keep_watching(FolderWatch(watch.run, watch.folder, changed, None), tell=told.append, rounds=1)
    assert [update.number for update in told] == [2] and told[0].result is not None
    assert told[0].result.directory.name == "3" and not (watch.run / "updates" / "2" / "verdict.json").exists()
    assert told[0].result.parent.path.parent.parent.resolve() == (watch.run / "updates" / "1").resolve()


def test_unusable_pictures_are_dropped_alone(run: Path, tmp_path: Path, write_scenes: Callable[..., None]) -> None:
    watch = make_watch(run, tmp_path, every=3)
    write_scenes(watch.folder, "a", 3, 900)
    damaged, sound = watch.folder / "images" / "a-0.png", (watch.folder / "images" / "a-0.png").read_bytes()
    damaged.write_bytes(b"no picture")
    later = time.time() + 10
    verdict = watch.run / "updates" / "1" / "verdict.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text("{}")
    with pytest.raises(DataError, match=r"verdict\.json: damaged"):  # no fault of the pictures
        watch.step(now=later)
    verdict.unlink()
    update = watch.step(now=later)
    assert update is not None and update.result is None and "2 new pictures: at least 3" in update.problem
    assert len(update.dropped) == 1 and "a-0.png" in update.dropped[0] and update.number == 1
    assert watch.waiting(now=later) == 2 and watch.step(now=later) is None  # the others wait for more
    write_scenes(watch.folder, "b", 2, 1200)
    later = time.time() + 10
    (watch.folder / "masks" / "b-0.png").write_bytes(b"no mask")
    done = watch.step(now=later)
    assert done is not None and done.number == 2 and done.result is not None and len(done.dropped) == 1
    assert len([*(watch.inbox / "2" / "images").iterdir()]) == 3 and watch.waiting(now=later) == 0
    damaged.write_bytes(sound)
    assert watch.waiting(now=time.time() + 10) == 1
