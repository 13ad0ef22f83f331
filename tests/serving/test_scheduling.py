"""Short turns: given by this kernel or not, and never to a thread that has a policy of its own. Standing back, and the way back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muntin.serving import scheduling
from muntin.serving.scheduling import (
    BACK,
    RUNS_S,
    SLICE_S,
    STANDS_S,
    Demand,
    Pace,
    Standing,
    stand_back,
    take_short_turns,
    take_usual_turns,
)

LINUX = sys.platform.startswith("linux") and platform.machine() in ("x86_64", "aarch64")


def in_thread(*before: object) -> list[bool]:
    found: list[bool] = []

    def run() -> None:
        for call in before:
            assert callable(call)
            call()
        found.append(take_short_turns())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


@pytest.mark.skipif(not LINUX, reason="no such system call")
def test_it_is_given_where_the_kernel_has_turns_of_a_length() -> None:
    (given,) = in_thread()
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    assert given or release < (6, 12)


@pytest.mark.skipif(not LINUX, reason="no such system call")
def test_the_policy_and_the_niceness_of_a_thread_stay() -> None:
    found: list[int] = []
    given = in_thread(lambda: os.nice(3), take_short_turns, lambda: found.append(os.nice(0)))
    assert found == [os.nice(0) + 3]
    assert len(given) == 1
    assert in_thread(lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))) == [False]


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert in_thread() == [False]


SLEEPS = """
import os, sys, threading, time
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def standing_back() -> Iterator[int]:
    """A process of two threads that does."""
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def standing_of(process: int) -> list[tuple[int, int]]:
    """Policy of each thread, and its niceness beyond this process's."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    threads = [int(entry.name) for entry in Path(f"/proc/{process}/task").iterdir()]
    return [(os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread) - usual) for thread in threads]


@pytest.mark.skipif(not LINUX or not Standing.allowed(), reason="the way back is not allowed here")
def test_a_process_that_stands_back_gets_a_share_after_a_while_and_then_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "IDLE_S", 0.0)
    late = Standing()
    monkeypatch.setattr(scheduling, "IDLE_S", 60.0)
    early = Standing()
    with standing_back() as process:
        early.mind(process)
        assert standing_of(process) == [(os.SCHED_IDLE, 0)] * 2
        late.mind(process)
        back = min(BACK, 19 - os.nice(0))  # nobody is nicer than 19
        assert standing_of(process) == [(os.SCHED_OTHER, back)] * 2
        early.usual(process)
        assert standing_of(process) == [(os.SCHED_OTHER, 0)] * 2
        late.mind(process)  # once is enough
        assert standing_of(process) == [(os.SCHED_OTHER, 0)] * 2
        stand_back(process)
        assert standing_of(process) == [(os.SCHED_IDLE, 0)] * 2
    stand_back(process)  # it is gone
    early.usual(process)


def state_of(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def paced(demand: Callable[[], Demand]) -> Iterator[tuple[int, Pace]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with Pace(process, demand) as pace:
            yield process.pid, pace
        assert state_of(process.pid) != "T"  # the block has ended
        process.kill()


@pytest.mark.skipif(not LINUX, reason="states are read in Linux's form")
def test_a_process_is_paced_while_others_are_served(wait_until: Callable[..., None]) -> None:
    demand = [Demand.SERVED]
    with paced(lambda: demand[0]) as (process, pace):
        for _ in range(3):
            wait_until(lambda: state_of(process) == "T")
            wait_until(lambda: state_of(process) != "T")
        demand[0] = Demand.NONE
        wait_until(lambda: state_of(process) != "T")
        time.sleep(STANDS_S)
        excused = pace.excused
        assert excused >= 3 * STANDS_S
        time.sleep(3 * RUNS_S)
        assert pace.excused == excused
        demand[0] = Demand.SERVED
        wait_until(lambda: state_of(process) == "T")


@pytest.mark.skipif(not LINUX, reason="states are read in Linux's form")
def test_a_process_stands_still_while_others_wait_and_does_not_starve(wait_until: Callable[..., None]) -> None:
    demand, began = [Demand.WAITING], time.monotonic()
    with paced(lambda: demand[0]) as (process, pace):
        for _ in range(3):
            wait_until(lambda: state_of(process) == "T")
            stands = time.monotonic()
            wait_until(lambda: state_of(process) != "T")
            assert time.monotonic() - stands > 1.5 * STANDS_S
        assert pace.excused < (time.monotonic() - began) / 2  # a limit on its time comes to its end though somebody waits for ever
        demand[0] = Demand.SERVED
        wait_until(lambda: state_of(process) == "T")
        wait_until(lambda: state_of(process) != "T")


@pytest.mark.skipif(not LINUX, reason="states are read in Linux's form")
def test_where_somebody_always_waits_pacing_ends(monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]) -> None:
    monkeypatch.setattr(scheduling, "STANDS_IN_ALL_S", 0.3)
    with paced(lambda: Demand.WAITING) as (process, _):
        wait_until(lambda: state_of(process) == "T")
        wait_until(lambda: all(thread.name != "muntin-pace" for thread in threading.enumerate()))
        assert state_of(process) != "T"


@pytest.mark.skipif(not LINUX, reason="states are read in Linux's form")
def test_who_is_paced_may_end() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process, Pace(process, lambda: Demand.SERVED):
        process.kill()
        process.wait()
        time.sleep(2 * RUNS_S)  # it goes on without it


@pytest.mark.skipif(not LINUX, reason="no such system call")
def test_short_turns_are_inherited_and_the_usual_ones_come_back() -> None:
    found: list[int] = []

    def turn() -> None:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/sched").read_text()
        found.append(int(next(line for line in text.splitlines() if line.startswith("se.slice")).split()[-1]))

    def child() -> None:
        thread = threading.Thread(target=turn)
        thread.start()
        thread.join()

    if not Path("/proc/self/sched").exists() or "se.slice" not in Path("/proc/self/sched").read_text():
        pytest.skip("this kernel does not tell")
    (given,) = in_thread(turn, take_short_turns, child, take_usual_turns, child)
    usual, short, again = found
    assert short == round(SLICE_S * 1e9) if given else short == usual
    assert again == usual
