"""A candidate beside the one that serves, whatever its engine does. What it is judged by is in `test_rollout`."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import MuntinError
from muntin.serving.executor import Executor, Work
from muntin.serving.metrics import Metrics
from muntin.serving.rollout import Rollout
from muntin.serving.shadows import SHADOWS, Shadows
from muntin.serving.slot import Slot

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)


def begin_trial(slot: Slot, name: str, wait_until: Any) -> tuple[threading.Thread, list[str]]:
    """Loads a version on a thread of its own; what that raised is put into the list."""
    outcome: list[str] = []
    assert slot.current is not None
    slot.observe(slot.current, seconds=0.001, rows=1)  # beside a version that nobody asks there is no trial

    def load() -> None:
        try:
            slot.load(Path(name), name)
        except MuntinError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    wait_until(lambda: any(entry.reason.startswith("candidate") and entry.version == name for entry in slot.index()))
    return thread, outcome


def test_a_candidate_that_hangs_is_refused_and_keeps_neither_the_next_one_nor_the_end(
    shelf: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muntin.serving.shadows.JOIN_S", 0.05)
    slot = Slot("m", shelf, rollout=Rollout(shadow=1.0, for_seconds=0.2, for_requests=3))
    executor, metrics = Executor(slot), Metrics()
    shadows = Shadows(slot, executor, metrics)
    current = slot.load(Path("1"), "1")
    answer = current.session.labels(IMAGES)
    free = threading.Event()

    def cast(count: int) -> None:
        for _ in range(count):
            slot.observe(current, seconds=0.001, rows=1)
            work = Work(images=IMAGES, lease=slot.lease(), by=current, within=0.5, whole=(IMAGES, answer))
            shadows.cast(work, labels=True)
            shadows.cast(work, labels=True)  # its batch had its turn
            work.lease.release()

    thread, outcome = begin_trial(slot, "2", wait_until)
    with slot.lease("2") as lease:
        lease.version.session._infer = lambda images: free.wait(60)  # type: ignore[method-assign, assignment, return-value]
        hanging = lease.version
    cast(SHADOWS + 1)
    assert b"muntin_shadow_skipped_total 1.0" in metrics.render()
    thread.join(20)
    assert "its engine hangs" in outcome[0]
    thread, outcome = begin_trial(slot, "3", wait_until)
    cast(1)
    wait_until(lambda: not shadows.pending)
    with slot.lease("3") as lease:
        lease.version.session._infer = lambda images: free.wait(60)  # type: ignore[method-assign, assignment, return-value]
    cast(1)
    started = time.monotonic()
    shadows.close()
    assert time.monotonic() - started < 10
    slot.close()
    thread.join(20)
    free.set()
    wait_until(lambda: not hanging.open)


def test_what_shadows_hold_is_bounded_in_bytes_and_given_back_where_there_is_no_thread(
    shelf: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muntin.serving.shadows.SHADOW_BYTES", IMAGES.nbytes)
    slot = Slot("m", shelf, rollout=Rollout(shadow=1.0, for_seconds=60.0, for_requests=3))
    metrics = Metrics()
    shadows = Shadows(slot, Executor(slot), metrics)
    current = slot.load(Path("1"), "1")
    answer = current.session.labels(IMAGES)
    thread, _ = begin_trial(slot, "2", wait_until)
    let_go = threading.Event()
    with slot.lease("2") as lease:
        candidate = lease.version
    infer = candidate.session._infer
    candidate.session._infer = lambda images: infer(images) if let_go.wait(60) else images  # type: ignore[method-assign, assignment, return-value]

    def cast() -> None:
        with slot.lease() as held:
            shadows.cast(Work(images=IMAGES, lease=held, by=current, whole=(IMAGES, answer)), labels=True)

    cast()  # alone, whatever it holds
    assert shadows.pending == 1
    cast()
    assert (shadows.pending, candidate.leases) == (1, 2)  # a lease, and what is begun
    let_go.set()
    wait_until(lambda: not shadows.pending)

    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shadows._threads, "submit", none)
    cast()
    wait_until(lambda: candidate.leases == 0)
    assert b"muntin_shadow_skipped_total 2.0" in metrics.render()
    shadows.close()
    slot.close()
    thread.join(20)
