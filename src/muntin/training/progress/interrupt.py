"""Ctrl-C and SIGTERM during training: the first one asks for an end after the present work, a second one acts at once."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import ExitStack, suppress
from functools import partial
from threading import Thread, current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREPARATION = "the preparation and a first step"
"""Work that is finished before the end if a signal arrives before the first step."""


class Interruption:
    """While active, turn the first SIGINT or SIGTERM into the flag `requested`; a second one acts as usual. Main thread only.

    The first one is answered at once by a line on standard error. A thread prints it, because Python runs signal handlers only between two
    calls into C, such as a whole backward pass, and because a handler must not print while the code that it interrupts does.

    `work`: what is finished before the end, as the line names it. `answers`: print the line.
    """

    def __init__(self, *, answers: bool = True) -> None:
        self.requested = False
        self._answered = not answers
        self.work = PREPARATION
        self._previous: dict[int, Any] = {}
        self._end = ExitStack()

    def __enter__(self) -> Self:
        if current_thread() is not main_thread():
            return self
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        thread = Thread(target=self._answer, args=(receiver,), name="muntin-interruption", daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for step in (thread.join, sender.close, partial(signal.set_wakeup_fd, previous), self._restore):  # run in reverse order
            self._end.callback(step)
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.close()

    def _answer(self, receiver: socket.socket) -> None:
        """Print a line when the first signal arrives: Python writes the number of each signal to the socket at once."""
        with receiver:
            while numbers := receiver.recv(16):
                if not self._answered and not set(SIGNALS).isdisjoint(numbers):
                    self._answered = True
                    with suppress(OSError, ValueError):  # standard error is closed
                        print(f"muntin: stops after {self.work}, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
