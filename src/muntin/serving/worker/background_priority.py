"""CPU priority of helper processes that open or try a version while requests are answered."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread

IDLE_S = 3.0
"""Seconds for which a helper process computes only while a core is idle. After that it gets a small share of busy cores."""
NICENESS = 5
"""Niceness added to a helper process for its small share: a third of the usual weight on Linux. With less, a load takes minutes on busy
cores."""


class BackgroundPriority:
    """Low priority of a process that was just started, until `restore`.

    Where `can_restore`, it first runs in `SCHED_IDLE`, and `update` gives it `NICENESS` after `IDLE_S`, so that it also ends on cores that
    are never idle. Elsewhere it gets `NICENESS` at once. On Windows nothing changes.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._idle_until: float | None = None
        if can_restore():
            self._idle_until = time.monotonic() + IDLE_S
            run_when_idle(process)
        else:
            _change(process, NICENESS)

    def update(self) -> None:
        """Give the process its small share if `IDLE_S` have passed. To be called now and then."""
        if self._idle_until is not None and time.monotonic() >= self._idle_until:
            self._idle_until = None
            _change(self._process, NICENESS, os.SCHED_OTHER)

    def restore(self) -> None:
        """Give the process and its threads the priority of this process again. Requires `can_restore`."""
        _change(self._process, 0, os.SCHED_OTHER)


def run_when_idle(process: int) -> None:
    """Let a process compute only while a core has nothing else to do, on Linux. Elsewhere nothing changes."""
    if hasattr(os, "SCHED_IDLE"):
        _change(process, 0, os.SCHED_IDLE)


def _change(process: int, extra_niceness: int, policy: int | None = None) -> None:
    """Set the niceness of all threads of a process, relative to this process's, and their policy."""
    if not hasattr(os, "setpriority"):
        return
    niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + extra_niceness, 19)
    changed: set[int] = set()
    while threads := _threads(process) - changed:  # a thread may have started others meanwhile
        for thread in threads:
            with suppress(OSError):  # it has ended, or a sandbox forbids it
                if policy is not None:
                    os.sched_setscheduler(thread, policy, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
        changed |= threads


def _threads(process: int) -> set[int]:
    """Return the numbers of a process's threads; where the system does not list them, of the process."""
    with suppress(OSError):
        return {int(path.name) for path in Path(f"/proc/{process}/task").iterdir()}
    return {process}


@cache
def can_restore() -> bool:
    """Return whether a process may leave `SCHED_IDLE` again: Linux requires CAP_SYS_NICE, or a limit on niceness (`RLIMIT_NICE`), for it.

    False also if this process has another policy than the usual one: its helpers keep that.
    """
    restored: list[bool] = []

    def leave_and_return() -> None:
        with suppress(OSError):
            niceness = os.getpriority(os.PRIO_PROCESS, 0)
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, 0, niceness + 1)
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
            restored.append(True)

    if sys.platform.startswith("linux") and Path("/proc/self/task").is_dir() and os.sched_getscheduler(0) == os.SCHED_OTHER:
        thread = Thread(target=leave_and_return)  # a thread that ends: its own priority may stay low
        thread.start()
        thread.join()
    return bool(restored)
