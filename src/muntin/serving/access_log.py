"""A line of JSON for each request."""

from __future__ import annotations

import io
import sys
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO

import orjson

from muntin.serving.service import Answered

_WAITING = 10_000
"""Lines that may wait to be written: 3 MB."""
_CLOSING_S = 2.0
"""How long the end waits for what is still to be written."""


class AccessLog:
    """Writes to a stream, a line a request, and lets nothing a client sends break a line: JSON escapes it.

    A thread of its own writes: whoever reads the stream may stand still, and no request waits for that. A line that cannot be written (the
    disk is full, the pipe closed, too many wait already) is counted in `lost`; the request is answered all the same. Standard error says so
    when that begins, or, where lines are lost for a reader that stands still, when it goes on. `stream`: of bytes, best without a buffer;
    standard output, if none is given. Lines are written by one caller at a time; `close` when there are no more.
    """

    def __init__(self, stream: IO[bytes] | io.RawIOBase | None = None) -> None:
        self._stream = _standard_output() if stream is None else stream
        self.lost = 0
        self._losing = False
        self._lines: deque[bytes] = deque()
        self._full = 0
        """Lines that were lost because too many waited, and that nobody was told of yet."""
        self._changed = threading.Condition()
        """Held for a moment only, and never while something is written."""
        self._closed = False
        self._thread = threading.Thread(target=self._write_lines, name="muntin-access-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when all is written, or in two seconds: what is not written by then is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSING_S)
        with self._changed:
            self.lost += len(self._lines)
            self._lines.clear()

    def write(
        self, *, face: str, client: str, method: str, path: str, status: int, sent: int, seconds: float, code: str = "",
        request_id: str = "", answered: Answered | None = None,
    ) -> None:  # fmt: skip
        """`status`: of HTTP, and of gRPC the one that says the same; 499 where the client did not wait for an answer. `code`: of gRPC.
        `sent`: bytes of the answer. `seconds`: from the request's headers to the end of its answer. Never raises."""
        entry: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "face": face,
            "client": client,
            "method": method,
            "path": path[:200],
            "status": status,
            "sent": sent,
            "ms": round(seconds * 1e3, 3),
        }
        if code:
            entry["code"] = code
        if request_id:
            entry["id"] = request_id[:100]
        if answered is not None:
            entry |= {
                "version": answered.response.version,
                "read_ms": round(answered.read * 1e3, 3),
                "queue_ms": round(answered.queued * 1e3, 3),
                "compute_ms": round(answered.computed * 1e3, 3),
                "batch": answered.batch_rows,
            }
        line = orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)
        with self._changed:
            if self._closed or len(self._lines) >= _WAITING:
                self.lost += 1
                self._full += 1
                return
            self._lines.append(line)
            self._changed.notify()

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closed:
                    self._changed.wait()
                if not self._lines:
                    return
                line = self._lines.popleft()
                full, self._full = self._full, 0
            if full:
                _tell(f"the access log was not read for a while: {full:,} of its lines are lost")
            try:
                self._put(line)
            except Exception as error:  # noqa: BLE001 - whatever a stream raises: it is told, and the next line is tried
                self._lose(error)
            else:
                self._losing = False

    def _put(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            count = self._stream.write(left)
            if count is None:
                raise BlockingIOError("it takes nothing more, and does not wait until it does")
            left = left[count:]
        self._stream.flush()

    def _lose(self, error: Exception) -> None:
        with self._changed:
            self.lost += 1
        if not self._losing:
            self._losing = True
            _tell(f"the access log cannot be written ({error}): its lines are lost until it can be")


def _standard_output() -> IO[bytes] | io.RawIOBase:
    """Past its buffer, where it has a descriptor: an interpreter that ends waits for the buffer's lock, which the thread may hold."""
    try:
        return io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # of a notebook, or of whoever captures it
        return sys.stdout.buffer


def _tell(what: str) -> None:
    with suppress(OSError, ValueError):  # it may be as broken
        sys.stderr.write(f"muntin: {what}\n")
        sys.stderr.flush()
