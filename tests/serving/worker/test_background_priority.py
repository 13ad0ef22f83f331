"""Priority of helper processes: idle at first, a small share after a while, and the usual share again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muntin.serving.worker import background_priority as scheduling
from muntin.serving.worker.background_priority import NICENESS, BackgroundPriority, can_restore, run_when_idle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="policies of Linux")
SLEEPS = """
import threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def sleeping() -> Iterator[int]:
    """A process of two threads."""
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def priorities_of(process: int) -> list[tuple[int, int]]:
    """Policy of each thread, and its niceness beyond this process's."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    threads = [int(entry.name) for entry in Path(f"/proc/{process}/task").iterdir()]
    return [(os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread) - usual) for thread in threads]


def share() -> int:
    """The niceness added for a small share: no process can have more than 19."""
    return min(NICENESS, 19 - os.getpriority(os.PRIO_PROCESS, 0))


@pytest.mark.skipif(not can_restore(), reason="leaving SCHED_IDLE is not allowed here")
def test_priority_idle_then_small_share_then_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    with sleeping() as process:
        BackgroundPriority(process).update()
        assert priorities_of(process) == [(os.SCHED_IDLE, 0)] * 2
        monkeypatch.setattr(scheduling, "IDLE_S", 0.0)
        priority = BackgroundPriority(process)
        priority.update()
        assert priorities_of(process) == [(os.SCHED_OTHER, share())] * 2
        priority.restore()
        priority.update()  # once is enough
        assert priorities_of(process) == [(os.SCHED_OTHER, 0)] * 2
    priority.restore()  # it has ended


def test_priority_that_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "can_restore", lambda: False)
    monkeypatch.setattr(scheduling, "IDLE_S", 0.0)
    with sleeping() as process:
        BackgroundPriority(process).update()
        assert priorities_of(process) == [(os.sched_getscheduler(0), share())] * 2


def test_run_when_idle() -> None:
    with sleeping() as process:
        run_when_idle(process)
        assert priorities_of(process) == [(os.SCHED_IDLE, 0)] * 2
    run_when_idle(process)  # it has ended
