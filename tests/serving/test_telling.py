"""What a line's listener raises is reported, and ends nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from muntin.serving.telling import told_safely


def broken(line: str) -> None:
    raise BrokenPipeError(line)


def test_what_telling_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    told_safely(broken)("version 1 serves")
    assert [str(args.exc_value) for args in reported] == ["version 1 serves"]
    heard: list[str] = []
    told_safely(heard.append)("version 1 serves")
    assert (heard, len(reported)) == (["version 1 serves"], 1)


def test_where_nothing_can_be_reported_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", broken)
    told_safely(broken)("version 1 serves")
