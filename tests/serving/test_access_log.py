"""A line of JSON for each request."""

from __future__ import annotations

import io
import json

import pytest

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


class Broken(io.StringIO):
    """Raises what it is told to."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


def test_a_line_that_cannot_be_written_is_counted_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Broken()
    log = AccessLog(stream)

    def write(error: Exception | None) -> None:
        stream.error = error
        log.write(
            face="http", client="::1", method="GET", path="/", status=200, sent=1, seconds=0.1, request_id="", answered=None
        )  # fmt: skip

    full = OSError(28, "No space left on device")
    for error in (None, full, BrokenPipeError(), UnicodeEncodeError("ascii", "\xe4", 0, 1, "no"), ValueError("closed"), None, full):
        write(error)
    assert log.lost == 5
    assert stream.getvalue().count("\n") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2  # each time that it begins
    assert "No space left on device" in said


def test_where_nothing_can_be_told_the_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Broken()
    stream.error = BrokenPipeError()
    monkeypatch.setattr("sys.stderr", stream)
    log = AccessLog(stream)
    log.write(face="http", client="", method="GET", path="/", status=200, sent=1, seconds=0.1, request_id="", answered=None)
    assert log.lost == 1
