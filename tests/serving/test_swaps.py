"""Versions of real artefacts that change under load."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, VerificationError
from muntin.runtime.memory import resident
from muntin.runtime.session import Session
from muntin.runtime.signals import signal_stack
from muntin.serving.executor import compute_somewhere
from muntin.serving.opening import Call, Opening
from muntin.serving.probation import ArtifactLoader, Limits
from muntin.serving.rollout import Rollout
from muntin.serving.slot import Slot
from muntin.serving.version import RefusedError

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)
CALL = Call((1, 8, 8), labels=True)


def label_of(session: Session) -> int:
    labels = np.unique(session.labels(IMAGES))
    assert labels.size == 1
    return int(labels[0])


@contextmanager
def crowd(slot: Slot, labels: dict[str, int], *, threads: int = 4) -> Iterator[list[int]]:
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


def test_versions_change_under_load(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    labels = {str(number): number % 4 for number in range(1, 9)}
    paths = {name: write_version(tmp_path / name, label) for name, label in labels.items()}
    slot = Slot("model", in_process, rollout=Rollout(for_requests=20, max_slowdown=inf))
    slot.load(paths["1"], "1")
    sessions = []
    with crowd(slot, labels):
        for name in list(labels)[1:]:
            version = slot.load(paths[name], name)
            sessions.append(weakref.ref(version.session))
            wait_until(lambda version=version: len(version.latencies.of(CALL)) > 20)
    slot.settle()
    assert slot.current is not None
    assert slot.current.name == "8"
    wait_until(lambda: [session() is not None for session in sessions] == [False] * 6 + [True])


def test_engine_that_fails_under_load(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    labels, lines = {"1": 1, "2": 2}, list[str]()
    paths = {name: write_version(tmp_path / name, label) for name, label in labels.items()}
    slot = Slot("model", in_process, rollout=Rollout(for_requests=10**9, max_slowdown=inf), notify=lines.append)
    old = slot.load(paths["1"], "1")

    def die(images_BHWC: Any) -> Any:
        raise RuntimeError("Exception from src/inference: the primitive is gone")

    with crowd(slot, labels) as answers:
        new = slot.load(paths["2"], "2")
        wait_until(lambda: len(new.latencies.of(CALL)) > 20)
        with slot.lease("2"):
            new.session._infer_labels = die  # type: ignore[method-assign]
            wait_until(lambda: slot.current is old)
        before = sum(answers)
        wait_until(lambda: sum(answers) > before + 20)
    assert not new.open
    assert len([line for line in lines if "rolled back to 1" in line]) == 1


def test_broken_artefacts(write_version: Callable[..., Path], signature_of: Callable[..., Any], tmp_path: Path) -> None:
    """With the process that tries them."""
    slot = Slot("model", ArtifactLoader(opening=Opening(threads=1), limits=Limits(seconds=60)), rollout=Rollout())
    first = slot.load(write_version(tmp_path / "1", 1), "1")
    altered, wrong = write_version(tmp_path / "2", 2), write_version(tmp_path / "3", 3, shift=30)
    other = write_version(tmp_path / "4", 0, signature=signature_of(channels=4))
    incomplete = write_version(tmp_path / "5", 0)
    (altered / "weights.safetensors").write_bytes((altered / "weights.safetensors").read_bytes()[:-1] + b"?")
    (incomplete / "weights.safetensors").unlink()
    for path, kind, message in (
        (altered, ArtifactError, "content is not what"),
        (wrong, VerificationError, "golden pair"),
        (other, RefusedError, "channels 4 where 3"),
        (incomplete, ArtifactError, "missing"),
    ):
        with pytest.raises(kind, match=message):
            slot.load(path, path.name)
        assert slot.current is first
    with slot.lease() as lease:
        assert label_of(lease.version.session) == 1
    assert slot.load(write_version(tmp_path / "6", 2), "6") is slot.current


def swap(slot: Slot, paths: list[Path], count: int, wait_until: Callable[..., None]) -> int:
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
def test_memory_of_twenty_swaps(
    in_process: ArtifactLoader, write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    slot = Slot("model", in_process, rollout=Rollout(for_seconds=0))
    paths = [write_version(tmp_path / str(label), label) for label in range(4)]
    stack = signal_stack()
    before = swap(slot, paths, 8, wait_until)
    after = swap(slot, paths, 20, wait_until)
    assert (after - before) / 20 < 256 << 10
    assert signal_stack() == stack  # of this thread, on which all of them were opened
