"""A line of JSON for each request."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO

import orjson

from muntin.serving.service import Answered


class AccessLog:
    """Writes to a stream, a line a request, and lets nothing a client sends break a line: JSON escapes it.

    A line that cannot be written (the disk is full, the pipe closed) is counted in `lost`; the request is answered all the same. Standard
    error says so when that begins.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self.lost = 0
        self._losing = False

    def write(
        self, *, face: str, client: str, method: str, path: str, status: int | str, sent: int, seconds: float, request_id: str,
        answered: Answered | None,
    ) -> None:  # fmt: skip
        """`sent`: bytes of the answer. `seconds`: from the request's headers to the end of its answer. Never raises."""
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
        try:
            self._stream.write(orjson.dumps(entry).decode() + "\n")
            self._stream.flush()
        except Exception as error:  # noqa: BLE001 - whatever a stream raises: it is told, and the request is answered
            self._lose(error)
        else:
            self._losing = False

    def _lose(self, error: Exception) -> None:
        self.lost += 1
        if self._losing:
            return
        self._losing = True
        with suppress(OSError, ValueError):  # it may be as broken
            sys.stderr.write(f"muntin: the access log cannot be written ({error}): its lines are lost until it can be\n")
            sys.stderr.flush()
