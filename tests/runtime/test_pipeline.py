from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from threading import Event, Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.runtime.pipeline import StoppedError, ordered, prefetched


def pipeline_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("muntin-pipeline", "muntin-prefetch"))]


@settings(max_examples=40, deadline=None)
@given(costs=st.lists(st.integers(0, 9), max_size=30), workers=st.integers(1, 5), window=st.integers(1, 9), capacity=st.integers(0, 12))
def test_order_window_and_capacity(costs: list[int], workers: int, window: int, capacity: int) -> None:
    lock, running, taken, read = Lock(), [0], [0], [0]
    loads: list[tuple[int, int]] = []

    def items() -> Iterator[tuple[int, int]]:
        for number, cost in enumerate(costs):
            read[0] += 1
            assert read[0] - taken[0] <= window
            yield number, cost

    def compute(item: tuple[int, int]) -> int:
        with lock:
            running[0] += 1
            load.append(item[1])
            loads.append((running[0], sum(load)))
        time.sleep(0.0002 * (item[0] % 3))
        with lock:
            running[0] -= 1
            load.remove(item[1])
        return item[0]

    load: list[int] = []
    values = []
    for value in ordered(compute, items(), workers=workers, window=window, cost=lambda item: item[1], capacity=capacity):
        values.append(value)
        taken[0] += 1
    assert values == list(range(len(costs)))
    assert all(number <= workers and (total <= capacity or number == 1) for number, total in loads)
    assert not pipeline_threads()


@pytest.mark.parametrize("failing", ["function", "items"])
def test_order_of_errors(failing: str) -> None:
    def fail(number: int, where: str) -> int:
        if number == 3 and where == failing:
            raise ValueError(where)
        time.sleep(0.003 if number == 0 else 0)
        return number

    stop, values = Event(), []
    items = (fail(number, "items") for number in range(9))
    with pytest.raises(ValueError, match=failing):
        for value in ordered(lambda item: fail(item, "function"), items, workers=4, window=2, stop=stop):
            values.append(value)
    assert values == [0, 1, 2] and stop.is_set()
    assert not pipeline_threads()


def test_early_close() -> None:
    stop, begun = Event(), []

    def compute(number: int) -> int:
        begun.append(number)
        if number > 1 and stop.wait(60):
            raise StoppedError
        return number

    values = ordered(compute, range(1000), workers=2, window=8, stop=stop)
    assert [next(values), next(values)] == [0, 1]
    values.close()
    assert stop.is_set() and len(begun) <= 8
    assert not pipeline_threads()


def test_slow_first_item() -> None:
    others = Event()

    def compute(number: int) -> int:
        if number == 0:
            assert others.wait(60)
        if number == 40:
            others.set()
        return number

    assert list(ordered(compute, range(50), workers=2, cost=lambda item: 1, capacity=4)) == list(range(50))


INTERRUPTED = """
import signal, threading
from contextlib import closing
from threading import Event
from muntin.runtime.pipeline import StoppedError, ordered, prefetched
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of the background
stop = Event()
def compute(number):
    if number == 1:
        print("begun", flush=True)
    stop.wait()
    raise StoppedError
def endless():
    number = 0
    while True:
        yield number
        number += 1
try:
    with closing(prefetched(endless())) as numbers:
        for value in ordered(compute, numbers, workers=2, window=3, stop=stop):
            pass
except KeyboardInterrupt:
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print("interrupted", left, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sends a signal")
def test_interrupt() -> None:
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(0.3)  # until the main thread waits for a result
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output.splitlines()[-1] == "interrupted []"


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 8), depth=st.integers(1, 4), taken=st.integers(0, 9))
def test_prefetched_order_and_depth(count: int, depth: int, taken: int) -> None:
    read = []

    def items() -> Iterator[int]:
        for number in range(count):
            read.append(number)
            yield number

    values = prefetched(items(), depth)
    assert [value for value, _ in zip(values, range(taken), strict=False)][:taken] == list(range(min(count, taken)))
    assert len(read) <= taken + 1 + depth
    values.close()
    assert not pipeline_threads()


def test_prefetched_error() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("gone")

    values, read = [], prefetched(items())
    with pytest.raises(OSError, match="gone"):
        for value in read:
            values.append(value)
    assert values == [0, 1, 2] and not pipeline_threads()
