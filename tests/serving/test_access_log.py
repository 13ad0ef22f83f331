"""A line of JSON for each request."""

from __future__ import annotations

import io
import json
import os
import threading

import pytest

from muntin.serving.access_log import AccessLog


def write(log: AccessLog, path: str = "/") -> None:
    log.write(face="http", client="::1", method="GET", path=path, status=404, sent=12, seconds=0.0123456, request_id="", answered=None)


def test_a_line_whatever_the_client_sent() -> None:
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


class Broken(io.BytesIO):
    """Raises what it is told to, one after the other."""

    errors: tuple[Exception | None, ...] = ()

    def write(self, data: object) -> int:
        error, *rest = self.errors
        self.errors = tuple(rest)
        if error is not None:
            raise error
        return super().write(data)  # type: ignore[arg-type]


def test_a_line_that_cannot_be_written_is_counted_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Broken()
    full = OSError(28, "No space left on device")
    stream.errors = (None, full, BrokenPipeError(), ValueError("closed"), None, full)
    log = AccessLog(stream)
    for _ in range(6):
        write(log)
    log.close()
    assert log.lost == 4
    assert stream.getvalue().count(b"\n") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2  # each time that it begins
    assert "No space left on device" in said


def test_where_nothing_can_be_told_the_request_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = Broken()
    stream.errors = (BrokenPipeError(), None)
    monkeypatch.setattr("sys.stderr", Closed())
    log = AccessLog(stream)
    write(log)
    write(log)
    log.close()
    assert log.lost == 1
    assert stream.getvalue().count(b"\n") == 1


def write_until_lost(log: AccessLog) -> None:
    """Until nothing goes out any more, and what waits is as much as may."""
    lost = log.lost
    while log.lost < lost + 1000:  # so many in one go: the thread that writes them stands
        if len(log._lines) < 1000:
            lost = log.lost
        write(log, "/" + "x" * 200)


def test_nobody_waits_for_who_reads_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("muntin.serving.access_log._WAITING", 1000)
    monkeypatch.setattr("muntin.serving.access_log._CLOSING_S", 0.1)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb", buffering=0) as stream:
        log = AccessLog(stream)
        writer = threading.Thread(target=write_until_lost, args=(log,), daemon=True)
        writer.start()
        writer.join(60)  # who writes is kept by nobody
        assert not writer.is_alive()
        lines = [reader.readline() for _ in range(1000)]  # it goes on
        assert all(json.loads(line)["status"] == 404 for line in lines)
        while log._lines:
            reader.readline()
        assert "was not read for a while" in capsys.readouterr().err
        write_until_lost(log)
        lost = log.lost
        log.close()  # in a moment, though nobody reads
        assert log.lost > lost
        reader.close()  # and the thread goes


def test_what_waits_is_written_at_the_end_and_what_comes_later_is_lost() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream)
    for _ in range(100):
        write(log)
    log.close()
    write(log)
    assert (stream.getvalue().count(b"\n"), log.lost) == (100, 1)
