"""Ranks and bits as lanes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.reporting.lanes import MOST_IN_ONE_COLUMN, LaneFigure, bits_strip, lane_figure
from muntin.reporting.schema import LayerRow, RankRow, parse_report


def layer(name: str, bits: int = 8, parameters: int = 100) -> LayerRow:
    return LayerRow(name=name, kind="Linear", weight_bits=bits, parameters=parameters)


def rank_row(name: str, full: tuple[int, ...] = (64,), ranks: tuple[int, ...] = (), before: int = 100, after: int = 100) -> RankRow:
    return RankRow(name=name, kind="Linear", full=full, ranks=ranks, parameters_before=before, parameters_after=after)


def figure_of(report: dict[str, Any]) -> LaneFigure:
    checked = parse_report(report)
    figure = lane_figure(checked.ranks, checked.layers)
    assert figure is not None
    return figure


def test_lanes_of_the_sample(report: dict[str, Any]) -> None:
    figure = figure_of(report)
    assert figure.title == "Ranks and bits"
    assert [lane.name for lane in figure.lanes] == [row["name"] for row in report["ranks"]]
    assert max(lane.before for lane in figure.lanes) == 100
    assert all(lane.after <= lane.before for lane in figure.lanes)
    assert sum(len(lane.parts) for lane in figure.lanes) == len(report["layers"])


def test_lane_labels() -> None:
    ranks = [
        rank_row("a", (256,), (48,), 200, 80),
        rank_row("b", (128, 64), (32, 24)),
        rank_row("c").model_copy(update={"reason": "small"}),
    ]
    figure = lane_figure(ranks, [layer("a.0", 4), layer("a.1", 8), layer("b", 16), layer("cc.0")])
    assert figure is not None
    assert [lane.rank for lane in figure.lanes] == ["48 of 256", "32 × 24 of 128 × 64", "dense", ""]
    assert [[part.weight_bits for part in lane.parts] for lane in figure.lanes] == [[4, 8], [16], [], [8]]
    assert (figure.lanes[0].before, figure.lanes[0].after, figure.lanes[0].amounts) == (100, 40, "200 → 80 parameters")
    assert figure.lanes[3].name == "cc.0"  # not a part of "c": its name does not begin with "c."
    assert figure.reasons == (("small", 1),)
    assert figure.summary == "2 of 3 layers became products of thinner ones: 400 → 280 parameters."


def test_lanes_without_ranks(report: dict[str, Any]) -> None:
    report["ranks"] = []
    figure = figure_of(report)
    assert (figure.title, figure.ranked, figure.rank_width) == ("Bits", False, 0)
    assert [lane.name for lane in figure.lanes] == [row["name"] for row in report["layers"]]
    assert {lane.rank for lane in figure.lanes} == {""}


def test_lanes_without_layers(report: dict[str, Any]) -> None:
    report["layers"] = []
    figure = figure_of(report)
    assert (figure.title, figure.deployed, figure.strip) == ("Ranks", False, None)


def test_lanes_of_an_uncompressed_model() -> None:
    assert lane_figure((), ()) is None
    assert lane_figure((), [layer("a", 32), layer("b", 32)]) is None


def test_columns_of_few_and_many_lanes(report: dict[str, Any]) -> None:
    assert figure_of(report).columns == 2
    report["ranks"], report["layers"] = report["ranks"][:3], report["layers"][:3]
    assert figure_of(report).columns == 1
    assert MOST_IN_ONE_COLUMN < 45


def test_lanes_of_layers_without_parameters() -> None:
    figure = lane_figure([rank_row("a", before=0, after=0)], [layer("a", parameters=0)])
    assert figure is not None
    assert (figure.lanes[0].before, figure.lanes[0].after, figure.strip) == (0, 0, None)


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(0, 10**7)), min_size=1, max_size=40))
def test_bits_strip_of_any_layers(layers: list[tuple[int, int]]) -> None:
    strip = bits_strip([layer(f"{index}", bits, parameters) for index, (bits, parameters) in enumerate(layers)])
    if strip is None:
        assert not any(parameters for _, parameters in layers)
        return
    assert sum(segment.width for segment in strip.segments) == pytest.approx(1000, abs=0.5)
    assert [words for _, words, _ in strip.shares] == [
        f"in {bits} bits" for bits in sorted({bits for bits, parameters in layers if parameters})
    ]
