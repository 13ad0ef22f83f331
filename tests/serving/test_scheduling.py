"""Short turns: given by this kernel or not, and never to a thread that has a policy of its own. Standing back: there and back."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time

import pytest

from muntin.serving import scheduling
from muntin.serving.scheduling import BACK, standing_back, take_short_turns

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


def standing_of_threads(*, seconds: float = 0.0) -> list[tuple[int, int]]:
    """Policy and niceness (beyond this one's) of a thread in the block after `seconds`, of one that it starts, and of both after it."""
    found: list[tuple[int, int]] = []
    inside, end = threading.Event(), threading.Event()

    def look() -> None:
        mine, usual = (os.getpriority(os.PRIO_PROCESS, thread or 0) for thread in (0, threading.main_thread().native_id))
        found.append((os.sched_getscheduler(0), mine - usual))

    def child() -> None:
        look()
        inside.set()
        end.wait()
        look()

    def run() -> None:
        with standing_back():
            time.sleep(seconds)
            look()
            other = threading.Thread(target=child)
            other.start()
            inside.wait()
        look()
        end.set()
        other.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


@pytest.mark.skipif(not LINUX or not scheduling._may_come_back(), reason="the way back is not allowed here")
def test_standing_back_ends_with_the_block_for_threads_that_were_started_in_it_too() -> None:
    idle, usual = (os.SCHED_IDLE, 0), (os.SCHED_OTHER, 0)
    assert standing_of_threads() == [idle, idle, usual, usual]


@pytest.mark.skipif(not LINUX or not scheduling._may_come_back(), reason="the way back is not allowed here")
def test_who_stands_back_for_long_gets_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "IDLE_S", 0.01)
    back = min(BACK, 19 - os.nice(0))  # nobody is nicer than 19
    nice, usual = (os.SCHED_OTHER, back), (os.SCHED_OTHER, 0)
    assert standing_of_threads(seconds=0.5) == [nice, nice, usual, usual]


@pytest.mark.skipif(not LINUX, reason="each thread has its own standing on Linux")
def test_where_there_is_no_way_back_nobody_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_may_come_back", lambda: False)
    assert standing_of_threads() == [(os.SCHED_OTHER, 0)] * 4
