"""Line charts as geometry."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting import charts
from muntin.reporting.schema import parse_report


def points_of(line: charts.Line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.points.split())]


def test_the_sample_has_four_charts_inside_their_box(report: dict[str, Any]) -> None:
    drawn = charts.training_charts(parse_report(report))
    assert [item.key for item in drawn] == ["validation", "loss", "rate", "speed"]
    for item in drawn:
        for x, _ in points_of(item.lines[-1]):
            assert charts.LEFT <= x <= charts.RIGHT
        assert all(charts.TOP <= tick.at <= charts.BOTTOM for tick in item.y_ticks)
        assert len({tick.label for tick in item.y_ticks}) == len(item.y_ticks) >= 2


def test_validation_draws_the_mean_over_its_classes(report: dict[str, Any]) -> None:
    item = charts.training_charts(parse_report(report))[0]
    assert [line.color is None for line in item.lines] == [False] * 6 + [True]
    best = max(row["miou"] for row in report["validation"])
    assert f"{best:.3f}" in item.summary


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_still_draw(report: dict[str, Any], rows: int) -> None:
    report["training"], report["validation"] = report["training"][:rows], report["validation"][:rows]
    keys = [item.key for item in charts.training_charts(parse_report(report))]
    assert keys == ["validation", "loss", "rate", "speed"][: 2 + rows]  # the first row has no throughput yet


def test_no_rows_no_charts(report: dict[str, Any]) -> None:
    report["training"] = report["validation"] = []
    assert charts.training_charts(parse_report(report)) == ()


def test_many_rows_are_thinned_and_keep_their_ends(report: dict[str, Any]) -> None:
    report["training"] = [{"step": step, "loss": 2.0 - step / 10_000, "learning_rate": 1e-3} for step in range(10_000)]
    loss = charts.training_charts(parse_report(report))[1]
    points = points_of(loss.lines[0])
    assert len(points) <= charts.MOST_POINTS
    assert (points[0][0], points[-1][0]) == (charts.LEFT, charts.RIGHT)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.01, 1))
def test_smoothing_stays_between_the_extremes(values: list[float], share: float) -> None:
    out = charts.smooth(values, share)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert len(out) == len(values)
    assert all(min(values) - slack <= value <= max(values) + slack for value in out)


def test_smoothing_does_not_lag() -> None:
    ramp = [float(index) for index in range(100)]
    assert charts.smooth(ramp, 0.1)[20:80] == pytest.approx(ramp[20:80])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_any_curve_gives_finite_coordinates(data: list[tuple[int, float]]) -> None:
    points = [(float(x), y) for x, y in sorted(data)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    item = charts.chart(
        key="k",
        title="t",
        figure="",
        summary="",
        curves=[charts.Curve(points=points, style="main")],
        y_range=(low, high + 1.0),
        y_label=str,
    )
    assert all(
        charts.LEFT - 0.1 <= x <= charts.RIGHT + 0.1 and charts.TOP - 0.1 <= y <= charts.BOTTOM + 0.1
        for line in item.lines
        for x, y in points_of(line)
    )
