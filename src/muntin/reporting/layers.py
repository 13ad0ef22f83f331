"""The layers of a report: the bits requested for them, the precisions they ran in, and bars of the share of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from muntin.reporting import text
from muntin.reporting.schema import LayerRow

Family = Literal["integer", "half", "float", "unknown"]

FAMILIES: dict[Family, str] = {
    "integer": "integers",
    "half": "16-bit floats",
    "float": "32-bit floats",
    "unknown": "not told by the engine",
}
_PRECISIONS: dict[Family, frozenset[str]] = {
    "integer": frozenset({"i8", "u8", "int8", "uint8", "i4", "u4", "int4", "uint4"}),
    "half": frozenset({"bf16", "f16", "fp16", "bfloat16", "float16"}),
    "float": frozenset({"f32", "fp32", "float32"}),
}
# Narrower segments (in thousandths) get no dividing line, which would cover them.
_LEAST_DIVIDED = 5.0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a bar, in thousandths of its length: its CSS class, its tooltip, and whether a line separates it from the previous one."""

    start: float
    width: float
    style: str
    tooltip: str
    divided: bool


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A bar of segments as wide as their share of `what`; `shares` has the CSS class, the words and the share of each group."""

    title: str
    what: str
    segments: tuple[Segment, ...]
    shares: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class LayerShares:
    """The shares of layers in bars and in words; `fallbacks` are the names of layers that ran in floats although integers were requested.

    `largest` is the number of parameters of the largest layer; `clipped` is true where any layer has the share of values outside its grid.
    """

    strips: tuple[Strip, ...]
    summary: str
    fallbacks: tuple[str, ...]
    largest: int
    clipped: bool


def layer_shares(layers: Sequence[LayerRow]) -> LayerShares | None:
    """Return the shares of `layers`, or None where there are none."""
    if not layers:
        return None
    integer_layers = sum(family_of(layer.executed) == "integer" for layer in layers)
    amounts = {"MACs": [layer.macs or 0 for layer in layers], "parameters": [layer.parameters for layer in layers]}
    return LayerShares(
        strips=tuple(_strip(what, layers, counts) for what, counts in amounts.items() if any(counts)),
        summary=f"{integer_layers} of {len(layers)} layers ran on integers",
        fallbacks=tuple(layer.name for layer in layers if is_fallback(layer)),
        largest=max(layer.parameters for layer in layers),
        clipped=any(layer.clipped is not None for layer in layers),
    )


def family_of(precision: str | None) -> Family:
    """Return the family of a precision as engines report it: 'I8', 'bf16', 'f32', 'brgemm_avx512_amx_i8' and similar names."""
    # The last word that is a precision: kernels are named "method_instructions_precision".
    for word in reversed(re.split(r"[^a-z0-9]+", (precision or "").lower())):
        for family, names in _PRECISIONS.items():
            if word in names:
                return family
    return "unknown"


def requested_bits(layer: LayerRow) -> str:
    """Return the bits that were requested: 'W4 A8', or 'W16' where the activations are not quantised."""
    return f"W{layer.weight_bits} A{layer.activation_bits}" if layer.activation_bits is not None else f"W{layer.weight_bits}"


def bits_style(bits: int) -> str:
    """Return the CSS class for a number of weight bits: that of the next of 4, 8, 16 and 32."""
    return "bits4" if bits <= 4 else "bits8" if bits <= 8 else "bits16" if bits <= 16 else "bits32"


def bits_family(layer: LayerRow) -> Family:
    """Return the family of numbers that a layer's weight bits were requested in."""
    return "integer" if layer.weight_bits <= 8 else "half" if layer.weight_bits <= 16 else "float"


def is_fallback(layer: LayerRow) -> bool:
    """Return whether the engine ran a layer in floats although integers were requested."""
    requested = layer.weight_bits <= 8 and layer.activation_bits is not None and layer.activation_bits <= 8
    return requested and family_of(layer.executed) in ("half", "float")


def segments(parts: Iterable[tuple[float, str, str]], total: float) -> tuple[Segment, ...]:
    """Return the segments of a bar for `parts` (amount, CSS class, tooltip) of `total`; amounts of 0 have none."""
    drawn, start = [], 0.0
    for part, style, tooltip in parts:
        width = 1000 * part / total
        if part:
            divided = width >= _LEAST_DIVIDED
            drawn.append(Segment(start=round(start, 2), width=round(width, 2), style=style, tooltip=tooltip, divided=divided))
        start += width
    return tuple(drawn)


def _strip(what: str, layers: Sequence[LayerRow], amounts: Sequence[int]) -> Strip:
    total = sum(amounts)
    parts: list[tuple[float, str, str]] = []
    shares: dict[Family, float] = dict.fromkeys(FAMILIES, 0.0)
    for layer, count in zip(layers, amounts, strict=True):
        family = family_of(layer.executed)
        shares[family] += count / total
        tooltip = f"{layer.name}: {text.percent(count / total)} of {what}, {layer.executed or FAMILIES['unknown']}"
        parts.append((count, family, tooltip))
    return Strip(
        title=f"By {what}",
        what=what,
        segments=segments(parts, total),
        shares=tuple((family, FAMILIES[family], text.percent(share)) for family, share in shares.items() if share > 0),
    )
