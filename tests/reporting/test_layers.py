"""Layers: requested bits, executed precisions and shares."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.reporting.layers import LayerShares, bits_family, bits_style, family_of, layer_shares, requested_bits
from muntin.reporting.schema import parse_report


def shares_of(report: dict[str, Any]) -> LayerShares:
    shares = layer_shares(parse_report(report).layers)
    assert shares is not None
    return shares


@pytest.mark.parametrize(
    ("precision", "family"),
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
def test_family_of_a_precision(precision: str | None, family: str) -> None:
    assert family_of(precision) == family


def test_requested_bits_and_fallbacks(report: dict[str, Any]) -> None:
    shares = shares_of(report)
    rows = {row.name: (requested_bits(row), bits_family(row)) for row in parse_report(report).layers}
    assert [bits_style(bits) for bits in (2, 4, 8, 12, 32)] == ["bits4", "bits4", "bits8", "bits16", "bits32"]
    assert rows["stem.0"] == ("W16", "half")
    assert rows["stages.3.0.qkv.reduce"] == ("W4 A8", "integer")
    assert rows["stages.3.2.mlp.0.expand"] == ("W8 A8", "integer")
    assert shares.fallbacks == ("decoder.lateral.reduce", "decoder.lateral.expand")  # W8 A8 requested, f32 executed
    assert shares.largest == max(layer["parameters"] for layer in report["layers"])


def test_strip_covers_its_whole_length(report: dict[str, Any]) -> None:
    shares = shares_of(report)
    assert [strip.what for strip in shares.strips] == ["MACs", "parameters"]
    for strip in shares.strips:
        assert sum(segment.width for segment in strip.segments) == pytest.approx(1000, abs=1)
        assert strip.segments[-1].start + strip.segments[-1].width == pytest.approx(1000, abs=0.1)


def test_layers_without_measurements(report: dict[str, Any]) -> None:
    assert shares_of(report).clipped
    assert layer_shares(()) is None
    unmeasured = {"macs": None, "parameters": 0, "executed": None, "clipped": None}
    report["layers"] = [{**layer, **unmeasured} for layer in report["layers"]]
    shares = shares_of(report)
    assert (shares.strips, shares.fallbacks, shares.clipped) == ((), (), False)
