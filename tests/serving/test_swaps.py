"""Versions of real artefacts that change under load."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.runtime.host.memory import resident
from muntin.runtime.session import Session
from muntin.serving.inference.fallback import compute_somewhere
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from serving_parts import image_call

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
CALL = image_call((1, 8, 8), labels=True)


def label_of(session: Session) -> int:
    labels = np.unique(session.labels(IMAGES))
    assert labels.size == 1
    return int(labels[0])


@contextmanager
def crowd(slot: Slot, labels: dict[str, int], *, threads: int = 3) -> Iterator[list[int]]:
    """Threads that take leases and compute: an answer must be that of the version that gave it. Yields the number of answers of each."""
    over, answers, problems = threading.Event(), [0] * threads, []

    def ask(number: int) -> None:
        try:
            while not over.is_set():
                with slot.lease() as lease:
                    session = lease.version.session
                    label, version = compute_somewhere(slot, lease.version, label_of, rows=1, call=CALL)
                    if label != labels[version.name] or lease.version.session is not session:
                        problems.append((label, version.name))
                answers[number] += 1
        except BaseException as error:
            problems.append(error)
            raise

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for client in clients:
        client.start()
    try:
        yield answers
    finally:
        over.set()
        for client in clients:
            client.join()
        assert problems == []


def test_swaps_and_roll_back_under_load(in_process: ArtifactLoader, write_version: Any, tmp_path: Path, wait_until: Any) -> None:
    labels = {str(number): number % 4 for number in range(1, 6)}
    paths = {name: write_version(tmp_path / name, label) for name, label in labels.items()}
    slot = Slot("model", in_process, rollout=Rollout(for_requests=10**9, max_slowdown=inf))
    first = slot.load(paths["1"], "1")
    sessions: list[Any] = []

    def die(*_: Any) -> Any:
        raise RuntimeError("Exception from src/inference: the primitive is gone")

    with crowd(slot, labels) as answers:
        for name in list(labels)[1:]:
            version = slot.load(paths[name], name)
            sessions.append(weakref.ref(version.session))
            wait_until(lambda version=version: len(version.latencies.of(CALL)) > 10)
        with slot.lease("5") as lease:
            lease.version.session._infer = die  # type: ignore[method-assign]
            wait_until(lambda: slot.current is first)
        before = sum(answers)
        wait_until(lambda: sum(answers) > before + 20)
    del lease
    wait_until(lambda: not any(session() for session in sessions))


def swap(slot: Slot, paths: list[Path], count: int, wait_until: Any) -> int:
    """Load `count` versions one after the other; returns the resident bytes once the old ones are closed."""
    for number in range(count):
        slot.load(paths[number % len(paths)], str(number))
        with slot.lease() as lease:
            label_of(lease.version.session)
    wait_until(lambda: not any(thread.name == "muntin-unload" for thread in threading.enumerate()))
    now, _ = resident()
    assert now is not None
    return now


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read in Linux's form")
def test_memory_of_swaps(in_process: ArtifactLoader, write_version: Any, tmp_path: Path, wait_until: Any, signal_stack: Any) -> None:
    slot = Slot("model", in_process, rollout=Rollout(for_seconds=0))
    paths = [write_version(tmp_path / str(label), label) for label in range(4)]
    stack = signal_stack()
    before = swap(slot, paths, 6, wait_until)
    after = swap(slot, paths, 12, wait_until)
    assert (after - before) / 12 < 256 << 10
    assert signal_stack() == stack  # of this thread, on which all of them were opened
