"""The layers of a report: what was asked of each, what the engine ran it in, and the share each has of the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from muntin.reporting import text
from muntin.reporting.schema import LayerRow

Family = Literal["integer", "half", "float", "unknown"]
WeightBits = Literal["bits4", "bits8", "bits16", "bits32"]

FAMILIES: dict[Family, str] = {
    "integer": "integers",
    "half": "16-bit floats",
    "float": "32-bit floats",
    "unknown": "not told by the engine",
}
_WORDS: dict[Family, frozenset[str]] = {
    "integer": frozenset({"i8", "u8", "int8", "uint8", "i4", "u4", "int4", "uint4"}),
    "half": frozenset({"bf16", "f16", "fp16", "bfloat16", "float16"}),
    "float": frozenset({"f32", "fp32", "float32"}),
}
# Below this width (of 1000) a bar between two panes would cover the pane.
NARROW = 5.0


@dataclass(frozen=True, kw_only=True)
class LayerCells:
    """A row of the layer table. `short` says that the engine ran it in floats although integers were asked for;
    `parameter_length` is in percent of the layer that has most; `note` says why the layer has more bits than others."""

    name: str
    kind: str
    bits: str
    bits_family: Family
    executed: str
    executed_family: Family
    short: bool
    parameters: str
    parameter_length: float
    macs: str
    sqnr: str
    clipped: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a strip, in thousandths."""

    start: float
    width: float
    family: Family | WeightBits
    told: str
    divided: bool


@dataclass(frozen=True, kw_only=True)
class Strip:
    """All layers side by side, as wide as their share of `what`; `shares` a line for each precision that occurs, in words and numbers."""

    title: str
    what: str
    pieces: tuple[Piece, ...]
    shares: tuple[tuple[Family | WeightBits, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """The layers of a report, ready to lay out; `clipped` says that any row has the share outside its grid."""

    rows: tuple[LayerCells, ...]
    strips: tuple[Strip, ...]
    summary: str
    short: tuple[str, ...]
    clipped: bool


def layer_table(layers: Sequence[LayerRow]) -> LayerTable | None:
    """The table of `layers` in their order; None where there are none."""
    if not layers:
        return None
    largest = max(layer.parameters for layer in layers)
    rows = tuple(_cells(layer, largest) for layer in layers)
    whole = sum(row.executed_family == "integer" for row in rows)
    return LayerTable(
        rows=rows,
        strips=tuple(
            strip
            for what, amounts in (("MACs", [layer.macs or 0 for layer in layers]), ("parameters", [layer.parameters for layer in layers]))
            if (strip := _strip(what, layers, amounts)) is not None
        ),
        summary=f"{whole} of {len(rows)} layers ran on integers",
        short=tuple(row.name for row in rows if row.short),
        clipped=any(layer.clipped is not None for layer in layers),
    )


def family_of(precision: str | None) -> Family:
    """What a precision that an engine reports counts as: 'I8', 'bf16', 'f32', 'brgemm_avx512_amx_i8' and their like."""
    # The last word that is a precision: kernels are named "method_instructions_precision".
    for word in reversed(re.split(r"[^a-z0-9]+", (precision or "").lower())):
        for family, words in _WORDS.items():
            if word in words:
                return family
    return "unknown"


def asked_bits(layer: LayerRow) -> str:
    """The bits asked for: 'W4 A8', or 'W16' where the activations are not quantised."""
    return f"W{layer.weight_bits} A{layer.activation_bits}" if layer.activation_bits is not None else f"W{layer.weight_bits}"


def weight_bits_of(bits: int) -> WeightBits:
    """The colour that a number of weight bits is drawn in: that of the next of 4, 8, 16 and 32."""
    return "bits4" if bits <= 4 else "bits8" if bits <= 8 else "bits16" if bits <= 16 else "bits32"


def _cells(layer: LayerRow, largest: int) -> LayerCells:
    executed = family_of(layer.executed)
    asked_integer = layer.weight_bits <= 8 and layer.activation_bits is not None and layer.activation_bits <= 8
    return LayerCells(
        name=layer.name,
        kind=layer.kind,
        bits=asked_bits(layer),
        bits_family="integer" if layer.weight_bits <= 8 else "half" if layer.weight_bits <= 16 else "float",
        executed=layer.executed or "–",
        executed_family=executed,
        short=asked_integer and executed in ("half", "float"),
        parameters=text.amount(layer.parameters),
        parameter_length=round(100 * layer.parameters / largest, 2) if largest else 0.0,
        macs="–" if layer.macs is None else text.amount(layer.macs),
        sqnr="–" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}".replace("-", text.MINUS),
        clipped="–" if layer.clipped is None else text.percent(layer.clipped, 2),
        note=layer.note,
    )


def _strip(what: str, layers: Sequence[LayerRow], amounts: Sequence[int]) -> Strip | None:
    total = sum(amounts)
    if not total:
        return None
    pieces, start = [], 0.0
    shares: dict[Family, float] = dict.fromkeys(FAMILIES, 0.0)
    for layer, count in zip(layers, amounts, strict=True):
        width = 1000 * count / total
        family = family_of(layer.executed)
        shares[family] += count / total
        told = f"{layer.name}: {text.percent(count / total)} of {what}, {layer.executed or FAMILIES['unknown']}"
        pieces.append(Piece(start=round(start, 2), width=round(width, 2), family=family, told=told, divided=width >= NARROW))
        start += width
    listed = tuple((family, FAMILIES[family], text.percent(share)) for family, share in shares.items() if share > 0)
    return Strip(title=f"By {what}", what=what, pieces=tuple(piece for piece in pieces if piece.width > 0), shares=listed)
