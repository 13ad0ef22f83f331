"""Share the cores between requests and a process that opens an artefact, by stopping that process (SIGSTOP) for a part of the time.

A low priority costs requests more (docs/log.md, 29 Nov), and a process cannot raise it again to serve. Linux only: elsewhere a stopped
process would stay if the server were killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

RUN_S, STOPPED_S, PATIENCE_S = 0.01, 0.05, 20.0
"""While requests are computed the process runs for 10 ms and is stopped for up to 50 ms; less and less of it, and after 20 s not at all, so
that it is done in 30 s beside clients that leave no pause."""
_POLL_S = 0.004
_PR_SET_PDEATHSIG = 1


class Turns:
    """Stops a process while requests are computed. `busy`: whether some are computed now. `pause` is to be called every `RUN_S`."""

    def __init__(self, process: int, busy: Callable[[], bool]) -> None:
        self._process, self._busy, self._began = process, busy, time.monotonic()

    def pause(self) -> None:
        """Stop the process until no request is computed, or for as long as it may be."""
        now = time.monotonic()
        end = now + STOPPED_S * (1 - (now - self._began) / PATIENCE_S)
        if end <= now or not self._busy():
            return
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGSTOP)
            try:
                while self._busy() and time.monotonic() < end:
                    time.sleep(_POLL_S)
            finally:
                os.kill(self._process, signal.SIGCONT)


def can_take_turns() -> bool:
    """Return whether this system ends a stopped process with the server that stopped it."""
    return sys.platform == "linux"


def end_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends, also while it is stopped; 0: no more. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
