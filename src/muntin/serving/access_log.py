"""A line of JSON for each request."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import IO

import orjson

from muntin.serving.service import Answered


class AccessLog:
    """Writes to a stream, a line a request, and lets nothing a client sends break a line: JSON escapes it."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream

    def write(
        self, *, face: str, client: str, method: str, path: str, status: int | str, sent: int, seconds: float, request_id: str,
        answered: Answered | None,
    ) -> None:  # fmt: skip
        """`sent`: bytes of the answer. `seconds`: from the request's headers to the end of its answer."""
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
        if request_id:
            entry["id"] = request_id[:100]
        if answered is not None:
            entry |= {
                "version": answered.response.version,
                "queue_ms": round(answered.queued * 1e3, 3),
                "compute_ms": round(answered.computed * 1e3, 3),
                "batch": answered.batch_rows,
            }
        self._stream.write(orjson.dumps(entry).decode() + "\n")
        self._stream.flush()
