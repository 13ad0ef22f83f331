"""Ticks at round values, and the coordinates of values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting.axes import Axis, linear_ticks, log_ticks


@pytest.mark.parametrize(
    ("low", "high", "intervals", "ticks"),
    [
        (0.0, 1.0, 4, [0, 0.25, 0.5, 0.75, 1]),
        (0.0, 1.53, 4, [0, 0.4, 0.8, 1.2, 1.6]),
        (-3.2, 9.1, 5, [-5, -2.5, 0, 2.5, 5, 7.5, 10]),
        (28.4, 31.9, 4, [28, 29, 30, 31, 32]),
        (0.0, 4.641, 5, [0, 1, 2, 3, 4, 5]),
        (30.01, 30.02, 4, [30.01, 30.0125, 30.015, 30.0175, 30.02]),
    ],
)
def test_linear_ticks(low: float, high: float, intervals: int, ticks: list[float]) -> None:
    assert linear_ticks(low, high, intervals) == pytest.approx(ticks)


@pytest.mark.parametrize(("high", "ticks"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (7, [0, 2, 4, 6, 8]), (1395, [0, 400, 800, 1200, 1600])])
def test_integer_ticks(high: int, ticks: list[int]) -> None:
    assert linear_ticks(0, high, 4, integer=True) == ticks


@given(st.floats(-1e12, 1e12), st.floats(1e-300, 1e12), st.sampled_from([4, 5]))
def test_linear_ticks_cover_any_range(low: float, length: float, intervals: int) -> None:
    high = low + length
    ticks = linear_ticks(low, high, intervals)
    error = 1e-9 * (high - low) + 1e-12 * max(abs(low), abs(high))
    assert all(map(math.isfinite, ticks))
    assert ticks[0] <= low + error
    assert ticks[-1] >= high - error
    assert 2 <= len(ticks) <= intervals + 3


def test_linear_ticks_of_a_single_point() -> None:
    for value in (0.0, 5e-324, 30.0, -1e9):
        ticks = linear_ticks(value, value, 4)
        assert ticks[0] < ticks[-1]


def test_log_ticks() -> None:
    values, digits = zip(*log_ticks(0.07, 2.0), strict=True)
    assert values == pytest.approx((0.07, 0.08, 0.09, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2))
    assert digits == (7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2)
    assert [value for value, digit in log_ticks(1e-3, 1e6) if digit == 1] == [10.0**power for power in range(-3, 7)]


def test_axis_coordinates() -> None:
    linear, log = Axis(low=0, high=10, start=150, end=10), Axis(low=1, high=100, start=0, end=50, log=True)
    assert [linear(value) for value in (0, 2.5, 10)] == [150, 115, 10]
    assert [log(value) for value in (1, 10, 100)] == [0, 25, 50]
    assert [(tick.at, tick.label) for tick in linear.ticks((-5, 5, 15), str)] == [(80, "5")]
