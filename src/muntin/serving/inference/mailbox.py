"""Passes answers from computing threads to the event loop, many at a time.

Waking a loop costs a system call and a round of the loop. The answers of a batch are put in together, so the loop is woken once. A loop
that reads many requests in one round handles the wake-up only after them: it may call `empty` in between.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Mailbox:
    """Calls functions on a loop's thread, in the order they were put in. Create it on that thread; any thread may call `put`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._waiting: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._woken = False

    def put(self, call: Callable[[Any], None], argument: Any) -> None:
        """Call `call(argument)`, at once on the loop's thread. Exceptions go to the loop's exception handler.

        Raises RuntimeError if the loop is closed.
        """
        if threading.get_ident() == self._thread:
            call(argument)
            return
        self._waiting.append((call, argument))
        if not self._woken:  # set before the loop is woken and cleared before it looks: calls put in between are seen
            self._woken = True
            self.loop.call_soon_threadsafe(self._woke)

    def _woke(self) -> None:
        self._woken = False
        self.empty()

    def empty(self) -> None:
        """Make all waiting calls now, on the loop's thread."""
        with suppress(IndexError):
            while True:
                call, argument = self._waiting.popleft()
                self._call(call, argument)

    def _call(self, call: Callable[[Any], None], argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:  # noqa: BLE001 - the other calls must be made
            self.loop.call_exception_handler({"message": "an answer could not be given", "exception": error})
