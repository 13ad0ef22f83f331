"""Short turns: given by this kernel or not, and never to a thread that has a policy of its own. Standing back: there and back."""

from __future__ import annotations

import os
import platform
import sys
import threading

import pytest

from muntin.serving import scheduling
from muntin.serving.scheduling import BACK, stand_back, standing_back, take_short_turns

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


def niceness_of_threads() -> list[int]:
    """Of a thread inside the block, of one that it starts there, and of both after it, beyond this one's."""
    found: list[int] = []
    inside, end = threading.Event(), threading.Event()

    def look() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, 0) - os.getpriority(os.PRIO_PROCESS, threading.main_thread().native_id or 0))

    def child() -> None:
        look()
        inside.set()
        end.wait()
        look()

    def run() -> None:
        with standing_back():
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
    back = min(BACK, 19 - os.nice(0))  # nobody is nicer than 19
    assert niceness_of_threads() == [back, back, 0, 0]


@pytest.mark.skipif(not LINUX, reason="each thread has its own niceness on Linux")
def test_where_there_is_no_way_back_nobody_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_may_come_back", lambda: False)
    assert niceness_of_threads() == [0, 0, 0, 0]


@pytest.mark.skipif(not LINUX, reason="threads of other systems have no niceness of their own")
def test_a_thread_that_stands_back_for_good_changes_nobody_else() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found: list[int] = []

    def run() -> None:
        stand_back()
        found.append(niceness())

    thread = threading.Thread(target=run)
    before = niceness()
    thread.start()
    thread.join()
    assert (found, niceness()) == ([min(before + BACK, 19)], before)
