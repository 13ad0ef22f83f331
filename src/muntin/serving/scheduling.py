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
from threading import Thread, get_native_id

SLICE_S = 0.0001
"""The shortest that Linux takes."""
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
def only_idle_time() -> Iterator[None]:
    """Inside the block the calling thread computes only while a core has nothing else to do, where it may do otherwise again afterwards.

    Threads that are started meanwhile, by an engine that is opened, inherit that: at the end of the block they are as others are. Where
    Linux does not allow the way back (it wants CAP_SYS_NICE or a limit on niceness for it), and elsewhere, nothing changes.
    """
    if not _may_come_back():
        yield
        return
    before = _threads()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        for thread in {get_native_id(), *(_threads() - before)}:
            with suppress(OSError):  # it has ended
                if os.sched_getscheduler(thread) == os.SCHED_IDLE:
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


@cache
def _may_come_back() -> bool:
    """Tried in a thread that ends after it."""
    if not hasattr(os, "SCHED_IDLE") or not Path("/proc/self/task").is_dir():
        return False
    came: list[bool] = []

    def there_and_back() -> None:
        with suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
                came.append(True)

    thread = Thread(target=there_and_back)
    thread.start()
    thread.join()
    return bool(came)
