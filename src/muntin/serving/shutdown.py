"""When a server ends, and how much time requests in flight still have."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol


class Shutdown:
    """`seconds`: that requests in flight get. `hurried`: Ctrl-C came again after the shutdown had begun, so nothing is waited for."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._deadline: float | None = None
        self.requested = False
        self.hurried = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that `wait` is awaited on."""
        self._loop = loop
        if self.requested:
            self._event.set()

    def request(self, *, again: bool = False) -> None:
        """Ask for the shutdown; any thread may. `again`: by Ctrl-C, which hurries a shutdown that has begun."""
        self.hurried = self.hurried or (again and self._deadline is not None)
        self.requested = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Return once the shutdown is asked for."""
        await self._event.wait()

    def begin(self) -> None:
        """Start the time that requests in flight have. Idempotent."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds

    @property
    def left(self) -> float:
        """Seconds that requests in flight still have."""
        if self.hurried:
            return 0.0
        return self._seconds if self._deadline is None else max(0.0, self._deadline - time.monotonic())


class EndServer(Protocol):
    def __call__(self, *, by_interrupt: bool) -> None: ...


@contextmanager
def on_signals(loop: asyncio.AbstractEventLoop, end: EndServer) -> Iterator[None]:
    """Call `end` on the loop at SIGTERM and Ctrl-C: a handler itself may interrupt a holder of the lock that `end` takes.

    Only on the main thread, which alone may handle signals; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int) -> Callable[..., None]:
        return lambda *_: _threadsafe(loop, lambda: end(by_interrupt=number == signal.SIGINT))

    before = {number: signal.signal(number, handle(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _threadsafe(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(call)
