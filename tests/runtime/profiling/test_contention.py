"""Others on our CPUs, with a real process that keeps one busy. Background load only makes others more and shares less."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Thread

import pytest

from muntin.errors import DataError
from muntin.runtime.profiling import contention
from muntin.runtime.profiling.contention import CpuTime, CpuWatch, compare, measure_cpu_share, parse_cpu_times, read_cpu_times, watch_cpu

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity and /proc/stat are Linux's")

STAT = """cpu  30 2 14 400 6 1 2 5 1 0
cpu0 10 1 7 200 3 1 1 2 1 0
cpu12 20 1 7 200 3 0 1 3 0 0
intr 329004 0 0
ctxt 5
"""
SPIN = "import os, time; os.sched_setaffinity(0, {%d}); print('busy', flush=True); end = time.time() + 60\nwhile time.time() < end: pass"


@pytest.fixture
def one_cpu() -> Iterator[int]:
    """This thread, and those that it starts, on one CPU."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    os.sched_setaffinity(0, {cpu})
    yield cpu
    os.sched_setaffinity(0, before)


@pytest.fixture
def busy_process(one_cpu: int) -> Iterator[None]:
    """Another process that wants all of that CPU."""
    with subprocess.Popen([sys.executable, "-c", SPIN % one_cpu], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            yield
        finally:
            process.kill()


def test_parse_cpu_times() -> None:
    assert parse_cpu_times(STAT) == {0: CpuTime(20, 225), 12: CpuTime(29, 235)}
    assert parse_cpu_times("cpu0 1 2 3 4\n") == {0: CpuTime(6, 10)}  # an old kernel's, without the columns for waiting and stealing
    assert parse_cpu_times("") == {}


def test_spare_cpus_of_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    spares: list[float] = []
    monkeypatch.setattr(contention, "compare", lambda *_, spare, **__: spares.append(spare))
    cpus = len(contention.affinity())
    for quota in (None, cpus + 1.0, cpus - 0.5):
        monkeypatch.setattr(contention, "cpu_quota", lambda quota=quota: quota)
        with watch_cpu():
            pass
    assert spares == [0, 0, 0.5]


def test_others_without_our_own_time() -> None:
    before = {0: CpuTime(0, 0), 1: CpuTime(500, 900), 2: CpuTime(0, 0)}
    after = {0: CpuTime(100, 100), 1: CpuTime(550, 1000), 2: CpuTime(100, 100)}
    assert compare(before, after, cpus={0, 1}, own=0.7, seconds=1.0) == pytest.approx(1.5 - 0.7)
    assert compare(before, after, cpus={0, 1}, own=0.7, seconds=1.0, spare=0.5) == pytest.approx(0.3)  # spare CPUs of a quota
    assert compare(before, after, cpus={0, 1}, own=0.7, seconds=1.0, spare=1.5) == 0
    assert compare(before, after, cpus={0}, own=1.02, seconds=1.0) == 0  # the system's steps are coarser than our own time


@pytest.mark.parametrize(
    ("cpus", "seconds", "after"),
    [
        ({0}, 0.05, {0: CpuTime(9, 9)}),
        ({0, 7}, 1.0, {0: CpuTime(9, 9)}),
        ({0}, 1.0, {0: CpuTime(5, 5)}),
        (set(), 1.0, {0: CpuTime(9, 9)}),
    ],
    ids=["too short", "a CPU that is not listed", "counts that stand still", "no CPU"],
)
def test_unknown_times(cpus: set[int], seconds: float, after: dict[int, CpuTime]) -> None:
    assert compare({0: CpuTime(5, 5)}, after, cpus=cpus, own=0.0, seconds=seconds) is None


@linux
@pytest.mark.usefixtures("busy_process")
def test_watch_beside_a_busy_process() -> None:
    with watch_cpu() as watch:
        assert watch.others is None
        time.sleep(1)
    assert watch.others is not None
    assert 0.3 <= watch.others <= 1.1


@linux
@pytest.mark.usefixtures("busy_process")
def test_share_beside_a_busy_process() -> None:
    share = measure_cpu_share(1, seconds=1.5)
    assert share.others is not None
    assert share.others >= 0.3
    assert 0 < share.share < 0.8


@linux
@pytest.mark.usefixtures("one_cpu")
def test_own_busy_threads() -> None:
    with watch_cpu() as watch:
        own, start = time.process_time(), time.perf_counter()
        threads = [Thread(target=_work, args=(1.0,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own = (time.process_time() - own) / (time.perf_counter() - start)
    assert watch.others is not None
    assert own > 0
    assert watch.others <= 1 - own + 0.15  # what one CPU had left


@linux
@pytest.mark.usefixtures("one_cpu")
def test_too_many_threads_share_a_cpu() -> None:
    share = measure_cpu_share(8, seconds=0.5)
    assert share.threads == 8
    assert 0 < share.share < 0.3


def test_share_of_two_threads() -> None:
    share = measure_cpu_share(2, seconds=0.2)
    assert 0 < share.share <= 1
    assert (share.others is None) == (not read_cpu_times())


def test_watch_of_a_failing_block() -> None:
    with pytest.raises(KeyError), watch_cpu() as watch:
        raise KeyError
    assert isinstance(watch, CpuWatch)
    assert watch.others is None  # too short a time


@pytest.mark.parametrize(("threads", "seconds"), [(0, 0.3), (-1, 0.3), (True, 0.3), (1.5, 0.3), (1, 0), (1, -1), (1, float("nan"))])
def test_wrong_arguments(threads: int, seconds: float) -> None:
    with pytest.raises(DataError, match=r"^(threads|seconds)=.*: give a "):
        measure_cpu_share(threads, seconds)


def _work(seconds: float) -> None:
    end, block = time.perf_counter() + seconds, bytes(1 << 22)
    while time.perf_counter() < end:
        hashlib.sha256(block)
