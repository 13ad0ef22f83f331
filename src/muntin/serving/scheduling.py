"""How the operating system shares a core between the thread that reads and answers and those that compute."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Self

SLICE_S = 0.0001
"""The shortest that Linux takes."""
IDLE_S = 60.0
"""Seconds after which a process that stands back gets a share though no core is idle."""
RUNS_S, STANDS_S = 0.02, 0.06
"""Of a process that is paced: for so long it runs, for so long it stands still."""
LEAST_S, STANDS_LONG_S = 0.01, 0.15
"""The same while somebody waits: what it runs at the least, what it stands at the most."""
STANDS_IN_ALL_S = 60.0
"""What it stands still for altogether."""
LOOK_S = 0.005
"""Between two looks whether anybody does."""
PATIENCE = (RUNS_S + STANDS_S) / RUNS_S
"""How many times as long it takes."""
BACK = 10
"""How much nicer it is then: a tenth of the usual weight (kernel/sched/core.c, sched_prio_to_weight)."""
_SET, _GET = {"x86_64": (314, 315), "aarch64": (274, 275)}.get(platform.machine(), (None, None))
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # sched_attr: size, policy, flags, nice, priority, runtime, deadline, period


def take_short_turns() -> bool:
    """Asks for short turns on the core for the calling thread and those, and the processes, that it starts from now on; says whether they
    were given.

    A thread that answers need not wait then until an engine on its core has had a turn of milliseconds, and one that works in the
    background makes nobody wait so long. From Linux 6.12 on a thread that wakes and wants a shorter turn interrupts a longer one (EEVDF,
    `PREEMPT_SHORT`). It gets no more of the core by that, and needs no privilege. Elsewhere nothing changes.
    """
    return _take_turns_of(SLICE_S)


def take_usual_turns(thread: int = 0) -> bool:
    """The way back from `take_short_turns`, for any thread; 0: the calling one."""
    return _take_turns_of(0.0, thread)


def _take_turns_of(seconds: float, thread: int = 0) -> bool:
    """0 seconds: as the system likes."""
    if not sys.platform.startswith("linux") or _SET is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    raw = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if libc.syscall(_GET, thread, raw, _ATTRIBUTES.size, 0):
        return False
    _, policy, flags, nice, priority, _, deadline, period = _ATTRIBUTES.unpack(raw.raw)
    if policy != 0:  # whoever started this chose another one
        return False
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, flags, nice, priority, round(seconds * 1e9), deadline, period)
    return bool(libc.syscall(_SET, thread, ctypes.create_string_buffer(wanted, len(wanted)), 0) == 0)


class Demand(IntEnum):
    """Who is served while a version is tried or opened: nobody lately, somebody, or more than are computed at once."""

    NONE = 0
    SERVED = 1
    WAITING = 2


def nobody() -> Demand:
    """Of a server, or of what has none, that serves nobody."""
    return Demand.NONE


class Pace:
    """A process that stands back runs a quarter of the time only while others are served, and less while they wait; the block ends that.

    Computing only where a core has nothing else to do keeps nobody from it, but it takes caches, and turns in which an engine's threads
    wait for one another: beside it batches of 15 ms took 19 to 21, and requests queued up behind them. In pieces it does not add up, and
    what queues up all the same is computed undisturbed: while anybody waits it stands still, for up to 0.15 s at a time. On a server
    where somebody always waits that would have no end: after `STANDS_IN_ALL_S` it is no longer paced.
    """

    def __init__(self, process: subprocess.Popen[bytes], demand: Callable[[], Demand]) -> None:
        self._process, self._demand = process, demand
        self._ran = self._stood = 0.0
        self._ended = Event()
        self._thread = Thread(target=self._keep, name="muntin-pace")

    @property
    def excused(self) -> float:
        """Seconds that whoever bounds its time may leave out: those it stood still, but no more than `PATIENCE` allows for."""
        return min(self._stood, self._ran * (PATIENCE - 1))

    def __enter__(self) -> Self:
        if hasattr(signal, "SIGSTOP"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        while not self._ended.is_set() and self._stood < STANDS_IN_ALL_S:
            self._ran += self._pass(RUNS_S, lambda ran: ran >= LEAST_S and self._demand() is Demand.WAITING)
            if self._demand() is Demand.NONE:
                continue
            self._process.send_signal(signal.SIGSTOP)  # to nobody else if it has ended
            self._stood += self._pass(STANDS_LONG_S, lambda stood: stood >= STANDS_S and self._demand() is not Demand.WAITING)
            self._process.send_signal(signal.SIGCONT)

    def _pass(self, most: float, until: Callable[[float], bool]) -> float:
        """Lets `most` seconds pass, fewer where it has ended or `until` says so of those that have passed; and says how many did."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < most and not until(passed):
            if self._ended.wait(min(LOOK_S, most - passed)):
                break
        return time.monotonic() - began


class Standing:
    """Of a process that was started in `SCHED_IDLE`: it computes only while a core has nothing else to do, until it may do as others do.

    To be made before it is started, where it is `allowed`.
    """

    def __init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._shares_from = time.monotonic() + IDLE_S
        self._shares = False

    @staticmethod
    def allowed() -> bool:
        """Whether there is a way back: Linux wants CAP_SYS_NICE or a limit on niceness for it."""
        return _may_come_back()

    def mind(self, process: int, stood: float = 0.0) -> None:
        """To be called now and then while it stands back: after `IDLE_S`, and what it `stood` still, it gets a tenth of what others get, so
        that on cores that are never idle it comes to an end."""
        if not self._shares and time.monotonic() >= self._shares_from + stood:
            self._shares = True
            self._change(process, self._usual + BACK)

    def usual(self, process: int) -> None:
        """It has its share again."""
        self._change(process, self._usual)

    def _change(self, process: int, niceness: int) -> None:
        niceness = min(niceness, 19)
        changed: set[int] = set()
        while threads := _threads(process) - changed:  # one of them may have started others meanwhile
            _change(threads, os.SCHED_OTHER, niceness)
            for thread in threads:
                take_usual_turns(thread)  # those of whoever started it may be short
            changed |= threads


def stand_back(process: int) -> None:
    """For good: it computes only while a core has nothing else to do. Elsewhere than on Linux nothing changes."""
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            _change(_threads(process), os.SCHED_IDLE, os.getpriority(os.PRIO_PROCESS, 0))


def _threads(process: int) -> set[int]:
    """None where it has ended, or the system has no such folder."""
    with suppress(OSError):
        return {int(path.name) for path in Path(f"/proc/{process}/task").iterdir()}
    return set()


def _change(threads: set[int], policy: int, niceness: int) -> None:
    for thread in threads:
        with suppress(OSError):  # it has ended
            os.sched_setscheduler(thread, policy, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


@cache
def _may_come_back() -> bool:
    """Tried in a thread that ends after it."""
    came: list[bool] = []

    def there_and_back() -> None:
        with suppress(OSError):
            usual = os.getpriority(os.PRIO_PROCESS, 0)
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, 0, usual + 1)
            os.setpriority(os.PRIO_PROCESS, 0, usual)
            came.append(True)

    # A server that was started with another policy, idle itself maybe, keeps it.
    if sys.platform.startswith("linux") and Path("/proc/self/task").is_dir() and os.sched_getscheduler(0) == os.SCHED_OTHER:
        thread = Thread(target=there_and_back)
        thread.start()
        thread.join()
    return bool(came)
