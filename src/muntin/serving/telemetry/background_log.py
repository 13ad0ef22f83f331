"""Lines written on a thread of their own, so that a slow reader delays no request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from types import TracebackType
from typing import Any, Self

CLOSE_TIMEOUT_S = 2.0
"""Seconds for which closing waits for lines to be written."""
_log = logging.getLogger("muntin.serving")


class BackgroundLog:
    """Passes lines to `write` on its thread, in order. A context manager.

    At most `capacity` lines wait. `lost` counts lines beyond, and those for which `write` raises OSError or ValueError (disk full, pipe
    closed); the logger `muntin.serving` warns at the first of these in a row.
    """

    def __init__(self, write: Callable[[Any], object], capacity: int) -> None:
        self._write = write
        self._queue: Queue[Any] = Queue(capacity)
        self._dropped = self._unwritten = 0
        self._thread = threading.Thread(target=self._run, name="muntin-log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        return self._dropped + self._unwritten

    def __call__(self, line: Any) -> None:
        """Queue a line, the argument of `write`. Never waits."""
        try:
            self._queue.put_nowait(line)
        except Full:
            self._dropped += 1

    def close(self) -> None:
        """Return when all lines are written, or after `CLOSE_TIMEOUT_S`."""
        with suppress(Full):
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
            self._thread.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        failing = False
        for line in iter(self._queue.get, None):
            try:
                self._write(line)
                failing = False
            except (OSError, ValueError) as error:
                self._unwritten += 1
                if not failing:
                    _log.warning("a log cannot be written (%s): its lines are lost until it can be", error)
                failing = True
