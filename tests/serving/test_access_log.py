"""A line of JSON for each request."""

from __future__ import annotations

import io
import json

from muntin.serving.access_log import AccessLog


def test_a_line_whatever_the_client_sent() -> None:
    stream = io.StringIO()
    AccessLog(stream).write(
        face="http", client="::1", method="GET", path='/a\n"b\u2028' + "x" * 500, status=404, sent=12, seconds=0.0123456, request_id="",
        answered=None,
    )  # fmt: skip
    line = stream.getvalue()
    assert line.count("\n") == 1
    entry = json.loads(line)
    assert entry["path"].startswith('/a\n"b')
    assert len(entry["path"]) == 200
    assert (entry["status"], entry["sent"], entry["ms"]) == (404, 12, 12.346)
    assert "version" not in entry
