"""Threads that nobody waits for longer than he likes, the end of the process included."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from muntin.serving.threads import Threads


def test_calls_are_made_and_give_what_they_give() -> None:
    threads = Threads("t")
    assert threads.submit(lambda x, y: x + y, 1, y=2).result(20) == 3
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(20)
    threads.join(20)


@pytest.mark.parametrize("most", [1, 3, None])
def test_so_many_run_at_the_same_time_and_the_others_wait_in_their_order(most: int | None) -> None:
    threads, free, lock = Threads("t", most=most), threading.Event(), threading.Lock()
    begun: list[int] = []

    def call(number: int) -> int:
        with lock:
            begun.append(number)
        assert free.wait(20)
        return number

    made = [threads.submit(call, number) for number in range(6)]
    while len(begun) < (most or 6):
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(begun) == (most or 6)
    free.set()
    assert [future.result(20) for future in made] == list(range(6))
    if most == 1:
        assert begun == list(range(6))
    while threads._count:  # they end when there is nothing to do
        time.sleep(0.001)
    assert threads.submit(call, 7).result(20) == 7


def test_a_call_that_gets_no_thread_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = Threads("t", most=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            threads.submit(int)
    assert threads.pending == 0
    assert threads.submit(int).result(20) == 0


def test_what_goes_on_is_waited_for_so_long_and_what_waits_is_given_up() -> None:
    threads, free = Threads("t", most=1), threading.Event()
    hung, waits = threads.submit(free.wait, 20), threads.submit(int)
    started = time.monotonic()
    threads.give_up()
    threads.join(0.05)
    assert time.monotonic() - started < 10
    assert not hung.done()
    assert threads.pending == 1
    with pytest.raises(CancelledError):
        waits.result(20)
    free.set()
    threads.join(None)
    assert hung.done()


def test_the_process_ends_all_the_same() -> None:
    program = "import time\nfrom muntin.serving.threads import Threads\nThreads('t', most=1).submit(time.sleep, 600)\n"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_calls_that_are_cancelled_while_they_wait_do_not_pile_up() -> None:
    threads, let_go, begun = Threads("muntin-test", most=1), threading.Event(), threading.Event()

    def stand_still() -> None:
        begun.set()
        let_go.wait(60)

    first = threads.submit(stand_still)
    assert begun.wait(60)
    waiting = [threads.submit(int) for _ in range(3)]
    for future in waiting[:2]:
        assert future.cancel()
    assert (len(threads._waiting), threads.pending) == (1, 2)
    let_go.set()
    assert (first.result(60), waiting[2].result(60)) == (None, 0)


@pytest.mark.usefixtures("uncollected")
def test_who_keeps_what_came_of_a_call_does_not_keep_what_it_was_given() -> None:
    class Given:
        pass

    def call(given: object) -> int:
        assert free.wait(20)
        return 1

    threads, free, given = Threads("t"), threading.Event(), Given()
    gone = weakref.ref(given)
    made = threads.submit(call, given)
    del given
    free.set()
    assert made.result(20) == 1
    end = time.monotonic() + 20
    while threads._count and time.monotonic() < end:
        time.sleep(0.001)
    assert gone() is None
