"""The slot: leases, loading and unloading while requests go on. The rules of a trial are in `test_routes` and `test_rollout`."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, DataError, VerificationError
from muntin.runtime.session import Session
from muntin.serving.inference.fallback import compute_somewhere
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.routes import OFTEN
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import RefusedError, UnknownVersionError, Version
from muntin.serving.worker.liveness import Liveness
from muntin.serving.worker.opening import NotReadyError
from serving_parts import image_call, on_trial

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
CALL = image_call((1, 8, 8), labels=True)


class EngineError(Exception):
    """An error of an engine."""


def label_of(session: Session) -> int:
    labels = np.unique(session.labels(IMAGES))
    assert labels.size == 1
    return int(labels[0])


def states(slot: Slot) -> dict[str, tuple[str, str]]:
    return {entry.version: (entry.state, entry.reason) for entry in slot.index()}


def observe(slot: Slot, version: Version, count: int = 1, **seen: Any) -> None:
    for _ in range(count):
        slot.observe(version, **({"seconds": 0.01, "rows": 1, "call": CALL} | seen))


def break_engine(version: Version) -> None:
    def die(*_: Any) -> Any:
        raise EngineError

    version.session._infer = die  # type: ignore[method-assign]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make_slot(shelf: Any, clock: Any, lines: list[str]) -> Callable[..., Slot]:
    """`make_slot(canary=..., ...)`: versions without an engine, a clock that stands still."""

    def make(*, random: Callable[[], float] = lambda: 0.0, **bounds: Any) -> Slot:
        return Slot("model", shelf, rollout=Rollout(**bounds), clock=clock, random=random, notify=lines.append)

    return make


# ---- leases ----


def test_leases(make_slot: Any, lines: list[str]) -> None:
    slot = make_slot()
    assert not slot.ready
    with pytest.raises(NotReadyError, match="model: no version is ready"):
        slot.lease()
    version = slot.load("1", "1")
    assert (slot.ready, slot.current) == (True, version)
    with slot.lease() as lease, slot.lease("1") as named:
        assert lease.version is named.version is version
        assert (version.leases, label_of(lease.version.session)) == (2, 1)
        for _ in range(3):
            named.release()
        assert version.leases == 1
    assert version.leases == 0
    assert lines == ["model: version 1 serves"]


def test_last_lease_closes_an_old_version(make_slot: Any, wait_until: Any) -> None:
    slot, threads = make_slot(for_seconds=0), list[str]()
    old = slot.load("1", "1")
    old.session.__dict__["close"] = lambda: threads.append(threading.current_thread().name)
    gone = weakref.ref(old.session)
    first, second = slot.lease(), slot.lease()
    slot.load("2", "2")
    assert old.state == "draining"
    assert label_of(first.version.session) == 1
    first.release()
    assert (old.state, old.open) == ("draining", True)
    with pytest.raises(NotReadyError, match="version 1 is draining"):
        slot.lease("1")
    second.release()
    assert (old.state, old.open) == ("unloaded", False)
    wait_until(lambda: gone() is None)
    assert threads == ["muntin-unload"]
    assert slot.lease().version.name == "2"


# ---- loading ----


def test_failed_loads(make_slot: Any, shelf: Any, signature_of: Any) -> None:
    slot = make_slot()
    current = slot.load("1", "1")
    shelf.trouble = {"2": ArtifactError("2: altered"), "3": RuntimeError("no kernel\nfor this")}
    shelf.signatures = {"4": signature_of(channels=1)}
    with pytest.raises(ArtifactError, match="2: altered"):
        slot.load("2", "2")
    with pytest.raises(VerificationError, match=r"3: it cannot be opened here \(RuntimeError: no kernel\)"):
        slot.load("3", "3")
    with pytest.raises(RefusedError, match=r"version 4 has another contract"):
        slot.load("4", "4")
    assert slot.current is current
    assert [state for state, _ in states(slot).values()] == ["READY", *["UNAVAILABLE"] * 3]
    assert states(slot)["2"][1] == "2: altered"
    with pytest.raises(NotReadyError, match=r"version 2 is failed \(2: altered\)"):
        slot.lease("2")


def test_times_of_batches_that_lacked_memory(make_slot: Any) -> None:
    slot = make_slot()
    version, large = slot.load("1", "1"), image_call((8, 64, 64))
    observe(slot, version)
    observe(slot, version, call=None)
    observe(slot, version, call=large)
    observe(slot, version, call=large, whole=False)
    assert version.latencies.calls == (CALL,)


def test_advice_on_a_frequent_size(make_slot: Any, lines: list[str]) -> None:
    slot = make_slot()
    version = slot.load("1", "1")
    version.compiled_sizes = {CALL.size}
    for call in (CALL, image_call((1, 30, 40))):
        observe(slot, version, OFTEN + 3, call=call)
    assert [line for line in lines if "--sizes" in line] == [
        "model: images of 30x40 pixels come often, and version 1 is not compiled for them: --sizes 30x40"
    ]


def test_load_unless_already_loaded(make_slot: Any, shelf: Any) -> None:
    slot = make_slot()
    slot.load("1", "1", digest="digest of 1")
    with pytest.raises(NotReadyError, match="was loaded before"):
        slot.load("1", "1", digest="digest of 1")
    slot.unload()
    with pytest.raises(NotReadyError, match="was loaded before"):
        slot.load("1", "1", digest="digest of 1")
    assert shelf.tried == ["1"]
    slot.load("1", "1")
    assert shelf.tried == ["1", "1"]


def test_loads_one_at_a_time(make_slot: Any, shelf: Any) -> None:
    slot, inside, most = make_slot(), list[int](), list[int]()
    open_version = shelf.open

    def counting(*arguments: Any, **named: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return open_version(*arguments, **named)

    shelf.open = counting
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(slot.load, "1234", "1234"))
    assert most == [1] * 4


def test_canary_share(make_slot: Any, clock: Any) -> None:
    slot = make_slot(canary=0.25, for_requests=200, random=random.Random(3).random)  # noqa: S311
    old = slot.load("1", "1")
    with on_trial(slot, "2") as outcome:
        with slot.lease("2") as lease:
            candidate = lease.version
        versions = [slot.lease().version for _ in range(400)]
        assert 70 <= versions.count(candidate) <= 130
        assert versions.count(old) == 400 - versions.count(candidate)
        observe(slot, candidate, 199)
        assert not outcome
        observe(slot, candidate)
    assert outcome == [slot.current] == [candidate]


def test_refused_canary(make_slot: Any) -> None:
    slot = make_slot(canary=0.5)
    old = slot.load("1", "1")
    with on_trial(slot, "2") as outcome:
        candidate = slot.lease().version
        break_engine(candidate)
        assert compute_somewhere(slot, candidate, label_of, rows=1) == (1, old)
    assert isinstance(outcome[0], RefusedError)
    assert str(outcome[0]) == "model: version 2 is refused on trial: 1 of its 1 rows failed (allowed: 0.00%): EngineError"
    assert slot.lease().version is old


def test_shadow_share(make_slot: Any) -> None:
    drawn = 0.0
    slot = make_slot(shadow=0.5, for_requests=30, random=lambda: drawn)
    old = slot.load("1", "1")
    assert slot.shadow(old) is None
    assert not slot.shadowed
    with on_trial(slot, "2") as outcome:
        candidate = slot.lease("2").version
        assert slot.shadowed
        assert slot.lease().version is old
        assert slot.shadow(candidate) is None
        drawn = 0.5
        assert slot.shadow(old) is None
        drawn = 0.49
        with slot.shadow(old) as lease:  # type: ignore[union-attr]
            assert lease.version is candidate
            slot.observe(candidate, beside=candidate, agreement=0.0, rows=1)  # late: the current version has changed since
            for _ in range(29):
                slot.observe(candidate, beside=old, agreement=1.0, rows=1)
    assert outcome == [slot.current]
    assert slot.shadow(old) is None


# ---- failing and hanging versions ----


def test_failed_batch_is_computed_by_the_old_version(make_slot: Any) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    with slot.lease() as lease:
        assert lease.version is new
        break_engine(new)
        assert compute_somewhere(slot, new, label_of, rows=1, call=CALL) == (1, old)
        assert slot.current is old
        assert compute_somewhere(slot, new, label_of, rows=1, call=CALL) == (1, old)  # admitted before the roll-back
    assert not new.open
    assert (new.latencies.calls, old.latencies.calls) == ((), (CALL,))
    assert (old.leases, new.leases) == (0, 0)


def test_images_that_no_version_can_compute(make_slot: Any) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")

    def fail(session: Session) -> None:
        raise EngineError(session.label)  # type: ignore[attr-defined]

    for _ in range(20):
        with pytest.raises(EngineError, match="2"):
            compute_somewhere(slot, new, fail, rows=1)
    with pytest.raises(DataError):
        compute_somewhere(slot, new, lambda session: session(IMAGES[0]), rows=1)
    assert slot.open == (new, old)
    assert old.leases == 0


def test_images_are_freed_after_a_failure(make_slot: Any, uncollected: None) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    break_engine(new)
    images = np.zeros((1, 4, 4, 3), np.uint8)
    gone = weakref.ref(images)
    assert compute_somewhere(slot, new, lambda session, images=images: session.labels(images).shape, rows=1) == ((1, 4, 4), old)
    del images
    assert gone() is None


def test_overdue_batch_on_probation(make_slot: Any, clock: Any, lines: list[str]) -> None:
    """A version does not pass while a batch hangs, and is rolled back when it is overdue."""
    slot = make_slot(for_seconds=2)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    begun = slot.begin(new, rows=3, within=10)
    clock.now += 9
    slot.settle()
    assert slot.open == (new, old)
    clock.now += 1
    with slot.lease() as lease:
        assert lease.version is old
    reason = "it does not come back with 3 of its rows: its engine hangs"
    assert lines[-2:] == ["model: version 2 did not come back with 3 rows in 10 s", f"model: version 2 is rolled back to 1: {reason}"]
    assert (new.open, slot.hangs(new)) == (True, True)
    slot.observe(new, seconds=60.0, rows=3, begun=begun)
    assert (new.open, new.leases) == (False, 0)


def test_requests_behind_an_overdue_batch(make_slot: Any, clock: Any) -> None:
    slot = make_slot()
    old, new = slot.load("1", "1"), slot.load("2", "2")
    with slot.lease() as waiting:
        begun = slot.begin(new, rows=1, within=10)
        clock.now += 11
        assert compute_somewhere(slot, waiting.version, label_of, rows=1) == (1, old)
        assert slot.current is old
    only = slot.begin(old, rows=1, within=10)
    clock.now += 11
    assert compute_somewhere(slot, old, label_of, rows=1) == (1, old)  # there is no other version
    for one in (begun, only):
        slot.end(one)
    assert (slot.hangs(old), old.leases, new.open) == (False, 0, False)


def test_interrupted_batch(make_slot: Any, clock: Any, lines: list[str]) -> None:
    slot = make_slot(max_error_rate=0.5)
    old, new = slot.load("1", "1"), slot.load("2", "2")
    interrupted: list[float] = []
    new.session.interrupt = lambda seconds: interrupted.append(seconds) or True  # type: ignore[method-assign, func-returns-value]

    def hang(session: Session) -> int:
        if new.open and session is new.session:
            clock.now += 11
            assert slot.interrupt(clock.now - 11)
            assert not slot.interrupt(clock.now + 1)
            raise EngineError
        return label_of(session)

    assert compute_somewhere(slot, new, hang, rows=1, within=10) == (1, old)
    assert set(interrupted) == {10}
    assert (slot.current, old.leases, new.leases, new.open) == (old, 0, 0, False)
    assert "1 of its rows: its engine hangs" in "".join(lines)


# ---- out of service ----


def test_unload(make_slot: Any) -> None:
    slot = make_slot()
    slot.load("4", "4")
    slot.load("4", "4")
    with pytest.raises(UnknownVersionError):
        slot.unload("9")
    slot.unload("4")  # both loads of it
    assert not slot.ready
    with pytest.raises(NotReadyError, match="version 4 is unloaded"):
        slot.unload("4")
    slot.load("5", "5")
    slot.unload()
    assert not slot.ready


def test_end_of_loads_and_close(make_slot: Any) -> None:
    slot = make_slot(canary=1)
    first = slot.load("1", "1")
    lease = slot.lease()
    with on_trial(slot, "2") as outcome:
        candidate = slot.lease()
        slot.end_loads()
    assert isinstance(outcome[0], NotReadyError)
    assert label_of(candidate.version.session) == 2
    candidate.release()
    assert not candidate.version.open
    assert (slot.ready, slot.closed, slot.current) == (True, True, first)
    with pytest.raises(NotReadyError):
        slot.load("3", "3")
    slot.close()
    slot.close()
    with pytest.raises(NotReadyError):
        slot.lease()
    assert label_of(lease.version.session) == 1
    lease.release()
    assert not first.open


def test_close_during_opening(make_slot: Any, shelf: Any, wait_until: Any) -> None:
    slot, closed = make_slot(), list[Session]()
    opens = shelf.open

    def open_and_close(path: Path, **given: Any) -> Any:
        opened = opens(path, **given)
        opened.session.close = lambda: closed.append(opened.session)
        slot.end_loads()
        return opened

    shelf.open = open_and_close
    with pytest.raises(NotReadyError, match="closed"):
        slot.load(Path("1"), "1")
    wait_until(lambda: len(closed) == 1)


def test_end_calls(make_slot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, interrupted = make_slot(), list[tuple[Session, float]]()
    monkeypatch.setattr(Liveness, "interrupt", lambda session, seconds: bool(interrupted.append((session, seconds))))
    old, new = (slot.load(Path(name), name) for name in ("1", "2"))
    begun = slot.begin(old, rows=1)
    slot.end_calls()
    assert interrupted == [(old.session, 0.0)]
    slot.end(begun)
    slot.end_calls()
    assert len(interrupted) == 1
    assert new.open
