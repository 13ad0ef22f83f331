"""Daemon threads for calls that cannot be stopped: of a decoder, of an engine.

`ThreadPoolExecutor` waits for its threads when the process ends, whatever they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import Any


class Threads(Executor):
    """Runs up to `most` calls at the same time; further ones wait, in order. A thread ends when no call waits."""

    def __init__(self, name: str, *, most: int) -> None:
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}
        self._pending: set[Future[Any]] = set()
        self._count = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call on a thread. Raises RuntimeError if the process may have no more threads."""
        future: Future[Any] = Future()
        with self._lock:
            if self._count < self._most:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
                self._count += 1
            self._waiting[future] = partial(fn, *args, **kwargs)
            self._pending.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)
            self._waiting.pop(future, None)  # cancelled: otherwise it stays behind a call that hangs

    @property
    def pending(self) -> int:
        """Number of calls that wait or run."""
        return len(self._pending)

    def give_up(self) -> None:
        """Cancel the calls that wait."""
        for future in tuple(self._waiting):
            future.cancel()

    def join(self, timeout: float | None) -> None:
        """Wait for the calls that wait or run, at most `timeout` seconds."""
        wait(tuple(self._pending), timeout)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            _call(*item)
            del item

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._lock:
            if self._waiting:
                future = next(iter(self._waiting))
                return future, self._waiting.pop(future)
            self._count -= 1
            return None


def _call(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - `result` raises it
        future.set_exception(error)
    finally:
        del future, call  # the traceback of an error keeps this frame
