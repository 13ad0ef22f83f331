"""Lines that a thread of its own writes (`logging.handlers.QueueListener`): a reader that stands still delays no request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from logging.handlers import QueueListener
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

CLOSE_TIMEOUT_S = 2.0
"""Seconds that lines have to be written when the log is closed."""
_log = logging.getLogger("muntin.serving")


class BackgroundLog:
    """Passes lines to `write` on a thread of its own, in their order.

    At most `capacity` lines wait. `lost` counts lines beyond, and those for which `write` raises OSError or ValueError; when that begins,
    the logger `muntin.serving` has a warning. As a context it closes itself.
    """

    def __init__(self, write: Callable[[Any], object], capacity: int) -> None:
        self._writer = _Writer(write)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._capacity = capacity
        self._dropped = 0
        self._listener = QueueListener(self._queue, self._writer)
        self._listener.start()

    @property
    def lost(self) -> int:
        return self._dropped + self._writer.lost

    def __call__(self, line: Any) -> None:
        """Queue a line, which is what `write` is given. Never waits."""
        if self._queue.qsize() < self._capacity:
            self._queue.put(logging.makeLogRecord({"msg": line}))
        else:
            self._dropped += 1

    def close(self) -> None:
        """Return when all lines are written, or after `CLOSE_TIMEOUT_S`."""
        stopping = threading.Thread(target=self._listener.stop, name="muntin-log-stop", daemon=True)
        stopping.start()
        stopping.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Writer(logging.Handler):
    """Writes the records, on the listener's thread."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        super().__init__()
        self._write = write
        self.lost = 0
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(record.msg)
            self._failing = False
        except (OSError, ValueError) as error:  # the disk is full, the pipe or the file is closed
            self.lost += 1
            if not self._failing:
                _log.warning("a log cannot be written (%s): its lines are lost until it can be", error)
            self._failing = True
