"""Lines for whoever watches a server, told in the midst of its work: what telling them raises must not end that."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from types import TracebackType
from typing import Self

Notify = Callable[[str], None]
WAITING = 1000
"""Lines that may wait to be told."""
_CLOSING_S = 2.0
"""How long the end waits for what is still to be told."""


def tell_nobody(line: str) -> None:
    """Where nobody asked to be told."""


class Teller:
    """Tells lines on a thread of its own: whoever reads them may stand still, and nothing of a server waits for that.

    Beyond `WAITING` lines are lost, and how many is told before the next one. At its end, as a context, all are told, or two seconds are
    over.
    """

    def __init__(self, notify: Notify) -> None:
        self._notify = told_safely(notify)
        self._lines: Queue[str | None] = Queue(WAITING)
        self._lock = threading.Lock()
        self._lost = 0
        """Lines that nobody was told of yet."""
        self._thread = threading.Thread(target=self._tell, name="muntin-tell", daemon=True)

    def __call__(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except Full:
            with self._lock:
                self._lost += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        with suppress(Full):
            self._lines.put(None, timeout=_CLOSING_S)
            self._thread.join(_CLOSING_S)

    def _tell(self) -> None:
        while (line := self._lines.get()) is not None:
            with self._lock:
                lost, self._lost = self._lost, 0
            if lost:
                self._notify(f"lines were not read for a while: {lost:,} of them are lost")
            self._notify(line)


def told_safely(notify: Notify) -> Notify:
    """`notify`, but what it raises is reported where the exceptions of threads are (`threading.excepthook`), and ends nothing."""

    def tell(line: str) -> None:
        try:
            notify(line)
        except Exception:  # noqa: BLE001 - the batch, or the watching, that the line comes from goes on
            with suppress(OSError, ValueError):  # standard error may be what is broken
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    return tell
