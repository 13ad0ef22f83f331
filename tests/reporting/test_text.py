"""Values as text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting import text
from muntin.reporting.schema import parse_report


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        (text.size, 0, "0 B"),
        (text.size, None, "–"),
        (text.size, 999, "999 B"),
        (text.size, 4_100_000, "4.1 MB"),
        (text.size, 999_700, "1.0 MB"),
        (text.size, 123_400_000, "123 MB"),
        (text.size, 5_000_000_000_000, "5,000 GB"),
        (text.amount, 831, "831"),
        (text.amount, None, "–"),
        (text.amount, 999_900, "1.00 M"),
        (text.amount, 2_812_346, "2.81 M"),
        (text.milliseconds, None, "–"),
        (text.milliseconds, 41.23, "41.2 ms"),
        (text.milliseconds, 0.345, "0.34 ms"),
        (text.milliseconds, 1786.2, "1,786 ms"),
        (text.duration, 8.25, "8.2 s"),
        (text.duration, 133.2, "2 min 13 s"),
        (text.duration, 119.7, "2 min 0 s"),
        (text.duration, 7380, "2 h 3 min"),
        (text.percent, None, "–"),
        (text.percent, 1.0, "100 %"),
        (text.percent, 0.0, "0 %"),
        (text.percent, 0.9997, "99.9 %"),
        (text.percent, 0.0002, "< 0.1 %"),
        (text.unbroken, "18.6 ms → 2.6 ms, 0.651 → 0.649", "18.6\N{NO-BREAK SPACE}ms → 2.6\N{NO-BREAK SPACE}ms, 0.651 → 0.649"),
        (text.capitalized, "accuracy", "Accuracy"),
        (text.capitalized, "mIoU", "mIoU"),
        (text.capitalized, "validation mIoU", "Validation mIoU"),
        (text.moment, "2026-11-24T16:30:00+00:00", "24 November 2026, 16:30 UTC"),
        (text.moment, "2026-11-24T16:30:00", "24 November 2026, 16:30"),
    ],
)
def test_values_as_text(function: Any, value: Any, shown: str) -> None:
    assert function(value) == shown


def test_change_signs() -> None:
    assert text.change(0.651, 0.649, 3) == "\N{MINUS SIGN}0.002"
    assert text.change(0.649, 0.651, 3) == "+0.002"
    assert text.change(0.6501, 0.65, 3) == "±0.000"
    assert text.change(0.7732, 0.7774, 3) == text.change(0.7732, 0.7766, 3) == "+0.004"  # both are shown as 0.777


def test_ratio_directions() -> None:
    assert text.ratio(41.3, 6.87, less="faster", more="slower") == "6.0× faster"
    assert text.ratio(6.87, 41.3, less="faster", more="slower") == "6.0× slower"
    assert text.ratio(2.0, 2.001, less="smaller", more="larger") == text.UNCHANGED
    assert text.ratio(None, 1.0, less="", more="") is None
    assert text.ratio(1.0, 0.0, less="", more="") is None


@given(st.floats(0, 1), st.integers(0, 3))
def test_percent_rounds_to_0_and_100_only_exactly(share: float, digits: int) -> None:
    shown = text.percent(share, digits)
    assert (shown == "100 %") == (share == 1)
    assert (shown == "0 %") == (share == 0)


def test_headline_of_the_sample(report: dict[str, Any]) -> None:
    arrow = text.ARROW
    expected = f"11.3 MB {arrow} 812 kB, 41.3 ms {arrow} 6.9 ms, mIoU 0.651 {arrow} 0.649: measured on the deployed artefact"
    assert text.headline(parse_report(report)) == f"{expected} “mixed”"
    del report["artifacts"]
    assert text.headline(parse_report(report)) == expected


def test_headline_without_measurements(report: dict[str, Any]) -> None:
    report["steps"][-1]["latency_ms"] = None
    assert "ms" not in text.headline(parse_report(report))
    report["steps"] = report["steps"][:1]
    assert text.headline(parse_report(report)) == "11.3 MB, 41.3 ms, mIoU 0.651"
    report["task"] = "classify"
    assert text.headline(parse_report(report)) == "11.3 MB, 41.3 ms, accuracy 0.651"
