"""How the operating system shares a core between the thread that reads and answers and those that compute."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread, get_native_id

SLICE_S = 0.0001
"""The shortest that Linux takes."""
IDLE_S = 2.0
"""Seconds after which a thread that stands back gets a share though no core is idle."""
BACK = 10
"""How much nicer it is then: a tenth of the usual weight (kernel/sched/core.c, sched_prio_to_weight)."""
_SET, _GET = {"x86_64": (314, 315), "aarch64": (274, 275)}.get(platform.machine(), (None, None))
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # sched_attr: size, policy, flags, nice, priority, runtime, deadline, period


def take_short_turns() -> bool:
    """Asks for short turns on the core for the calling thread and those that it starts from now on; says whether they were given.

    A thread that answers need not wait then until an engine on its core has had a turn of milliseconds, and one that works in the
    background makes nobody wait so long. From Linux 6.12 on a thread that wakes and wants a shorter turn interrupts a longer one (EEVDF,
    `PREEMPT_SHORT`). It gets no more of the core by that, and needs no privilege. Elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux") or _SET is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    raw = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if libc.syscall(_GET, 0, raw, _ATTRIBUTES.size, 0):
        return False
    _, policy, flags, nice, priority, _, deadline, period = _ATTRIBUTES.unpack(raw.raw)
    if policy != 0:  # whoever started this chose another one
        return False
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, flags, nice, priority, round(SLICE_S * 1e9), deadline, period)
    return bool(libc.syscall(_SET, 0, ctypes.create_string_buffer(wanted, len(wanted)), 0) == 0)


@contextmanager
def standing_back() -> Iterator[None]:
    """Inside the block the calling thread computes only while a core has nothing else to do, where it may have its share again afterwards.

    Threads that are started meanwhile, by an engine that is opened, inherit that; at the end of the block they are as others are. After
    `IDLE_S` all of them get a tenth of what others get, so that on cores that are never idle the block comes to an end. Where Linux does
    not allow the way back (it wants CAP_SYS_NICE or a limit on niceness for it), and elsewhere, nothing changes.
    """
    if not _may_come_back():
        yield
        return
    mine, usual, left = get_native_id(), os.getpriority(os.PRIO_PROCESS, 0), Event()
    before = _threads()

    def take_a_share() -> None:
        if not left.wait(IDLE_S):
            _change({mine} | (_threads() - before - {get_native_id()}), os.SCHED_OTHER, usual + BACK)

    waiting = Thread(target=take_a_share, name="muntin-share")
    waiting.start()  # before this thread stands back, or it would inherit that
    _change({mine}, os.SCHED_IDLE, usual)
    try:
        yield
    finally:
        left.set()
        waiting.join()
        back = {mine}
        while back:
            _change(back, os.SCHED_OTHER, usual)
            before |= back
            # one of them may have started others
            back = {thread for thread in _threads() - before if _standing(thread) not in (None, (os.SCHED_OTHER, usual))}


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def _standing(thread: int) -> tuple[int, int] | None:
    """Policy and niceness, of which each thread of Linux has its own. None where it has ended."""
    with suppress(OSError):
        return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)
    return None


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
