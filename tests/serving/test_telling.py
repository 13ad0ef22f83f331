"""What a line's listener raises is reported, and ends nothing."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from muntin.serving.telling import WAITING, Teller, told_safely


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


def test_lines_are_told_in_their_order_and_all_of_them_at_the_end() -> None:
    heard: list[str] = []

    def slowly(line: str) -> None:
        time.sleep(0.01)
        heard.append(line)

    with Teller(slowly) as tell:
        for number in range(20):
            tell(str(number))
    assert heard == [str(number) for number in range(20)]


def test_nobody_waits_for_a_listener_that_stands_still() -> None:
    free, heard = threading.Event(), []

    def stand_still(line: str) -> None:
        assert free.wait(20)
        heard.append(line)

    with Teller(stand_still) as tell:
        began = time.monotonic()
        for number in range(2 * WAITING):
            tell(str(number))
        assert time.monotonic() - began < 10
        free.set()
    (lost,) = [line for line in heard if "lost" in line]
    told = [line for line in heard if line is not lost]
    assert told == [str(number) for number in range(len(told))]
    assert len(told) in (WAITING, WAITING + 1)  # the first one may have been taken before the others came
    assert f" {2 * WAITING - len(told):,} of them" in lost
