"""Shadows beside the requests, also where the candidate hangs. The rules of a trial are in `test_rollout`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import image_group
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.shadow import SHADOWS, Shadows
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import Version
from serving_parts import on_trial

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
INPUTS = {"images": IMAGES}


def cast(slot: Slot, shadows: Shadows, current: Version, count: int = 1) -> None:
    answer = current.session.labels(IMAGES)
    group = image_group(current, 8, 8, labels=True)
    for _ in range(count):
        slot.observe(current, seconds=0.001, rows=1)
        with slot.lease() as lease:
            work = Work(inputs=INPUTS, lease=lease, by=current, within=0.5, whole=(INPUTS, {"labels": answer}))
            shadows.cast(work, group)
            shadows.cast(work, group)  # a batch is cast once


def test_candidate_that_hangs(shelf: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, and delays neither the next candidate nor the end."""
    monkeypatch.setattr("muntin.serving.inference.shadow.JOIN_S", 0.05)
    slot, metrics, free = Slot("m", shelf, rollout=Rollout(shadow=1.0, for_seconds=0.2, for_requests=3)), Metrics(), threading.Event()
    shadows, current = Shadows(slot, Executor(slot), metrics), slot.load(Path("1"), "1")
    with on_trial(slot, "2") as outcome, slot.lease("2") as lease:
        hanging = lease.version
        lease.release()
        hanging.session._infer = lambda *_: free.wait(60)  # type: ignore[method-assign, assignment, return-value]
        cast(slot, shadows, current, SHADOWS + 1)
        assert b"muntin_shadow_skipped_total 1.0" in metrics.render()
    assert "its engine hangs" in str(outcome[0])
    free.set()  # as an engine that is ended
    wait_until(lambda: not shadows.pending and not hanging.open)
    free.clear()
    with on_trial(slot, "3"), slot.lease("3") as lease:
        candidate = lease.version
        lease.release()
        cast(slot, shadows, current)
        wait_until(lambda: not shadows.pending)
        ended: list[bool] = []
        candidate.session._infer = lambda *_: ended.append(free.wait(60))  # type: ignore[method-assign, assignment, return-value, func-returns-value]
        cast(slot, shadows, current)
        shadows.close()
        assert not ended
        slot.close()
    free.set()


def test_shadow_without_threads(shelf: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, metrics = Slot("m", shelf, rollout=Rollout(shadow=1.0, for_requests=3)), Metrics()
    shadows, current = Shadows(slot, Executor(slot), metrics), slot.load(Path("1"), "1")

    def none(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with on_trial(slot, "2"), slot.lease("2") as lease:
        candidate = lease.version
        lease.release()
        cast(slot, shadows, current)
        wait_until(lambda: not shadows.pending)
        monkeypatch.setattr(shadows._threads, "submit", none)
        cast(slot, shadows, current)
        wait_until(lambda: candidate.leases == 0)
        assert b"muntin_shadow_skipped_total 1.0" in metrics.render()
        shadows.close()
        slot.close()
