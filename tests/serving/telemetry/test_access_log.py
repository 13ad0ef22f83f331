"""A line of JSON for each request. test_background_log.py has what becomes of lines that cannot be written."""

from __future__ import annotations

import io
import json
import os

from muntin.serving.telemetry.access_log import AccessLog


def write(log: AccessLog, path: str = "/") -> None:
    log.write(face="http", client="::1", method="GET", path=path, status=404, sent=12, seconds=0.0123456, request_id="", answered=None)


def test_one_line_whatever_the_client_sends() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream)
    write(log, '/a\n"b\u2028' + "x" * 500)
    log.close()
    line = stream.getvalue()
    assert line.count(b"\n") == 1
    entry = json.loads(line)
    assert entry["path"].startswith('/a\n"b')
    assert len(entry["path"]) == 200
    assert (entry["status"], entry["sent"], entry["ms"]) == (404, 12, 12.346)
    assert "version" not in entry


def test_lost_lines_are_counted() -> None:
    """Those written before a reader went away are whole."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb", buffering=0) as stream:
        log = AccessLog(stream)
        write(log)
        assert json.loads(reader.readline())["status"] == 404
        reader.close()
        for _ in range(3):
            write(log)
        log.close()
        assert log.lost == 3
