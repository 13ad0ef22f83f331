"""How the operating system shares a core between the thread that reads and answers and those that compute."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

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
