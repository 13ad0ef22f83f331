"""The access log: a line of JSON for each request."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime
from typing import IO

import orjson

from muntin.serving.inference.service import Answered
from muntin.serving.telemetry.background_log import BackgroundLog

CAPACITY = 10_000
"""Maximum number of lines that wait to be written, about 3 MB."""


class AccessLog:
    """Writes a line for each request to a stream of bytes, best without a buffer; standard output by default.

    JSON escapes line breaks that a client sends. A line that cannot be written (full disk, closed pipe, slow reader) is counted in `lost`.
    """

    def __init__(self, stream: IO[bytes] | io.RawIOBase | None = None) -> None:
        self._stream = _standard_output() if stream is None else stream
        self._lines = BackgroundLog(self._put, CAPACITY)

    @property
    def lost(self) -> int:
        return self._lines.lost

    def close(self) -> None:
        """Return when all lines are written, or after two seconds."""
        self._lines.close()

    def write(
        self, *, face: str, client: str, method: str, path: str, status: int, sent: int, seconds: float, code: str = "",
        request_id: str = "", answered: Answered | None = None,
    ) -> None:  # fmt: skip
        """Queue the line of a request. Never waits or raises.

        `status`: HTTP's, for gRPC the corresponding one; 499 for a client that left. `code`: gRPC's. `sent`: bytes of the answer.
        `seconds`: from the request's headers (gRPC: from the end of its message) to its answer.
        """
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
        self._lines(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def _put(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            count = self._stream.write(left)
            if count is None:
                raise BlockingIOError("the stream takes nothing more, and does not wait until it does")
            left = left[count:]
        self._stream.flush()


def _standard_output() -> IO[bytes] | io.RawIOBase:
    """Return standard output without its buffer: at its end the interpreter waits for its lock, which the log's thread may hold."""
    try:
        return io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # a notebook, or a test that captures it
        return sys.stdout.buffer
