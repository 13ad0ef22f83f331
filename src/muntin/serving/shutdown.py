"""Shutdown of a server, and the time left for requests in flight."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Shutdown:
    """`seconds`: time for requests in flight. `hurried`: True after a second Ctrl-C, so nothing is waited for."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._deadline: float | None = None
        self.requested = False
        self.hurried = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the loop that `wait` is awaited on."""
        self._loop = loop
        if self.requested:
            self._event.set()

    def request(self, *, again: bool = False) -> None:
        """Request the shutdown, from any thread. `again`: by Ctrl-C, which hurries a shutdown that has begun."""
        self.hurried = self.hurried or (again and self._deadline is not None)
        self.requested = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Return once the shutdown is requested."""
        await self._event.wait()

    def begin(self) -> None:
        """Start the time for requests in flight. Idempotent."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds left for requests in flight."""
        if self.hurried:
            return 0.0
        return self._seconds if self._deadline is None else max(0.0, self._deadline - time.monotonic())


@contextmanager
def on_signals(loop: asyncio.AbstractEventLoop, end: Callable[[bool], None]) -> Iterator[None]:
    """Call `end(by_interrupt)` on the loop at SIGTERM and Ctrl-C: a handler itself may interrupt a holder of the lock that `end` takes.

    Does nothing outside the main thread, where signals cannot be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(end, number == signal.SIGINT)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
