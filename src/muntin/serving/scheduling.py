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
BACK = 10
"""How much nicer a thread is that stands back: a tenth of the usual weight (kernel/sched/core.c, sched_prio_to_weight)."""
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


def stand_back() -> None:
    """From now on the calling thread, and those that it starts, get a tenth of a core that others want (Linux; elsewhere nothing changes).

    For a thread that ends with what it does: the way back is not always allowed (`standing_back`).
    """
    if sys.platform.startswith("linux"):
        _be_nice(0, os.getpriority(os.PRIO_PROCESS, 0) + BACK)


@contextmanager
def standing_back() -> Iterator[None]:
    """Inside the block the calling thread gets a tenth of a core that others want, where it may have its full share again afterwards.

    Threads that are started meanwhile, by an engine that is opened, inherit that; at the end of the block they are as others are. No less
    than a tenth, since it runs Python, too, and the server's other threads wait where it is kept from going on. Where Linux does not allow
    the way back (it wants CAP_SYS_NICE or a limit on niceness for it), and elsewhere, nothing changes.
    """
    if not _may_come_back():
        yield
        return
    before, usual = _threads(), os.getpriority(os.PRIO_PROCESS, 0)
    _be_nice(0, usual + BACK)
    try:
        yield
    finally:
        back = {get_native_id()}
        while back:
            for thread in back:
                _be_nice(thread, usual)
            before |= back
            back = {thread for thread in _threads() - before if _niceness(thread) != usual}  # one of them may have started others


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def _niceness(thread: int) -> int | None:
    """None where it has ended. On Linux each thread has its own."""
    with suppress(OSError):
        return os.getpriority(os.PRIO_PROCESS, thread)
    return None


def _be_nice(thread: int, niceness: int) -> None:
    with suppress(OSError):  # it has ended
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


@cache
def _may_come_back() -> bool:
    """Tried in a thread that ends after it."""
    came: list[bool] = []

    def there_and_back() -> None:
        with suppress(OSError):
            usual = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, 0, usual + 1)
            os.setpriority(os.PRIO_PROCESS, 0, usual)
            came.append(True)

    if sys.platform.startswith("linux") and Path("/proc/self/task").is_dir():
        thread = Thread(target=there_and_back)
        thread.start()
        thread.join()
    return bool(came)
