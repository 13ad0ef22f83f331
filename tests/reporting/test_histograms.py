"""The worst layers as histograms."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting import histograms
from muntin.reporting.schema import Histogram, LayerRow, parse_report

FINITE = st.floats(-1e9, 1e9)
RANGE = st.tuples(FINITE, FINITE).map(sorted).filter(lambda pair: pair[0] < pair[1])


def layer(histogram: Histogram, *, sqnr_db: float | None = 10.0, clipped: float | None = None) -> LayerRow:
    return LayerRow(
        name="a", kind="Linear", weight_bits=4, activation_bits=8, parameters=1, sqnr_db=sqnr_db, clipped=clipped, histogram=histogram
    )


def histogram(low: float = -1, high: float = 3, grid_low: float = -1, grid_high: float = 1) -> Histogram:
    return Histogram(low=low, high=high, counts=(1, 100, 10, 0), grid_low=grid_low, grid_high=grid_high)


def test_the_worst_come_first(report: dict[str, Any]) -> None:
    layers = parse_report(report).layers
    drawn = histograms.worst_layers(layers)
    by_name = {row.name: row for row in layers}
    figures = [by_name[item.name].sqnr_db for item in drawn]
    assert len(drawn) == 4
    assert figures == sorted(row.sqnr_db for row in layers if row.sqnr_db is not None)[:4]


def test_one_without_a_figure_comes_last() -> None:
    drawn = histograms.worst_layers([layer(histogram(), sqnr_db=None), layer(histogram(), sqnr_db=-3.21)])
    assert [item.sqnr for item in drawn] == ["SQNR \N{MINUS SIGN}3.2 dB", "SQNR not measured"]


def test_no_histograms_no_pictures(report: dict[str, Any]) -> None:
    report["layers"] = [{**row, "histogram": None} for row in report["layers"]]
    assert histograms.worst_layers(parse_report(report).layers) == ()


def test_bins_outside_the_grid_are_marked_and_empty_ones_left_out() -> None:
    (item,) = histograms.worst_layers([layer(histogram(), clipped=0.09)])
    assert [bin_.outside for bin_ in item.bins] == [False, False, True]
    assert max(bin_.height for bin_ in item.bins) == histograms.BOTTOM - histograms.TOP
    assert item.grid_left == histograms.LEFT
    assert item.grid_right == (histograms.LEFT + histograms.RIGHT) / 2
    assert item.summary.replace("\N{MINUS SIGN}", "-") == (
        "Input values of a from -1 to 3; the 8-bit grid covers -1 to 1; 9.00 % of the values lie outside the grid."
    )


def test_what_was_clipped_in_words() -> None:
    told = [histograms.worst_layers([layer(histogram(), clipped=share)])[0].clipped for share in (None, 0.0, 0.00001)]
    assert told == ["", "no value lies outside the grid", "< 0.01 % of the values lie outside the grid"]


@given(RANGE, RANGE, st.lists(st.integers(0, 10**12), min_size=2, max_size=128))
def test_any_histogram_stays_in_its_box(values: list[float], grid: list[float], counts: list[int]) -> None:
    drawn = Histogram(low=values[0], high=values[1], counts=tuple(counts), grid_low=grid[0], grid_high=grid[1])
    (item,) = histograms.worst_layers([layer(drawn)])
    places = [item.grid_left, item.grid_right, item.grid_label.at, *(tick.at for tick in item.ticks)]
    places += [place for bin_ in item.bins for place in (bin_.x, bin_.x + bin_.width)]
    assert all(math.isfinite(x) and histograms.LEFT <= x <= histograms.RIGHT + 1 for x in places)
    assert all(histograms.TOP - 0.1 <= bin_.y <= histograms.BOTTOM for bin_ in item.bins)
    assert len(item.bins) <= len(counts)
