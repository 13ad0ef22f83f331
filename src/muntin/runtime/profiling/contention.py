"""Measures whether other work uses the cores of this process, which makes timings wrong.

share    CPU time received / wall time, of threads that would use all of it; lowered by other processes, quotas and hypervisors
others   cores' worth of busy time of our CPUs in /proc/stat, less this process's own; where a container's quota allows fewer CPUs than
         there are, less the spare ones
stolen   share of the wall time that the hypervisor gave to other guests
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

from muntin.errors import DataError
from muntin.runtime.host.hardware import affinity, cpu_quota, physical_cores
from muntin.runtime.options import check_threads
from muntin.text import count

BUSY = 0.1
"""Cores' worth of other processes' CPU time from which on timings are doubtful."""
BUSY_MACHINE = 0.25
"""Cores' worth of other processes' CPU time from which on a machine counts as busy before anything is measured."""
SHORTEST = 0.1
"""Seconds below which the system's count of CPU time, in steps of 10 ms, is too coarse."""
_BLOCK = bytes(1 << 22)  # hashing it takes milliseconds, without the GIL


@dataclass(frozen=True, kw_only=True)
class CpuShare:
    """CPU time of busy threads. `share`: 0 to 1, CPU time over wall time. `others`: cores' worth of CPU time that other processes used
    meanwhile on our CPUs, None where unknown."""

    threads: int
    share: float
    others: float | None


class CpuWatch:
    """Other work on our CPUs during a block. `others`: cores' worth of CPU time of other processes, child processes included; None before
    the block's end, for a block shorter than `SHORTEST`, and where unknown."""

    def __init__(self) -> None:
        self.others: float | None = None


@dataclass(frozen=True)
class CpuTime:
    """One CPU's counts since boot, in steps of the system's clock (1/100 s). `total` includes time of other guests of the host."""

    busy: int
    total: int


@contextmanager
def watch_cpu() -> Iterator[CpuWatch]:
    """Measures a block: `with watch_cpu() as watch: ...`, then `watch.others`. Costs reading some small files.

    Threads of this process do not count as others. Only CPUs that the calling thread may run on count.
    """
    watch = CpuWatch()
    before, own, started = read_cpu_times(), time.process_time(), time.perf_counter()
    try:
        yield watch
    finally:
        watch.others = others_since(before, own=own, started=started)


def others_since(before: Mapping[int, CpuTime], *, own: float, started: float) -> float | None:
    """Cores' worth of CPU time of other processes on our CPUs since a reading; None for less than `SHORTEST` and where unknown.

    `own`, `started`: `time.process_time()` and `time.perf_counter()` at the reading.
    """
    seconds, own = time.perf_counter() - started, time.process_time() - own
    cpus, quota = affinity(), cpu_quota()
    spare = 0.0 if quota is None else max(0.0, len(cpus) - quota)
    return compare(before, read_cpu_times(), cpus=cpus, own=own, seconds=seconds, spare=spare)


def notes_on(others: float | None, *, threads: int = 1) -> list[str]:
    """Notes for timings of `threads` threads that were measured while other processes used `others` cores' worth of our CPUs."""
    notes, cores = [], physical_cores()
    if others is not None and others >= BUSY:
        notes.append(f"other processes used {others:.1f} cores meanwhile: the times are too long; measure alone")
    if threads > cores:
        notes.append(
            f"{count(threads, 'thread')} on {count(cores, 'physical core')}: they wait for each other; compare with --threads {cores}"
        )
    return notes


def notes_at_start(others: float | None) -> list[str]:
    """A note for work that begins while other processes use `others` cores' worth of our CPUs."""
    if others is None or others < BUSY_MACHINE:
        return []
    advice = "stop other programs (see `top`), or use fewer threads"
    return [f"{others_use(others, len(affinity()))}: this takes longer, and its timings are unreliable: {advice}"]


def others_use(others: float, cpus: int) -> str:
    return f"other processes use {others:.1f} of our {count(cpus, 'CPU')}"


def measure_cpu_share(threads: int, seconds: float = 0.3) -> CpuShare:
    """Keeps `threads` threads busy for `seconds` and measures their CPU time.

    More threads than cores get at most cores / threads of the time each. Raises DataError for a number that is not positive.
    """
    check_threads(threads)
    if not seconds > 0:
        raise DataError(f"seconds={seconds!r}: give a positive number")
    barrier = Barrier(threads)
    with watch_cpu() as watch, ThreadPoolExecutor(threads) as pool:
        times = [future.result() for future in [pool.submit(_spin, barrier, seconds) for _ in range(threads)]]
    start = min(start for start, _, _ in times)
    wall = sum(end - start for _, end, _ in times)
    return CpuShare(threads=threads, share=min(1.0, sum(used for _, _, used in times) / wall), others=watch.others)


def _spin(barrier: Barrier, seconds: float) -> tuple[float, float, float]:
    """Hashes for `seconds`. Returns start, end and the CPU time between."""
    barrier.wait()
    start, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < seconds:
        hashlib.sha256(_BLOCK)
    return start, time.perf_counter(), time.thread_time() - used


def read_cpu_times() -> dict[int, CpuTime]:
    """Counts of every CPU by number, from /proc/stat; empty where that is missing."""
    try:
        return parse_cpu_times(Path("/proc/stat").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return {}


def parse_cpu_times(stat: str) -> dict[int, CpuTime]:
    """Counts of every CPU in the text of /proc/stat (proc(5): user, nice, system, idle, iowait, irq, softirq, steal, then guests, whose
    time is included in user and nice)."""
    times = {}
    for line in stat.splitlines():
        name, *columns = line.split() or [""]
        number = name.removeprefix("cpu")
        if not (name.startswith("cpu") and number.isdigit()):
            continue
        user, nice, system, idle, iowait, irq, softirq, steal = (int(text) for text in (*columns, *"00000000")[:8])
        busy = user + nice + system + irq + softirq
        times[int(number)] = CpuTime(busy, busy + steal + idle + iowait)
    return times


def compare(
    before: Mapping[int, CpuTime], after: Mapping[int, CpuTime], *, cpus: set[int], own: float, seconds: float, spare: float = 0.0
) -> float | None:
    """Cores' worth of CPU time of other processes between two readings.

    `own`: seconds of CPU time of this process. `spare`: cores' worth that others may use without slowing us. None where unknown: too short
    a time, a CPU of ours that is not listed (a container with its own numbers), or counts that do not change (some sandboxes).
    """
    if seconds < SHORTEST or not cpus or not (cpus <= before.keys() and cpus <= after.keys()):
        return None
    busy = sum(after[cpu].busy - before[cpu].busy for cpu in cpus)
    total = sum(after[cpu].total - before[cpu].total for cpu in cpus)
    if total <= 0:
        return None
    # Relative to the counted time, which lags behind the clock by up to a step for each CPU.
    return max(0.0, len(cpus) * busy / total - own / seconds - spare)
