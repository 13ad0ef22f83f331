"""What a notification raises is reported, and ends nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from muntin.serving.telemetry.notify import told_safely


def broken(line: str) -> None:
    raise BrokenPipeError(line)


def test_error_of_a_notification_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    told_safely(broken)("version 1 serves")
    assert [str(args.exc_value) for args in reported] == ["version 1 serves"]


def test_error_that_cannot_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", broken)
    told_safely(broken)("version 1 serves")
