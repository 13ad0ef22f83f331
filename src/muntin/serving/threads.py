"""Threads for calls that nobody can stop: a decoder, an engine. They are waited for as long as one likes, and end with the process.

A pool of the standard library is waited for when the process ends, whatever its threads are at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Threads(Executor):
    """A thread for each call, `most` at the same time: then calls wait for one of them, in their order. A thread ends when none waits."""

    def __init__(self, name: str, *, most: int | None = None) -> None:
        self._name, self._most = name, most
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Future[Any], _Call] = OrderedDict()
        self._running: set[Future[Any]] = set()
        self._count = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Raises RuntimeError where the process may have no more threads."""
        future: Future[Any] = Future()
        with self._lock:
            self._waiting[future] = fn, args, kwargs
            self._running.add(future)
            beginning = self._most is None or self._count < self._most
            self._count += beginning
        if beginning:
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            except RuntimeError:
                with self._lock:
                    self._count -= 1
                    if self._waiting.pop(future, None) is not None:  # else another thread has taken it meanwhile
                        self._running.discard(future)
                        raise
        future.add_done_callback(self._ended)  # which a future keeps: it must not hold what is called
        return future

    def _ended(self, future: Future[Any]) -> None:
        self._running.discard(future)
        if future.cancelled():  # while it waited: those that are given up must not pile up behind one that stands still
            with self._lock:
                self._waiting.pop(future, None)

    @property
    def pending(self) -> int:
        """Calls that wait or go on."""
        return len(self._running)

    def give_up(self) -> None:
        """Cancels the calls that wait."""
        with self._lock:
            waiting, self._waiting = self._waiting, OrderedDict()
        for future in waiting:
            future.cancel()

    def join(self, timeout: float | None) -> None:
        """Waits for the calls that wait or go on, so many seconds at most."""
        wait(tuple(self._running), timeout)

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
        answer = fn(*args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - whoever waits raises it
        future.set_exception(error)
    else:
        future.set_result(answer)
    finally:
        del future  # an error holds this frame by its traceback
