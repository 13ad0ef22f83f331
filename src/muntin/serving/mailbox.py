"""From the threads that compute to the event loop that answers, many at a time.

Waking a loop takes a system call and costs it a round. A batch is answered by one thread in one go, so its answers are put down together
and the loop is woken once. A loop that reads many requests in one round comes to what woke it only after them: it may look in between.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Mailbox:
    """Calls functions on a loop's thread, in the order they were given. Make it there; any thread may `put`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._woken = False

    def put(self, call: Callable[[Any], None], argument: Any) -> None:
        """`call(argument)`, at once if this is the loop's thread. What it raises there goes to the loop's handler of exceptions.

        Raises RuntimeError where the loop is closed: nobody would call.
        """
        if threading.get_ident() == self._thread:
            call(argument)
            return
        self._waiting.append((call, argument))
        if not self._woken:  # set before the loop is woken, cleared before it looks: what is put in between is seen
            self._woken = True
            self.loop.call_soon_threadsafe(self._woke)

    def _woke(self) -> None:
        self._woken = False
        self.empty()

    def empty(self) -> None:
        """Calls what was put in so far, on the loop's thread; it will be woken all the same."""
        with suppress(IndexError):
            while True:
                call, argument = self._waiting.popleft()
                self._call(call, argument)

    def _call(self, call: Callable[[Any], None], argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:  # noqa: BLE001 - the others wait for theirs
            self.loop.call_exception_handler({"message": "an answer could not be given", "exception": error})
