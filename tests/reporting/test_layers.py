"""The layer table: what was asked and what ran."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.reporting.layers import family_of, layer_table
from muntin.reporting.schema import parse_report


@pytest.mark.parametrize(
    ("told", "family"),
    [
        ("I8", "integer"),
        ("u8", "integer"),
        ("int8", "integer"),
        ("brgemm_avx512_amx_i8", "integer"),
        ("brgconv_avx512_amx_1x1_i8", "integer"),
        ("bf16", "half"),
        ("jit_avx512_amx_bf16", "half"),
        ("f32", "float"),
        ("interpolate_f32", "float"),
        ("ref_any", "unknown"),
        (None, "unknown"),
    ],
)
def test_family(told: str | None, family: str) -> None:
    assert family_of(told) == family


def test_the_table_shows_each_layer_and_names_what_fell_back(report: dict[str, Any]) -> None:
    table = layer_table(parse_report(report).layers)
    assert table is not None
    assert [row.name for row in table.rows] == [layer["name"] for layer in report["layers"]]
    assert table.short == ("decoder.lateral.reduce", "decoder.lateral.expand")  # W8 A8 asked, f32 run
    assert table.rows[0].bits == "W16"
    assert max(row.parameter_length for row in table.rows) == 100


def test_four_bits_are_integers_and_say_why_not_more(report: dict[str, Any]) -> None:
    table = layer_table(parse_report(report).layers)
    assert table is not None
    rows = {row.name: row for row in table.rows}
    assert (rows["stages.3.0.qkv.reduce"].bits, rows["stages.3.0.qkv.reduce"].bits_family, rows["stages.3.0.qkv.reduce"].note) == (
        "W4 A8",
        "integer",
        "",
    )
    assert (rows["stages.3.2.mlp.0.expand"].bits, rows["stages.3.2.mlp.0.expand"].bits_family) == ("W8 A8", "integer")
    assert rows["stages.3.2.mlp.0.expand"].note.startswith("4 bits cost")


def test_the_clipped_share_is_told_where_it_was_measured(report: dict[str, Any]) -> None:
    table = layer_table(parse_report(report).layers)
    assert table is not None
    assert table.clipped
    assert table.rows[0].clipped == "–"
    assert table.rows[1].clipped.endswith(" %")
    report["layers"] = [{**layer, "clipped": None} for layer in report["layers"]]
    without = layer_table(parse_report(report).layers)
    assert without is not None
    assert not without.clipped


def test_a_strip_is_whole(report: dict[str, Any]) -> None:
    table = layer_table(parse_report(report).layers)
    assert table is not None
    assert [strip.what for strip in table.strips] == ["MACs", "parameters"]
    for strip in table.strips:
        assert sum(piece.width for piece in strip.pieces) == pytest.approx(1000, abs=1)
        assert strip.pieces[-1].start + strip.pieces[-1].width == pytest.approx(1000, abs=0.1)


def test_nothing_measured_nothing_drawn(report: dict[str, Any]) -> None:
    assert layer_table(()) is None
    report["layers"] = [{**layer, "macs": None, "parameters": 0, "executed": None} for layer in report["layers"]]
    table = layer_table(parse_report(report).layers)
    assert table is not None
    assert table.strips == ()
    assert table.short == ()
