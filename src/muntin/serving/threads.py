"""Threads for calls that cannot be stopped: of a decoder, of an engine. They end with the process.

The standard library's pool waits for its threads when the process ends, whatever they do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Threads(Executor):
    """Makes calls on up to `most` threads at the same time; the others wait, in their order. A thread ends when no call waits."""

    def __init__(self, name: str, *, most: int | None = None) -> None:
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Future[Any], _Call] = OrderedDict()
        self._pending: set[Future[Any]] = set()
        self._count = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Make a call. Raises RuntimeError if the process may have no more threads."""
        future: Future[Any] = Future()
        with self._lock:
            self._waiting[future] = fn, args, kwargs
            self._pending.add(future)
            starting = self._most is None or self._count < self._most
            self._count += starting
        if starting:
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            except RuntimeError:
                with self._lock:
                    self._count -= 1
                    if self._waiting.pop(future, None) is not None:  # no other thread has taken it meanwhile
                        self._pending.discard(future)
                        raise
        future.add_done_callback(self._ended)  # the future keeps this: it must not hold what is called
        return future

    def _ended(self, future: Future[Any]) -> None:
        self._pending.discard(future)
        if future.cancelled():  # it waited, and may go on waiting behind a call that hangs
            with self._lock:
                self._waiting.pop(future, None)

    @property
    def pending(self) -> int:
        """Number of calls that wait or run."""
        return len(self._pending)

    def give_up(self) -> None:
        """Cancel the calls that wait."""
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()

    def join(self, timeout: float | None) -> None:
        """Wait for the calls that wait or run, at most `timeout` seconds."""
        wait(tuple(self._pending), timeout)

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            _make(*taken)
            del taken

    def _next(self) -> tuple[Future[Any], _Call] | None:
        with self._lock:
            if self._waiting:
                return self._waiting.popitem(last=False)
            self._count -= 1
            return None


def _make(future: Future[Any], call: _Call) -> None:
    if not future.set_running_or_notify_cancel():
        return
    fn, args, kwargs = call
    try:
        result = fn(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - `result` raises it
        future.set_exception(error)
    else:
        future.set_result(result)
    finally:
        del future  # an error holds this frame by its traceback
