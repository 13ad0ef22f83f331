"""Lines that are written on a thread of their own."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from muntin.serving.telemetry import background_log
from muntin.serving.telemetry.background_log import BackgroundLog


def test_lines_in_order_until_closed() -> None:
    written: list[str] = []

    def slowly(line: str) -> None:
        time.sleep(0.01)
        written.append(line)

    with BackgroundLog(slowly, 100) as log:
        for number in range(20):
            log(str(number))
    assert written == [str(number) for number in range(20)]


def test_writer_that_stands_still(wait_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No caller waits; lines beyond the capacity are counted; closing takes `CLOSE_TIMEOUT_S` at most."""
    monkeypatch.setattr(background_log, "CLOSE_TIMEOUT_S", 0.1)
    go_on, written = threading.Event(), []

    def write(line: str) -> None:
        assert go_on.wait(20)
        written.append(line)

    log = BackgroundLog(write, 10)
    for number in range(100):
        log(str(number))
    log.close()
    assert 89 <= log.lost <= 90  # one line may have been taken from the queue before the others came
    go_on.set()
    wait_until(lambda: len(written) == 100 - log.lost)
    assert written == [str(number) for number in range(100 - log.lost)]


def test_failing_writer_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """Once each time that it begins to fail."""
    full = OSError(28, "No space left on device")
    errors: list[Exception | None] = [None, full, BrokenPipeError(), ValueError("closed"), None, full]

    def write(line: str) -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    with BackgroundLog(write, 10) as log:
        for number in range(6):
            log(str(number))
    assert log.lost == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "No space left on device" in caplog.text
