"""Line charts and histograms as geometry."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting import charts
from muntin.reporting.schema import InputHistogram, LayerRow, parse_report

FINITE = st.floats(-1e9, 1e9)
RANGE = st.tuples(FINITE, FINITE).map(sorted).filter(lambda pair: pair[0] < pair[1])


def test_charts_of_the_sample(report: dict[str, Any]) -> None:
    drawn = charts.training_charts(parse_report(report))
    assert [item.key for item in drawn] == ["validation", "loss", "rate", "speed"]
    for item in drawn:
        for x, _ in item.curves[-1].points:
            assert charts.LINES.left <= x <= charts.LINES.right
        assert all(charts.LINES.top <= tick.at <= charts.LINES.bottom for tick in item.y_ticks)
        assert len({tick.label for tick in item.y_ticks}) == len(item.y_ticks) >= 2


def test_validation_chart_lines(report: dict[str, Any]) -> None:
    item = charts.training_charts(parse_report(report))[0]
    assert [curve.color is None for curve in item.curves] == [False] * 6 + [True]
    best = max(row["miou"] for row in report["validation"])
    assert f"{best:.3f}" in item.summary


@pytest.mark.parametrize("rows", [1, 2])
def test_charts_of_few_rows(report: dict[str, Any], rows: int) -> None:
    report["training"], report["validation"] = report["training"][:rows], report["validation"][:rows]
    keys = [item.key for item in charts.training_charts(parse_report(report))]
    assert keys == ["validation", "loss", "rate", "speed"][: 2 + rows]  # the first row has no throughput yet


def test_charts_without_rows(report: dict[str, Any]) -> None:
    report["training"] = report["validation"] = []
    assert charts.training_charts(parse_report(report)) == ()


def test_charts_of_many_rows_are_thinned(report: dict[str, Any]) -> None:
    report["training"] = [{"step": step, "loss": 2.0 - step / 10_000, "learning_rate": 1e-3} for step in range(10_000)]
    loss = charts.training_charts(parse_report(report))[1]
    points = loss.curves[0].points
    assert len(points) <= charts.MOST_POINTS
    assert (points[0][0], points[-1][0]) == (charts.LINES.left, charts.LINES.right)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.01, 1))
def test_smooth_stays_between_the_extremes(values: list[float], share: float) -> None:
    out = charts.smooth(values, share)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert len(out) == len(values)
    assert all(min(values) - slack <= value <= max(values) + slack for value in out)


def test_smooth_of_a_ramp_does_not_lag() -> None:
    ramp = [float(index) for index in range(100)]
    assert charts.smooth(ramp, 0.1)[20:80] == pytest.approx(ramp[20:80])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_line_chart_of_any_curve_stays_in_its_frame(data: list[tuple[int, float]]) -> None:
    points = [(float(x), y) for x, y in sorted(data)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    item = charts.line_chart(
        key="k",
        title="t",
        figure="",
        summary="",
        curves=[charts.Curve(points=points, style="main")],
        y_range=(low, high + 1.0),
        y_label=str,
    )
    assert all(
        charts.LINES.left - 0.1 <= x <= charts.LINES.right + 0.1 and charts.LINES.top - 0.1 <= y <= charts.LINES.bottom + 0.1
        for curve in item.curves
        for x, y in curve.points
    )


def layer(histogram: InputHistogram, *, sqnr_db: float | None = 10.0, clipped: float | None = None) -> LayerRow:
    return LayerRow(
        name="a", kind="Linear", weight_bits=4, activation_bits=8, parameters=1, sqnr_db=sqnr_db, clipped=clipped, histogram=histogram
    )


def histogram(low: float = -1, high: float = 3, grid_low: float = -1, grid_high: float = 1) -> InputHistogram:
    return InputHistogram(low=low, high=high, counts=(1, 100, 10, 0), grid_low=grid_low, grid_high=grid_high)


def test_worst_layers_by_sqnr(report: dict[str, Any]) -> None:
    layers = parse_report(report).layers
    drawn = charts.worst_layers(layers)
    assert [item.layer.sqnr_db for item in drawn] == sorted(row.sqnr_db for row in layers if row.sqnr_db is not None)[:4]
    drawn = charts.worst_layers([layer(histogram(), sqnr_db=None), layer(histogram(), sqnr_db=-3.21)])
    assert [item.layer.sqnr_db for item in drawn] == [-3.21, None]


def test_worst_layers_without_histograms(report: dict[str, Any]) -> None:
    report["layers"] = [{**row, "histogram": None} for row in report["layers"]]
    assert charts.worst_layers(parse_report(report).layers) == ()


def test_bins_outside_the_grid() -> None:
    (item,) = charts.worst_layers([layer(histogram(), clipped=0.09)])
    assert [bin_.outside for bin_ in item.bins] == [False, False, True]
    assert max(bin_.height for bin_ in item.bins) == charts.HISTOGRAM.bottom - charts.HISTOGRAM.top
    assert item.grid_left == charts.HISTOGRAM.left
    assert item.grid_right == (charts.HISTOGRAM.left + charts.HISTOGRAM.right) / 2
    assert item.summary.replace("\N{MINUS SIGN}", "-") == (
        "Input values of a from -1 to 3; the 8-bit grid covers -1 to 1; 9.00 % of the values lie outside the grid."
    )


def test_clipped_share_in_words() -> None:
    words = [charts.worst_layers([layer(histogram(), clipped=share)])[0].clipped for share in (None, 0.0, 0.00001)]
    assert words == ["", "no value lies outside the grid", "< 0.01 % of the values lie outside the grid"]


@given(RANGE, RANGE, st.lists(st.integers(0, 10**12), min_size=2, max_size=128))
def test_any_histogram_stays_in_its_frame(values: list[float], grid: list[float], counts: list[int]) -> None:
    drawn = InputHistogram(low=values[0], high=values[1], counts=tuple(counts), grid_low=grid[0], grid_high=grid[1])
    (item,) = charts.worst_layers([layer(drawn)])
    places = [item.grid_left, item.grid_right, item.grid_label.at, *(tick.at for tick in item.ticks)]
    places += [place for bin_ in item.bins for place in (bin_.x, bin_.x + bin_.width)]
    assert all(math.isfinite(x) and charts.HISTOGRAM.left <= x <= charts.HISTOGRAM.right + 1 for x in places)
    assert all(charts.HISTOGRAM.top - 0.1 <= bin_.y <= charts.HISTOGRAM.bottom for bin_ in item.bins)
    assert len(item.bins) <= len(counts)
