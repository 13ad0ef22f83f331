"""What the repository API may do: it names versions that are listed, and nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import VerificationError
from muntin.serving.control import LISTINGS, LOADS, Control
from muntin.serving.liveness import Liveness
from muntin.serving.loader import ArtifactLoader
from muntin.serving.protocol import ProtocolError, RefusedRequestError
from muntin.serving.repository import Repository
from muntin.serving.rollout import Rollout
from muntin.serving.slot import Slot
from muntin.serving.version import NotReadyError


@pytest.fixture
def control(write_version: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path) -> Control:
    """Of versions 1 and 10, and a 2 whose golden answers are not what it computes."""
    for name in ("1", "2", "10"):
        write_version(tmp_path / name, shift=50.0 * (name == "2"))
    return Control(Slot("m", in_process, rollout=Rollout()), Repository(tmp_path))


def states(control: Control, *, ready: bool = False) -> dict[str, str]:
    return {entry.version: entry.state for entry in control.index(ready=ready)}


def test_the_newest_or_the_one_that_is_named(control: Control) -> None:
    assert states(control) == {"1": "UNAVAILABLE", "2": "UNAVAILABLE", "10": "UNAVAILABLE"}
    assert control.load("m", {}) == "10"
    assert control.load("m", {"version": "1"}) == "1"
    assert states(control, ready=True) == {"10": "READY", "1": "READY"}
    control.unload("m", {"version": "1"})
    assert states(control)["1"] == "UNAVAILABLE"
    control.unload("m", {})
    assert states(control, ready=True) == {}


def test_only_what_answers_is_ready(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    control.load("m", {"version": "1"})
    current = control._slot.current
    assert current is not None
    monkeypatch.setattr(Liveness, "able", False)
    assert states(control, ready=True) == {}
    assert states(control)["1"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("model", "parameters", "status", "message"),
    [
        ("n", {}, 404, "this server has m"),
        ("../m", {}, 404, "this server has m"),
        ("m", {"version": "3"}, 404, "there is 1, 2, 10"),
        ("m", {"version": "../10"}, 404, "no version"),
        ("m", {"version": 10}, 400, "give a string"),
        ("m", {"path": "/etc"}, 400, "'path'"),
        ("m", {"version": "2"}, 409, "what served goes on: .*golden pair"),
    ],
)
def test_what_it_may_not_do(control: Control, model: str, parameters: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        control.load(model, parameters)
    assert caught.value.status == status


def test_what_cannot_be_unloaded(control: Control) -> None:
    control.load("m", {"version": "1"})
    for parameters, status in (({"version": "7"}, 404), ({"version": 7}, 400)):
        with pytest.raises(ProtocolError) as caught:
            control.unload("m", parameters)
        assert caught.value.status == status
    with pytest.raises(ProtocolError) as caught:
        control.unload("other", {})
    assert caught.value.status == 404


def test_a_directory_that_takes_its_time_keeps_no_loop_waiting(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, go_on = control._repository.scan, threading.Event()

    def slowly() -> dict[str, Path]:
        assert go_on.wait(20)
        return scan()

    async def ask() -> list[str]:
        listing = asyncio.create_task(control.indexed(ready=False))
        await asyncio.sleep(0.01)
        go_on.set()  # by a loop that goes on
        return [entry.version for entry in await listing]

    monkeypatch.setattr(control._repository, "scan", slowly)
    assert "1" in asyncio.run(ask())


def test_a_directory_that_stands_still_takes_no_more_than_a_few_who_ask(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def stand_still() -> dict[str, Path]:
        assert go_on.wait(20)
        return {}

    async def ask() -> None:
        listings = [asyncio.create_task(control.indexed(ready=False)) for _ in range(LISTINGS)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedRequestError, match="still being listed"):
            await control.indexed(ready=False)
        assert await asyncio.to_thread(lambda: "others") == "others"
        go_on.set()
        assert await asyncio.gather(*listings) == [[]] * LISTINGS
        assert await control.indexed(ready=False) == []

    monkeypatch.setattr(control._repository, "scan", stand_still)
    asyncio.run(ask())


def test_an_artefact_that_is_loaded_again(write_version: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path) -> None:
    path = write_version(tmp_path / "single")
    control = Control(Slot("m", in_process, rollout=Rollout()), Repository(path))
    assert control.load("m", {}) == "1"
    write_version(path, shift=50.0)
    with pytest.raises(ProtocolError, match="what served goes on"):
        control.load("m", {})
    assert states(control) == states(control, ready=True) == {"1": "READY"}
    write_version(path, label=1)
    control.load("m", {})
    assert [(entry.version, entry.state) for entry in control.index(ready=True)] == [("1", "READY")]
    control.unload("m", {"version": "1"})
    assert states(control, ready=True) == {}


class Stuck:
    """A loader of versions whose trial goes on until it is let go, or the slot is closed."""

    def __init__(self) -> None:
        self.begun, self.free = 0, threading.Event()

    def probe(self, path: Path, lately: Any, stopped: Callable[[], bool]) -> Any:
        self.begun += 1
        while not self.free.wait(0.01):
            if stopped():
                raise NotReadyError("its trial was ended")
        raise VerificationError("it is broken")


def test_loads_that_wait_are_bounded_and_keep_no_unload_waiting(shelf: Any, tmp_path: Path) -> None:
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
        assert stuck.begun == LOADS  # the one that was taken back was not begun
        await asyncio.to_thread(control.close)
        with pytest.raises(RefusedRequestError, match="shutting down"):
            await control.loaded("m", {})

    asyncio.run(ask())


def test_a_directory_that_stands_still_does_not_keep_a_load_from_its_end(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.control.END_S", 0.1)
    free, begun = threading.Event(), threading.Event()

    def scan(self: Repository) -> dict[str, Path]:
        begun.set()
        free.wait(60)
        return {}

    async def scene() -> None:
        monkeypatch.setattr(Repository, "scan", scan)
        loading = asyncio.create_task(control.loaded("m", {}))
        await asyncio.to_thread(begun.wait, 60)
        started = time.monotonic()
        await asyncio.to_thread(control.close)
        assert time.monotonic() - started < 20
        with pytest.raises(RefusedRequestError, match="shutting down"):
            await control.loaded("m", {})
        free.set()
        with pytest.raises(ProtocolError):
            await loading

    asyncio.run(scene())
