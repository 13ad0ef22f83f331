"""Listing versions, and the watcher that loads new ones."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact.store import MANIFEST
from muntin.errors import ArtifactError
from muntin.serving.versions.repository import PAUSE_S, Repository, Watcher, fingerprint
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import UnknownVersionError
from muntin.serving.worker.opening import TookTooLongError

HOSTILE = (
    *("../1", "..", ".", "", "/etc", "1/", "1/../2", "1\0", "1 ", " 1", "1\n"),
    *("01", "+1", "-1", "1.0", "1e0", "\u0661", "\uff11", "9" * 19),
)
"""Names that are no version's, though some are a path, or a number to other programs."""
Write = Callable[..., Path]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def slot(shelf: Any, clock: Any) -> Slot:
    return Slot("model", shelf, rollout=Rollout(), clock=clock)


@pytest.fixture
def watcher(models: Path, slot: Slot, lines: list[str], clock: Any) -> Watcher:
    return Watcher(Repository(models), slot, notify=lines.append, clock=clock)


def serving(slot: Slot) -> str | None:
    return None if slot.current is None else slot.current.name


def copy_to(source: Path, target: Path, *names: str) -> None:
    """Copy some files of an artefact, as a copy in progress has."""
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)


# ---- listing ----


def test_single_artefact(write_version: Any, tmp_path: Path) -> None:
    path = write_version(tmp_path / "a")
    assert Repository(path).scan() == {"1": path}
    assert Repository(str(path)).find("1") == path


def test_numbered_folders(models: Path) -> None:
    for name in ("2", "10", "1", "01", "x", ".3.ab12.partial", "0"):
        (models / name).mkdir()
    (models / "4").write_text("a file")
    repository = Repository(models)
    assert list(repository.scan().items()) == [(name, models / name) for name in ("1", "2", "10")]
    ignored = repository.listing()[1]
    assert set(ignored) == {"01", "x", "0"}
    assert "no whole number from 1" in ignored["x"]


def test_hostile_names(models: Path) -> None:
    for name in HOSTILE:
        if name not in ("", ".", "..") and "/" not in name and "\0" not in name:
            (models / name).mkdir()
    (models / "1").mkdir()
    repository = Repository(models)
    assert repository.scan() == {"1": models / "1"}
    for name in HOSTILE:
        with pytest.raises(UnknownVersionError, match=r"no version .*: there is 1") as caught:
            repository.find(name)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.name != "posix", reason="links need no privilege on POSIX")
def test_links(models: Path) -> None:
    (models.parent / "models-elsewhere").mkdir()
    (models / ".store").mkdir()
    for name, target in (("1", models.parent / "models-elsewhere"), ("2", ".."), ("3", ".store"), ("4", "4"), ("5", "nowhere")):
        (models / name).symlink_to(target)
    repository = Repository(models)
    assert list(repository.scan()) == ["3"]
    ignored = repository.listing()[1]
    assert set(ignored) == {"1", "2"}
    assert "leads out of the directory" in ignored["1"]


def test_missing_directory(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such directory"):
        Repository(tmp_path / "nowhere")
    repository = Repository(models)
    models.rmdir()
    with pytest.raises(ArtifactError, match="cannot be listed"):
        repository.scan()


def test_fingerprint(write_version: Any, tmp_path: Path) -> None:
    path = write_version(tmp_path / "1")
    first = fingerprint(path)
    assert first == fingerprint(path)
    data, status = (path / MANIFEST).read_bytes(), (path / MANIFEST).stat()
    (path / MANIFEST).write_bytes(data.swapcase())
    os.utime(path / MANIFEST, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times does
    assert fingerprint(path) != first


# ---- watching ----


def test_newest_version_is_loaded(watcher: Watcher, write_version: Any, models: Path, slot: Slot, lines: list[str]) -> None:
    assert watcher.step() is None
    for name in ("1", "2", "10"):
        write_version(models / name)
    assert watcher.step() == "10"
    assert watcher.step() is None
    write_version(models / "9")
    assert watcher.step() is None
    write_version(models / "11")
    assert watcher.step() == serving(slot) == "11"
    assert lines == []


def test_broken_version(watcher: Watcher, write_version: Any, models: Path, shelf: Any, lines: list[str]) -> None:
    write_version(models / "1")
    (write_version(models / "2") / "model.onnx").write_bytes(b"altered")
    assert watcher.step() == "1"
    for _ in range(4):
        assert watcher.step() is None
    assert len(lines) == 1
    assert lines[0].startswith("version 2 is not loaded: ")
    assert "model.onnx: its content is not what" in lines[0]
    assert shelf.tried == ["1"]
    write_version(models / "2")
    assert watcher.step() == "2"


def test_version_that_fails_to_open(watcher: Watcher, write_version: Any, models: Path, shelf: Any, lines: list[str]) -> None:
    for name in ("1", "2", "3"):
        write_version(models / name)
    shelf.trouble = {"3": ArtifactError("3: its engine ended the process")}
    assert watcher.step() == "2"
    for _ in range(3):
        assert watcher.step() is None
    assert lines == ["version 3 is not loaded: 3: its engine ended the process"]
    assert shelf.tried == ["3", "2"]
    shelf.trouble = {}
    write_version(models / "3", 1)
    assert watcher.step() == "3"


def test_version_that_takes_too_long(watcher: Watcher, models: Path, write_version: Any, clock: Any, shelf: Any, lines: list[str]) -> None:
    for name in ("1", "2"):
        write_version(models / name)
    shelf.trouble = {"2": TookTooLongError("2: it was not open in time")}
    assert watcher.step() == "1"
    for _ in range(2):
        assert lines.pop() == "version 2 is not loaded: 2: it was not open in time"
        clock.now += PAUSE_S - 1
        assert watcher.step() is None
        assert lines == []
        clock.now += 1
        assert watcher.step() is None
    shelf.trouble = {}
    write_version(models / "2", 1)
    assert watcher.step() == "2"
    assert shelf.tried == ["2", "1", "2", "2", "2"]


def test_copy_in_progress(watcher: Watcher, write_version: Any, models: Path, lines: list[str]) -> None:
    whole = write_version(models.parent / "whole")
    files = sorted(entry.name for entry in whole.iterdir())
    for count in range(len(files)):
        copy_to(whole, models / "1", *files[:count])
        assert watcher.step() is None
    (models / "1" / files[-1]).write_bytes((whole / files[-1]).read_bytes()[:-1])
    assert watcher.step() is None
    assert lines == []
    for _ in range(5):
        assert watcher.step() is None
    assert len(lines) == 1  # it stands still
    copy_to(whole, models / "1", *files)
    assert watcher.step() == "1"


def test_folder_of_the_current_version_is_removed(watcher: Watcher, write_version: Any, models: Path, slot: Slot) -> None:
    write_version(models / "1")
    write_version(models / "2")
    assert watcher.step() == "2"
    shutil.rmtree(models / "2")
    for _ in range(3):
        assert watcher.step() is None
    assert serving(slot) == "2"
    write_version(models / "3")
    assert watcher.step() == "3"


def test_rolled_back_version(watcher: Watcher, write_version: Any, models: Path, slot: Slot, lines: list[str]) -> None:
    for name in ("2", "3"):
        write_version(models / name)
        watcher.step()
    assert slot.current is not None
    slot.observe(slot.current, seconds=0.1, rows=1, error=RuntimeError())
    assert serving(slot) == "2"
    assert watcher.step() is None
    (models / "3" / MANIFEST).chmod(0o640)
    assert watcher.step() is None
    shutil.rmtree(models / "2")
    watcher.step()
    write_version(models / "2")
    watcher.step()
    assert lines == []  # nothing about the version that serves
    slot.unload()
    os.utime(models / "3" / MANIFEST)
    assert watcher.step() is None
    assert slot.current is None
    write_version(models / "3", 1)
    assert watcher.step() == "3"


@pytest.mark.skipif(os.name != "posix", reason="links need no privilege on POSIX")
def test_version_with_a_dangling_link(watcher: Watcher, write_version: Any, models: Path, lines: list[str]) -> None:
    data = (write_version(models / "1") / "model.onnx").read_bytes()
    (models / "1" / "model.onnx").unlink()
    (models / "1" / "model.onnx").symlink_to(models.parent / "store.onnx")
    for _ in range(3):
        assert watcher.step() is None
    assert len(lines) == 1
    assert lines[0].startswith("version 1 is not loaded: it cannot be read ")
    assert "model.onnx" in lines[0]
    (models / "1" / "model.onnx").unlink()
    (models / "1" / "model.onnx").write_bytes(data)
    assert watcher.step() == "1"


def test_version_without_permission(
    watcher: Watcher, write_version: Any, models: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(models / "1")
    iterdir = Path.iterdir

    def refused(path: Path) -> Any:
        if path.name == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)  # root may read everything
        for _ in range(3):
            assert watcher.step() is None
    assert lines == [
        f"version 1 is not loaded: it cannot be read ([Errno 13] Permission denied: '{models / '1'}'): check its files and permissions"
    ]
    assert watcher.step() == "1"


@pytest.mark.parametrize("unloaded", [False, True])
def test_version_loaded_by_another_caller(
    watcher: Watcher, write_version: Any, models: Path, slot: Slot, shelf: Any, unloaded: bool
) -> None:
    """The watcher finds it while it is being loaded, and waits."""
    write_version(models / "1")
    watcher.step()
    entered, proceed, open_at_once = threading.Event(), threading.Event(), shelf.open

    def slowly(*given: Any, **named: Any) -> Any:
        entered.set()
        assert proceed.wait(20)
        return open_at_once(*given, **named)

    shelf.open = slowly
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(slot.load, write_version(models / "2", 1), "2")
        assert entered.wait(20)
        watching = threads.submit(watcher.step)
        time.sleep(0.1)  # it waits now
        proceed.set()
        loading.result(20)
        if unloaded:
            slot.unload("2")
        assert watching.result(20) is None
    assert shelf.tried == ["1", "2"]
    assert serving(slot) == ("1" if unloaded else "2")
    assert watcher.step() is None
    write_version(models / "2", 2)
    assert watcher.step() == "2"


def test_single_artefact_that_is_replaced(slot: Slot, write_version: Any, tmp_path: Path, lines: list[str]) -> None:
    path = write_version(tmp_path / "a", 1)
    watcher = Watcher(Repository(path), slot, notify=lines.append)
    assert watcher.step() == "1"
    first = slot.current
    os.utime(path / MANIFEST)
    assert watcher.step() is None
    write_version(path, 2)
    assert watcher.step() == "1"
    assert slot.current is not first
    assert slot.lease("1").version is slot.current
    assert lines == []


def test_folder_that_is_no_version(watcher: Watcher, models: Path, lines: list[str]) -> None:
    (models / "newest").mkdir()
    for _ in range(3):
        watcher.step()
    assert lines == [f"{models / 'newest'}: its name is no whole number from 1: name versions 1, 2, 3, ..."]


def test_directory_away_for_a_while(watcher: Watcher, write_version: Any, models: Path, lines: list[str]) -> None:
    write_version(models / "1")
    watcher.step()
    models.rename(models.with_name("away"))
    for _ in range(3):
        assert watcher.step() is None
    assert len(lines) == 1
    assert "cannot be listed" in lines[0]
    models.with_name("away").rename(models)
    write_version(models / "2")
    assert watcher.step() == "2"


def test_start_and_stop(in_process: Any, models: Path, write_version: Any, wait_until: Any, lines: list[str]) -> None:
    """With versions that have an engine."""
    slot = Slot("model", in_process, rollout=Rollout())
    watcher = Watcher(Repository(models), slot, notify=lines.append, interval_s=0.01)
    watcher.start()
    for name in ("1", "2"):
        write_version(models / name)
        wait_until(lambda name=name: serving(slot) == name)
    watcher.stop(20)
    assert not any(thread.name == "muntin-watch" for thread in threading.enumerate())
    assert lines == []
    slot.close()
