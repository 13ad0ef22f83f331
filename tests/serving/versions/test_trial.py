"""A trial in another process: its result, and that nothing it does reaches this process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, DataError, MuntinError, VerificationError
from muntin.runtime.options import SessionOptions
from muntin.serving.versions.trial import MEMORY_SHARE, NICENESS, examine, probe
from muntin.serving.worker.opening import NotReadyError, Opened

OPTIONS = SessionOptions(threads=1)

# ---- trials that fail, in the other process ----


def ends_by_signal(path: Path, options: SessionOptions, lately: Any) -> Opened:
    os.kill(os.getpid(), int(path.name))
    raise AssertionError


def reads_nowhere(path: Path, options: SessionOptions, lately: Any) -> Opened:
    ctypes.string_at(0)
    raise AssertionError


def hangs(path: Path, options: SessionOptions, lately: Any) -> Opened:
    while True:
        pass


def hoards(path: Path, options: SessionOptions, lately: Any) -> Opened:
    kept = []
    while True:
        kept.append(np.ones(1 << 20))


def finds_no_memory(path: Path, options: SessionOptions, lately: Any) -> Opened:
    raise MemoryError


def makes_a_mistake(path: Path, options: SessionOptions, lately: Any) -> Opened:
    raise RuntimeError("first\nlast")


def leaves(path: Path, options: SessionOptions, lately: Any) -> Opened:
    os._exit(0)


def prints_and_reports(path: Path, options: SessionOptions, lately: Any) -> Opened:
    for descriptor in (1, 2):
        os.write(descriptor, b"a library's own words\n" * 50_000)  # more than a pipe holds
    adjusted = Path("/proc/self/oom_score_adj").read_text().strip()
    alarm = round(signal.getitimer(signal.ITIMER_REAL)[0])
    own_group = os.getpgid(0) == os.getpid() != os.getsid(0)
    raise DataError(f"{os.sched_getscheduler(0)} {os.nice(0)} {adjusted} {alarm} {own_group}")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions above can be imported by the other process."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for function in (ends_by_signal, reads_nowhere, hangs, hoards, finds_no_memory, makes_a_mistake, leaves, prints_and_reports):
        monkeypatch.setattr(function, "__module__", "test_trial")


def refused(path: Path, examine: Any, seconds: float = 60.0) -> str:
    with pytest.raises(VerificationError) as caught:
        probe(path, OPTIONS, [], seconds=seconds, examine=examine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"shift": 30}, VerificationError, "golden pair 0"),
        ({"activation_bits": 8}, VerificationError, "layer head, recorded with 8-bit activations, ran as"),
        ({"altered": "model.onnx"}, ArtifactError, r"model\.onnx: its content is not what"),
        ({"missing": "weights.safetensors"}, ArtifactError, r"weights\.safetensors: missing"),
    ],
)
def test_broken_artefact_is_named(
    write_version: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], kind: type[MuntinError], message: str
) -> None:
    altered, missing = changes.pop("altered", None), changes.pop("missing", None)
    path = write_version(tmp_path / "1", **changes)
    if altered:
        (path / altered).write_bytes(b"?" + (path / altered).read_bytes()[1:])
    if missing:
        (path / missing).unlink()
    with pytest.raises(kind, match=message):
        examine(path, OPTIONS, ())


def test_errors_are_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such artefact directory"):
        probe(tmp_path / "nowhere", OPTIONS, [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are watched on Linux")
@pytest.mark.parametrize(
    ("examine", "name", "seconds", "message"),
    [
        (ends_by_signal, "9", 60, "its engine ended the process that tried it: signal 9, Killed"),
        (ends_by_signal, "6", 60, "signal 6, Aborted"),
        (reads_nowhere, "x", 60, "signal 11, Segmentation fault"),
        (hangs, "x", 2, "it was not open and warm after 2 s"),
        (hoards, "x", 60, "GiB of memory (allowed: 0.40)"),
        (finds_no_memory, "x", 60, "there is no memory to open it"),
        (makes_a_mistake, "x", 60, "its engine ended the process that tried it: exit code 1: "),
        (leaves, "x", 60, "the process that tried it ended without an answer"),
    ],
)
def test_process_that_fails_is_one_line(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examine: Any, name: str, seconds: float, message: str
) -> None:
    monkeypatch.setattr("muntin.serving.versions.trial.memory_gib", lambda: 0.4 / MEMORY_SHARE)
    line = refused(tmp_path / name, examine, seconds)
    assert line.startswith(f"{tmp_path / name}: ")
    assert message in line


def test_process_that_the_kernel_ended(importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = count(3)
    for module in ("versions.trial", "worker.launch"):
        monkeypatch.setattr(f"muntin.serving.{module}.kills_for_memory", lambda: next(ended))
    assert "signal 9, Killed: out of memory: free some, or lower --max-batch" in refused(tmp_path / "9", ends_by_signal)
    assert refused(tmp_path / "6", ends_by_signal).endswith("signal 6, Aborted")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read in Linux's form")
def test_priority_and_limits_of_the_process(importable: None, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        probe(tmp_path, OPTIONS, [], seconds=100, examine=prints_and_reports)
    policy, nice, adjusted, alarm, own_group = str(caught.value).split()
    assert (int(policy), int(nice)) == (os.SCHED_OTHER, min(19, os.nice(0) + NICENESS))
    assert (adjusted, own_group) == ("1000", "True")
    assert 95 <= int(alarm) <= 105


def test_trial_ends_with_the_server(importable: None, tmp_path: Path) -> None:
    stopped = threading.Event()
    timer = threading.Timer(0.2, stopped.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(NotReadyError, match="ended with the server"):
        probe(tmp_path, OPTIONS, [], stopped=stopped.is_set, examine=hangs)
    timer.join()
    assert time.monotonic() - started < 10
