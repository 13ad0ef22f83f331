"""The repository API: it reaches the versions that are listed, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact
from muntin.artifact.store import copy_artifact, read_manifest
from muntin.errors import VerificationError
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.versions.control import LISTINGS, LOADS, Control
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.repository import Repository
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.liveness import Liveness
from muntin.serving.worker.opening import NotReadyError


@pytest.fixture
def control(write_version: Any, in_process: ArtifactLoader, tmp_path: Path) -> Control:
    """Versions 1 and 10, and a 2 that does not reproduce its golden answers."""
    for name in ("1", "2", "10"):
        write_version(tmp_path / name, shift=50.0 * (name == "2"))
    return Control(Slot("m", in_process, rollout=Rollout()), Repository(tmp_path))


def states(control: Control, *, ready: bool = False) -> dict[str, str]:
    return {entry.version: entry.state for entry in control.index(ready=ready)}


def test_load_and_unload(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(control) == {"1": "UNAVAILABLE", "2": "UNAVAILABLE", "10": "UNAVAILABLE"}
    assert control.load("m", {}) == "10"
    assert control.load("m", {"version": "1"}) == "1"
    assert states(control, ready=True) == {"10": "READY", "1": "READY"}
    control.unload("m", {"version": "1"})
    assert states(control)["1"] == "UNAVAILABLE"
    assert control._slot.current is not None
    monkeypatch.setattr(Liveness, "able", False)
    assert states(control, ready=True) == {}
    control.unload("m", {})
    assert control._slot.open == ()


@pytest.mark.parametrize("action", ["load", "unload"])
def test_closed_control(control: Control, action: str) -> None:
    closed = Control(control._slot, control._repository, closed=True)
    with pytest.raises(ProtocolError, match=r"load and unload are off: .* --token-file, or with --open-control") as error:
        getattr(closed, action)("m", {})
    assert error.value.status == 403 and closed.index(ready=False)


@pytest.mark.parametrize(
    ("action", "model", "parameters", "status", "message"),
    [
        ("load", "n", {}, 404, "this server has m"),
        ("load", "../m", {}, 404, "this server has m"),
        ("load", "m", {"version": "3"}, 404, "there is 1, 2, 10"),
        ("load", "m", {"version": "../10"}, 404, "no version"),
        ("load", "m", {"version": ""}, 404, "no version"),
        ("load", "m", {"version": 10}, 400, "give a string"),
        ("load", "m", {"path": "/etc"}, 400, "'path'"),
        ("load", "m", {"version": "2"}, 409, "what served goes on: .*golden pair"),
        ("unload", "m", {"version": "7"}, 404, "no version"),
        ("unload", "m", {"version": 7}, 400, "give a string"),
        ("unload", "n", {}, 404, "this server has m"),
    ],
)
def test_refused_requests(control: Control, action: str, model: str, parameters: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        getattr(control, action)(model, parameters)
    assert caught.value.status == status


def test_empty_repository(shelf: Any, tmp_path: Path) -> None:
    control = Control(Slot("m", shelf, rollout=Rollout()), Repository(tmp_path))
    with pytest.raises(ProtocolError, match="holds no version") as caught:
        control.load("m", {})
    assert caught.value.status == 404


def test_single_artefact_loaded_again(write_version: Any, in_process: ArtifactLoader, tmp_path: Path) -> None:
    path = write_version(tmp_path / "single")
    control = Control(Slot("m", in_process, rollout=Rollout()), Repository(path))
    assert control.load("m", {}) == "1"
    write_version(path, shift=50.0)
    with pytest.raises(ProtocolError, match="what served goes on"):
        control.load("m", {})
    assert states(control) == states(control, ready=True) == {"1": "READY"}
    write_version(path, label=1)
    control.load("m", {})
    assert states(control, ready=True) == {"1": "READY"}
    control.unload("m", {"version": "1"})
    assert states(control, ready=True) == {}


def test_slow_listings(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep no event loop waiting, and are bounded."""
    scan, proceed = control._repository.scan, threading.Event()

    def slowly() -> dict[str, Path]:
        assert proceed.wait(20)
        return scan()

    async def ask() -> None:
        listings = [asyncio.create_task(control.indexed(ready=False)) for _ in range(LISTINGS)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedRequestError, match="still being listed"):
            await control.indexed(ready=False)
        assert await asyncio.to_thread(lambda: "others") == "others"
        proceed.set()
        assert [len(entries) for entries in await asyncio.gather(*listings)] == [3] * LISTINGS
        assert len(await control.indexed(ready=False)) == 3

    monkeypatch.setattr(control._repository, "scan", slowly)
    asyncio.run(ask())


class Stuck:
    """A loader that goes on until it is freed, or the slot is closed."""

    def __init__(self) -> None:
        self.begun, self.free = 0, threading.Event()

    def open(self, path: Path, *, stopped: Callable[[], bool], **_: Any) -> Any:
        self.begun += 1
        while not self.free.wait(0.01):
            if stopped():
                raise NotReadyError("opening was ended")
        raise VerificationError("it is broken")


def test_waiting_loads(shelf: Any, tmp_path: Path) -> None:
    """They are bounded, and keep no unload waiting; a cancelled one is not begun."""

    async def ask() -> None:
        for name in "12":
            (tmp_path / name).mkdir()
        slot, stuck = Slot("m", shelf, rollout=Rollout()), Stuck()
        slot.load("1", "1")
        slot._loader = stuck  # type: ignore[assignment]
        control = Control(slot, Repository(tmp_path))
        loads = [asyncio.create_task(control.loaded("m", {"version": "2"})) for _ in range(LOADS + 1)]
        while not stuck.begun:
            await asyncio.sleep(0.001)
        with pytest.raises(RefusedRequestError, match=f"{LOADS} loads wait"):
            await control.loaded("m", {"version": "2"})
        await control.unloaded("m", {"version": "1"})
        loads.pop().cancel()
        await asyncio.sleep(0)
        stuck.free.set()
        for load in loads:
            with pytest.raises(ProtocolError, match="it is broken"):
                await load
        assert stuck.begun == LOADS

    asyncio.run(ask())


def test_load_during_shutdown(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that does not answer delays the end by `END_S` at most."""
    monkeypatch.setattr("muntin.serving.versions.control.END_S", 0.1)
    free, begun, ended = threading.Event(), threading.Event(), threading.Event()
    scan = Repository.scan

    def slowly(self: Repository) -> dict[str, Path]:
        begun.set()
        free.wait(60)
        ended.set()
        return scan(self)

    async def scene() -> None:
        monkeypatch.setattr(Repository, "scan", slowly)
        loading = asyncio.create_task(control.loaded("m", {}))
        await asyncio.to_thread(begun.wait, 60)
        control._slot.end_loads()
        await asyncio.to_thread(control.close)
        assert not ended.is_set()
        free.set()
        with pytest.raises(RefusedRequestError, match="shutting down"):
            await loading

    asyncio.run(scene())


def test_load_of_the_artefact_that_is_meant(control: Control, tmp_path: Path) -> None:
    digest = read_manifest(tmp_path / "10").sha256
    with pytest.raises(ProtocolError, match=r"repository is artefact [0-9a-f]{12}, not '0{12}'") as error:
        control.load("m", {"version": "10", "digest": "0" * 64})
    assert error.value.status == 409 and control._slot.current is None
    assert control.load("m", {"version": "10", "digest": digest}) == "10"
    first = control._slot.current
    assert control.load("m", {"version": "10", "digest": digest}) == "10" and control._slot.current is first  # not loaded again
    for parameters in ({"digest": digest}, {"version": "10", "digest": True}):
        with pytest.raises(ProtocolError, match="digest"):
            control.load("m", parameters)


def test_lineage_of_an_update(control: Control, tmp_path: Path) -> None:
    summary = "update of 1a2b by data 3c4d (replay), accepted:\nold data 0.9 -> 0.9"
    copy_artifact(open_artifact(tmp_path / "10"), tmp_path / "11", {"update": {"summary": summary}})
    control.load("m", {"version": "11"})
    (entry,) = [entry for entry in control.index(ready=True) if entry.version == "11"]
    assert entry.reason == "current; update of 1a2b by data 3c4d (replay), accepted: old data 0.9 -> 0.9"
