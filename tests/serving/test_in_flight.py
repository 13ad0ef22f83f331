"""Batches in progress: when they are overdue, and how often their calls are interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.serving.in_flight import RETRY_S, InFlight
from muntin.serving.opening import Call
from muntin.serving.version import Version


def test_overdue_batch(shelf: Any) -> None:
    version, path = Version(name="1", path=Path("1")), Path("1")
    version.opened(shelf.open(path, {Call((1, 8, 8)): 1}, shelf.probe(path, {}, lambda: False), lambda: False))
    in_flight = InFlight()
    slow = in_flight.begin(version, rows=3, now=100.0, within=10)
    slower = in_flight.begin(version, rows=1, now=101.0, within=10)
    assert (in_flight.asked, version.overdue) == (101.0, 0)
    assert in_flight.newly_overdue([version], 109.0) == []
    assert in_flight.newly_overdue([version], 110.0) == [slow]
    assert in_flight.stuck == [(version.session, 10)]
    in_flight.stuck.clear()
    assert in_flight.newly_overdue([version], 110.0 + RETRY_S / 2) == [] == in_flight.stuck
    assert in_flight.newly_overdue([version], 110.0 + RETRY_S) == []
    assert in_flight.stuck == [(version.session, 10)]
    assert in_flight.newly_overdue([version], 111.0) == [slower]
    assert version.overdue == 2
    version.begun.clear()
    in_flight.stuck.clear()
    assert in_flight.newly_overdue([version], 200.0) == [] == in_flight.stuck
