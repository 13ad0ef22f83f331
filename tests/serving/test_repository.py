"""Where versions come from: what is listed, what a name can reach, and what a watcher makes of what comes and goes."""

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
from muntin.errors import ArtifactError, RecipeError
from muntin.serving.repository import Repository, Watcher, fingerprint
from muntin.serving.rollout import Rollout
from muntin.serving.slot import Slot
from muntin.serving.version import RefusedError, TookTooLongError, UnknownVersionError

HOSTILE = (
    *("../1", "..", ".", "", "/etc", "1/", "1/../2", "1\0", "1 ", " 1", "1\n"),
    *("01", "+1", "-1", "1.0", "1e0", "\u0661", "\uff11", "9" * 19),
)
"""Names that are no version's, though some are a path or a number to somebody."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def slot(shelf: Any, clock: Any) -> Slot:
    return Slot("model", shelf, rollout=Rollout(), clock=clock)


@pytest.fixture
def watcher(models: Path, slot: Slot, told: list[str]) -> Watcher:
    return Watcher(Repository(models), slot, notify=told.append)


def serving(slot: Slot) -> str | None:
    return None if slot.current is None else slot.current.name


def copy_to(source: Path, target: Path, *names: str) -> None:
    """Copies some files of an artefact, as a copy in progress has."""
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)


def serve_and_roll_back(watcher: Watcher, slot: Slot, models: Path, write_version: Callable[..., Path], *names: str) -> None:
    """Versions that come one after the other; the last one fails an image, and goes back to the one before."""
    for name in names:
        write_version(models / name)
        watcher.step()
    assert slot.current is not None
    slot.observe(slot.current, seconds=0.1, rows=1, error=RuntimeError())
    assert serving(slot) == names[-2]


# ---- what is listed ----


def test_an_artefact_is_version_1(write_version: Callable[..., Path], tmp_path: Path) -> None:
    path = write_version(tmp_path / "a")
    assert Repository(path).scan() == {"1": path}
    assert Repository(str(path)).find("1") == path


def test_versions_are_folders_whose_names_are_numbers(models: Path) -> None:
    for name in ("2", "10", "1", "01", "x", ".3.ab12.partial", "0"):
        (models / name).mkdir()
    (models / "4").write_text("a file")
    repository = Repository(models)
    assert list(repository.scan().items()) == [(name, models / name) for name in ("1", "2", "10")]
    assert set(repository.ignored()) == {"01", "x", "0"}
    assert "no whole number from 1" in repository.ignored()["x"]


def test_a_name_is_only_looked_up(models: Path) -> None:
    (models / "1").mkdir()
    repository = Repository(models)
    assert repository.find("1") == models / "1"
    for name in HOSTILE:
        with pytest.raises(UnknownVersionError, match=r"no version .*: there is 1") as caught:
            repository.find(name)
        assert str(caught.value).isprintable()


def test_names_on_disk_are_no_better(models: Path) -> None:
    for name in HOSTILE:
        if name not in ("", ".", "..") and "/" not in name and "\0" not in name:
            (models / name).mkdir()
    assert Repository(models).scan() == {}


@pytest.mark.skipif(os.name != "posix", reason="links need no privilege on POSIX")
def test_a_link_may_not_lead_out(models: Path) -> None:
    (models.parent / "models-elsewhere").mkdir()
    (models / ".store").mkdir()
    (models / "1").symlink_to(models.parent / "models-elsewhere")
    (models / "2").symlink_to("..")
    (models / "3").symlink_to(".store")
    (models / "4").symlink_to("4")
    (models / "5").symlink_to("nowhere")
    repository = Repository(models)
    assert list(repository.scan()) == ["3"]
    assert set(repository.ignored()) == {"1", "2", "4", "5"}
    assert "leads out of the directory" in repository.ignored()["1"]
    assert "a link to nothing" in repository.ignored()["5"]


def test_a_directory_that_is_not_there(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such directory"):
        Repository(tmp_path / "nowhere")
    repository = Repository(models)
    models.rmdir()
    with pytest.raises(ArtifactError, match="cannot be listed"):
        repository.scan()


def test_a_fingerprint_is_of_one_state(write_version: Callable[..., Path], tmp_path: Path) -> None:
    path = write_version(tmp_path / "1")
    first = fingerprint(path)
    assert first == fingerprint(path)
    data = (path / MANIFEST).read_bytes()
    status = (path / MANIFEST).stat()
    (path / MANIFEST).write_bytes(data.swapcase())
    os.utime(path / MANIFEST, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times does
    assert fingerprint(path) != first
    assert fingerprint(tmp_path / "nowhere") is None


# ---- what a watcher makes of it ----


def test_the_newest_that_can_be_is_served(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, told: list[str]
) -> None:
    assert watcher.step() is None
    for name in ("1", "2", "10"):
        write_version(models / name)
    assert watcher.step() == "10"
    assert watcher.step() is None
    write_version(models / "9")
    for _ in range(2):
        assert watcher.step() is None  # older than what serves
    assert told == ["version 9 is not loaded: 10 has served: give it a higher one, or load it by name"]
    write_version(models / "11")
    assert watcher.step() == "11"
    assert serving(slot) == "11"
    assert len(told) == 1


def test_a_broken_one_is_told_once_and_tried_again_when_it_changes(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, shelf: Any, told: list[str]
) -> None:
    write_version(models / "1")
    (write_version(models / "2") / "model.onnx").write_bytes(b"altered")
    assert watcher.step() == "1"
    for _ in range(4):
        assert watcher.step() is None
    assert len(told) == 1
    assert told[0].startswith("version 2 is not loaded: ")
    assert "model.onnx: its content is not what" in told[0]
    assert shelf.probed == ["1"]
    write_version(models / "2")
    assert watcher.step() == "2"


def test_one_that_fails_on_trial_is_told_once(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, shelf: Any, told: list[str]
) -> None:
    for name in ("1", "2", "3"):
        write_version(models / name)
    shelf.trouble = {"3": ArtifactError("3: its engine ended the process")}
    assert watcher.step() == "2"  # the next best
    for _ in range(3):
        assert watcher.step() is None
    assert told == ["version 3 is not loaded: 3: its engine ended the process"]
    assert shelf.probed == ["3", "2"]
    shelf.trouble = {}
    write_version(models / "3", 1)
    assert watcher.step() == "3"


def test_one_that_took_too_long_is_tried_again_after_ever_longer_pauses(
    models: Path, write_version: Callable[..., Path], slot: Slot, clock: Any, shelf: Any, told: list[str]
) -> None:
    watcher = Watcher(Repository(models), slot, notify=told.append, clock=clock)
    for name in ("1", "2"):
        write_version(models / name)
    shelf.trouble = {"2": TookTooLongError("2: it was not open in time")}
    assert watcher.step() == "1"
    for pause in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        assert told.pop() == f"version 2 is not loaded: 2: it was not open in time; it is tried again in {pause} s"
        assert told == []
        clock.now += pause - 1
        assert watcher.step() is None
        assert told == []
        clock.now += 1
        assert watcher.step() is None
    assert shelf.probed == ["2", "1", *["2"] * 8]
    write_version(models / "2", 1)  # it changes, and is in time no sooner
    assert watcher.step() is None
    assert told[-1].endswith("; it is tried again in 60 s")
    clock.now += 60
    shelf.trouble = {}
    assert watcher.step() == "2"
    assert serving(slot) == "2"
    clock.now += 7200
    assert watcher.step() is None


def test_one_that_took_too_long_and_then_fails_is_not_tried_again(
    models: Path, write_version: Callable[..., Path], slot: Slot, clock: Any, shelf: Any, told: list[str]
) -> None:
    watcher = Watcher(Repository(models), slot, notify=told.append, clock=clock)
    write_version(models / "1")
    shelf.trouble = {"1": TookTooLongError("1: it was not open in time")}
    assert watcher.step() is None
    shelf.trouble = {"1": ArtifactError("1: its engine ended the process")}
    for _ in range(3):
        clock.now += 4000
        assert watcher.step() is None
    assert told[1:] == ["version 1 is not loaded: 1: its engine ended the process"]


def test_a_copy_in_progress_is_left_alone(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, told: list[str]
) -> None:
    whole = write_version(models.parent / "whole")
    files = sorted(entry.name for entry in whole.iterdir())
    for count in range(len(files)):
        copy_to(whole, models / "1", *files[:count])
        assert watcher.step() is None
    (models / "1" / files[-1]).write_bytes((whole / files[-1]).read_bytes()[:-1])
    assert watcher.step() is None
    assert told == []
    copy_to(whole, models / "1", *files)
    assert watcher.step() == "1"


def test_a_copy_that_stood_still_is_told_and_still_taken_when_it_is_whole(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, told: list[str]
) -> None:
    whole = write_version(models.parent / "whole")
    copy_to(whole, models / "1", MANIFEST)
    for _ in range(5):
        assert watcher.step() is None
    assert len(told) == 1
    copy_to(whole, models / "1", *(entry.name for entry in whole.iterdir()))
    assert watcher.step() == "1"


def test_what_serves_does_so_without_its_directory(watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot) -> None:
    write_version(models / "1")
    write_version(models / "2")
    assert watcher.step() == "2"
    shutil.rmtree(models / "2")
    for _ in range(3):
        assert watcher.step() is None
    assert serving(slot) == "2"
    write_version(models / "3")
    assert watcher.step() == "3"


def test_what_was_rolled_back_or_unloaded_does_not_come_back(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot
) -> None:
    serve_and_roll_back(watcher, slot, models, write_version, "1", "2")
    assert watcher.step() is None
    slot.unload()
    assert watcher.step() is None  # who unloads everything does not want the one before either
    write_version(models / "2", 1)
    assert watcher.step() == "2"


def test_what_was_rolled_back_stays_away_when_its_files_are_touched(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot
) -> None:
    serve_and_roll_back(watcher, slot, models, write_version, "1", "2")
    (models / "2" / MANIFEST).chmod(0o640)  # as `chmod -R`, or a backup by hard links
    assert watcher.step() is None
    slot.unload()
    os.utime(models / "2" / MANIFEST)
    assert watcher.step() is None
    assert slot.current is None


def test_of_the_version_that_serves_nothing_is_told_when_it_comes_back(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, told: list[str]
) -> None:
    serve_and_roll_back(watcher, slot, models, write_version, "2", "3")
    shutil.rmtree(models / "2")
    watcher.step()
    write_version(models / "2")
    watcher.step()
    assert told == []


@pytest.mark.skipif(os.name != "posix", reason="links need no privilege on POSIX")
def test_a_version_with_a_link_to_nothing_is_told_and_taken_when_it_is_whole(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, told: list[str]
) -> None:
    data = (write_version(models / "1") / "model.onnx").read_bytes()
    (models / "1" / "model.onnx").unlink()
    (models / "1" / "model.onnx").symlink_to(models.parent / "store.onnx")
    for _ in range(3):
        assert watcher.step() is None
    assert len(told) == 1
    assert told[0].startswith("version 1 is not loaded: ")
    assert "model.onnx" in told[0]
    (models / "1" / "model.onnx").unlink()
    (models / "1" / "model.onnx").write_bytes(data)
    assert watcher.step() == "1"


def test_a_version_that_may_not_be_read_is_told_once(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(models / "1")
    iterdir = Path.iterdir

    def refused(path: Path) -> Any:
        if path.name == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)  # whoever runs the tests may be allowed everything
        for _ in range(3):
            assert watcher.step() is None
    assert told == [f"version 1 is not loaded: it cannot be read ([Errno 13] Permission denied: '{models / '1'}'): check its permissions"]
    assert watcher.step() == "1"


@pytest.mark.parametrize("then", ["serves", "was unloaded", "was refused"])
def test_what_somebody_else_had_loaded_is_left_to_them(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, shelf: Any, signature_of: Any, then: str
) -> None:
    """The watcher looked while it was being loaded, and waits for that."""
    write_version(models / "1")
    watcher.step()
    if then == "was refused":
        shelf.signatures["2"] = signature_of(channels=4)
    entered, go, probe = threading.Event(), threading.Event(), shelf.probe

    def slowly(*asked: Any) -> Any:
        entered.set()
        assert go.wait(20)
        return probe(*asked)

    shelf.probe = slowly
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(slot.load, write_version(models / "2", 1), "2")
        assert entered.wait(20)
        watching = threads.submit(watcher.step)
        time.sleep(0.1)  # it waits now
        go.set()
        assert isinstance(loading.exception(20), RefusedError if then == "was refused" else type(None))
        if then == "was unloaded":
            slot.unload("2")
        assert watching.result(20) is None
    assert shelf.probed == ["1", "2"]
    assert serving(slot) == ("2" if then == "serves" else "1")
    assert watcher.step() is None
    shelf.signatures.clear()
    write_version(models / "2", 2)
    assert watcher.step() == "2"  # another one


def test_what_was_loaded_and_unloaded_between_two_looks_does_not_come_back(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot
) -> None:
    write_version(models / "1")
    watcher.step()
    slot.load(write_version(models / "2"), "2")
    slot.unload("2")
    assert watcher.step() is None
    assert serving(slot) == "1"


def test_an_artefact_that_is_replaced_in_its_place(
    shelf: Any, clock: Any, write_version: Callable[..., Path], tmp_path: Path, told: list[str]
) -> None:
    path = write_version(tmp_path / "a", 1)
    slot = Slot("model", shelf, rollout=Rollout(), clock=clock)
    watcher = Watcher(Repository(path), slot, notify=told.append)
    assert watcher.step() == "1"
    first = slot.current
    os.utime(path / MANIFEST)
    assert watcher.step() is None  # touched, and the same
    write_version(path, 2)
    assert watcher.step() == "1"
    assert slot.current is not first
    assert slot.lease("1").version is slot.current
    assert told == []


def test_what_is_no_version_is_told_once(watcher: Watcher, models: Path, told: list[str]) -> None:
    (models / "newest").mkdir()
    for _ in range(3):
        watcher.step()
    assert told == [f"{models / 'newest'}: its name is no whole number from 1: name versions 1, 2, 3, ..."]


def test_a_directory_that_cannot_be_read_for_a_while(
    watcher: Watcher, write_version: Callable[..., Path], models: Path, slot: Slot, told: list[str]
) -> None:
    write_version(models / "1")
    watcher.step()
    models.rename(models.with_name("away"))
    for _ in range(3):
        assert watcher.step() is None
    assert len(told) == 1
    assert "cannot be listed" in told[0]
    models.with_name("away").rename(models)
    write_version(models / "2")
    assert watcher.step() == "2"


def test_it_watches_until_it_is_stopped(models: Path, slot: Slot, write_version: Callable[..., Path], wait_until: Any) -> None:
    watcher = Watcher(Repository(models), slot, notify=lambda line: None, interval_s=0.01)
    watcher.start()
    write_version(models / "1")
    wait_until(lambda: serving(slot) == "1")
    watcher.stop(20)
    assert not any(thread.name == "muntin-watch" for thread in threading.enumerate())
    write_version(models / "2")
    assert serving(slot) == "1"


def test_it_waits_as_it_is_told(models: Path, slot: Slot) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 3

    watcher = Watcher(Repository(models), slot, notify=lambda line: None, interval_s=7, wait=wait)
    watcher.start()
    watcher.stop(20)
    assert waits == [7, 7, 7]
    with pytest.raises(RecipeError, match="interval_s=0"):
        Watcher(Repository(models), slot, notify=lambda line: None, interval_s=0)


def test_a_real_version_that_is_renamed_into_place(
    in_process: Any, models: Path, write_version: Callable[..., Path], told: list[str]
) -> None:
    slot = Slot("model", in_process, rollout=Rollout())
    watcher = Watcher(Repository(models), slot, notify=told.append)
    for name, label in (("1", 3), ("2", 1)):
        write_version(models / name, label)
        assert watcher.step() == name
    assert told == []
    slot.close()


def test_who_cannot_be_told_does_not_end_the_watching(models: Path, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def broken(line: str) -> None:
        raise BrokenPipeError(line)

    (models / "latest").mkdir()
    assert Watcher(Repository(models), slot, notify=broken).step() is None
    assert "its name is no whole number" in str(reported[0].exc_value)
