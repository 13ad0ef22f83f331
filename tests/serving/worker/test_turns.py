"""A process that opens an artefact takes turns with requests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from muntin.runtime.options import SessionOptions
from muntin.serving.worker import turns
from muntin.serving.worker.remote_session import open_remote
from muntin.serving.worker.turns import Turns, can_take_turns
from serving_parts import image_call, state_of

pytestmark = pytest.mark.skipif(not can_take_turns(), reason="no process is stopped for others here")


@pytest.fixture
def sleeper() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process.pid
        process.kill()


def test_stopped_while_requests_are_computed(sleeper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "STOPPED_S", 20.0)  # however slow this machine is
    states: list[str] = []

    def busy() -> bool:
        states.append(state_of(sleeper))
        return len(states) < 4

    Turns(sleeper, busy).pause()
    assert states[0] != "T" and states[-1] == "T"
    assert state_of(sleeper) != "T"
    Turns(sleeper, busy).pause()  # no request is computed
    assert len(states) == 5


def test_stopped_for_a_bounded_time(sleeper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less and less of it, and in the end not at all."""
    polls: list[float] = []

    def busy() -> bool:
        polls.append(time.monotonic())
        return True

    Turns(sleeper, busy).pause()
    assert len(polls) > 2
    monkeypatch.setattr(turns, "PATIENCE_S", 1e-6)
    late = Turns(sleeper, busy)
    time.sleep(0.001)
    polls.clear()
    late.pause()
    assert not polls


def test_process_that_has_ended(sleeper: int) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    Turns(process.pid, lambda: True).pause()


def test_opening_beside_requests(write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[int] = []
    pause = Turns.pause

    def counted(self: Turns) -> None:
        pauses.append(1)
        pause(self)

    monkeypatch.setattr(Turns, "pause", counted)
    path, options = write_version(tmp_path / "1", 3), SessionOptions(threads=1)
    opened = open_remote(path, options, [image_call((1, 8, 8), labels=True)], seconds=60.0, busy=lambda: len(pauses) < 20)
    assert pauses
    assert state_of(opened.session.process_ids[0]) != "T"
    opened.session.close()


SERVER = """
import os, signal, subprocess, sys
opening = "import signal, time; from muntin.serving.worker.turns import end_with_parent; "
opening += "end_with_parent(signal.SIGKILL); print(flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", opening], stdout=subprocess.PIPE)
process.stdout.readline()
os.kill(process.pid, signal.SIGSTOP)
print(process.pid, flush=True)
os._exit(0)
"""


def test_stopped_process_ends_with_its_server(wait_until: Any) -> None:
    server = subprocess.run([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, check=True, timeout=60)
    wait_until(lambda: state_of(int(server.stdout)) in "ZX")
