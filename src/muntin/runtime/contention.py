"""Is something else using the cores that this process was given?

Timings on shared cores say little, and nothing in them tells so. Two questions are asked here of the system: how much CPU time do busy
threads of ours receive, and how much do others use meanwhile on the CPUs that we may run on. The first falls for any reason (other
processes, a container's quota, a hypervisor), the second names the commonest.

    share    CPU time received / wall time, of threads that would use all of it
    others   busy time of our CPUs in /proc/stat, less this process's own, as so many cores' worth; of more CPUs than a container's quota
             lets us use, what goes beyond those that are left over
    stolen   time in which our CPUs' hypervisor ran somebody else, as a share of the wall time
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
from muntin.runtime.hardware import affinity, cpu_quota
from muntin.runtime.options import check_threads

BUSY = 0.1
"""Cores' worth of other processes' CPU time above which a time is not to be believed."""
SHORTEST = 0.1
"""Seconds below which the system's count of CPU time, of 10 ms a step, says nothing."""
_BLOCK = bytes(1 << 22)  # hashed without the GIL for milliseconds: taking it again costs nothing beside that


@dataclass(frozen=True, kw_only=True)
class CpuShare:
    """What busy threads received. `share`: 0 to 1, CPU time over wall time. `others`: cores' worth of CPU time that other processes used
    meanwhile on our CPUs, None where the system does not say."""

    threads: int
    share: float
    others: float | None


class CpuWatch:
    """What others did to our CPUs during a block. None before its end, for a block under `SHORTEST`, and where the system does not say.

    `others`: cores' worth of CPU time that other processes used on our CPUs, children of this one included. `stolen`: the share of the
    wall time, 0 to 1, that a hypervisor gave to somebody else, on average over our CPUs. `seconds`: the block's wall time.
    """

    def __init__(self) -> None:
        self.others: float | None = None
        self.stolen: float | None = None
        self.seconds: float | None = None


@dataclass(frozen=True)
class CpuTime:
    """One CPU's counts since the machine started, in steps of the system's clock (a 100th of a second)."""

    busy: int
    stolen: int
    total: int


@contextmanager
def watch_cpu() -> Iterator[CpuWatch]:
    """Measures around a block: `with watch_cpu() as watch: ...`, then `watch.others`. Costs reading some small files.

    Threads of this process are not others, whatever they do. Only the CPUs count that the calling thread may run on.
    """
    watch, cpus = CpuWatch(), affinity()
    before, own, start = read_cpu_times(), time.process_time(), time.perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - start
        own = time.process_time() - own
        quota = cpu_quota()
        spare = 0.0 if quota is None else max(0.0, len(cpus) - quota)
        usage = compare(before, read_cpu_times(), cpus=cpus, own=own, seconds=watch.seconds, spare=spare)
        if usage is not None:
            watch.others, watch.stolen = usage


def notes_on(others: float | None) -> list[str]:
    """What makes times doubtful that were measured while other processes used so many cores' worth of our CPUs, if anything."""
    if others is None or others < BUSY:
        return []
    return [f"other processes used {others:.1f} cores meanwhile: the times are too long; measure alone"]


def measure_cpu_share(threads: int, seconds: float = 0.3) -> CpuShare:
    """Keeps `threads` threads busy for so many seconds and says how much CPU time they got.

    More threads than cores share them: their share is then at most cores / threads with nobody else there. Raises DataError for a number
    of threads or seconds that is not positive.
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
    """Hashes for so long: when it began and ended, and the CPU time that it got between."""
    barrier.wait()
    start, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < seconds:
        hashlib.sha256(_BLOCK)
    return start, time.perf_counter(), time.thread_time() - used


def read_cpu_times() -> dict[int, CpuTime]:
    """Every CPU's counts by its number, from /proc/stat; empty where there is none."""
    try:
        return parse_cpu_times(Path("/proc/stat").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return {}


def parse_cpu_times(stat: str) -> dict[int, CpuTime]:
    """Every CPU's counts in the text of /proc/stat (proc(5): user, nice, system, idle, iowait, irq, softirq, steal, then guests, whose
    time is in user and nice already)."""
    times = {}
    for line in stat.splitlines():
        name, *columns = line.split() or [""]
        number = name.removeprefix("cpu")
        if not (name.startswith("cpu") and number.isdigit()):
            continue
        user, nice, system, idle, iowait, irq, softirq, steal = (int(text) for text in (*columns, *"00000000")[:8])
        busy = user + nice + system + irq + softirq
        times[int(number)] = CpuTime(busy, steal, busy + steal + idle + iowait)
    return times


def compare(
    before: Mapping[int, CpuTime], after: Mapping[int, CpuTime], *, cpus: set[int], own: float, seconds: float, spare: float = 0.0
) -> tuple[float, float] | None:
    """Others' and the hypervisor's part between two readings: (cores' worth, share of the wall time).

    `own`: seconds of CPU time that this process used meanwhile. `spare`: cores' worth that others may use and take nothing from us. None
    where nothing can be said: too short a time, a CPU of ours that is not listed (a container with numbers of its own), or counts that
    stand still (some sandboxes).
    """
    if seconds < SHORTEST or not cpus or not (cpus <= before.keys() and cpus <= after.keys()):
        return None
    busy, stolen, total = (
        sum(getattr(after[cpu], field) - getattr(before[cpu], field) for cpu in cpus) for field in ("busy", "stolen", "total")
    )
    if total <= 0:
        return None
    # Shares of what was counted, not of the clock: a count lags behind it by up to a step a CPU.
    others = len(cpus) * busy / total - own / seconds - spare
    return max(0.0, others), max(0.0, stolen / total)
