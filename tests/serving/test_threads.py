"""Threads that are waited for as long as the caller likes, also at the end of the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from muntin.serving.threads import Threads


@pytest.mark.parametrize("most", [1, 3])
def test_number_and_order_of_calls(most: int) -> None:
    threads, free, lock = Threads("t", most=most), threading.Event(), threading.Lock()
    started: list[int] = []

    def call(number: int, *, fails: bool = False) -> int:
        with lock:
            started.append(number)
        assert free.wait(20)
        if fails:
            raise ValueError(number)
        return number

    futures = [threads.submit(call, number) for number in range(6)]
    failing = threads.submit(call, 6, fails=True)
    while len(started) < most:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(started) == most
    free.set()
    assert [future.result(20) for future in futures] == list(range(6))
    with pytest.raises(ValueError, match="6"):
        failing.result(20)
    assert most != 1 or started == list(range(7))
    while threads._count:  # they end when no call waits
        time.sleep(0.001)
    assert threads.submit(call, 7).result(20) == 7


def test_call_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = Threads("t", most=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            threads.submit(int)
    assert threads.pending == 0
    assert threads.submit(int).result(20) == 0


def test_join_and_cancel_behind_a_call_that_hangs() -> None:
    threads, free, entered = Threads("t", most=1), threading.Event(), threading.Event()
    hanging = threads.submit(lambda: (entered.set(), free.wait(20)))
    assert entered.wait(20)
    cancelled, given_up = threads.submit(int), threads.submit(int)
    assert cancelled.cancel()
    assert (len(threads._waiting), threads.pending) == (1, 2)
    threads.give_up()
    with pytest.raises(CancelledError):
        given_up.result(20)
    threads.join(0.05)
    assert (hanging.done(), threads.pending) == (False, 1)
    free.set()
    threads.join(None)
    assert hanging.done()


def test_process_ends_although_a_call_hangs() -> None:
    program = "import time\nfrom muntin.serving.threads import Threads\nThreads('t', most=1).submit(time.sleep, 600)\n"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


@pytest.mark.usefixtures("uncollected")
def test_result_does_not_hold_the_arguments() -> None:
    class Argument:
        pass

    def call(argument: object) -> int:
        assert free.wait(20)
        return 1

    threads, free, argument = Threads("t", most=1), threading.Event(), Argument()
    gone = weakref.ref(argument)
    future = threads.submit(call, argument)
    del argument
    free.set()
    assert future.result(20) == 1
    end = time.monotonic() + 20
    while threads._count and time.monotonic() < end:
        time.sleep(0.001)
    assert gone() is None
