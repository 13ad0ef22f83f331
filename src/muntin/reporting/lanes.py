"""Ranks and bits as a picture: a lane for each layer of the original model, how thin it became and in how many bits it is deployed.

Lengths are in percent of the layer that had most parameters. Colours go by the bits of the weights, whose number is always written too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from muntin.reporting import text
from muntin.reporting.layers import NARROW, Piece, Strip, WeightBits, asked_bits, weight_bits_of
from muntin.reporting.schema import LayerRow, RankRow

FULL_BITS = 32
# Up to as many lanes one column is as easy to read and has the longer bars.
MOST_IN_ONE_COLUMN = 16
MOST_REASONS = 6
# Columns grow with what they hold up to these many characters and chips; what is longer wraps.
_WIDEST_NAME, _MOST_CHIPS = 26, 4


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The weight bits of one deployed layer; `told` names it and says why it has them."""

    bits: int
    family: WeightBits
    told: str


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One layer of the original model: `before` and `after` are the lengths of its bar and of the filled part.

    `rank` is '' where the report tells no ranks; `reason` says why a dense layer was kept.
    """

    name: str
    kind: str
    rank: str
    dense: bool
    reason: str
    amounts: str
    before: float
    after: float
    chips: tuple[Chip, ...]


@dataclass(frozen=True, kw_only=True)
class LaneFigure:
    """All lanes in the network's order, what they add up to in words, and the weights by bits; `reasons` are those of dense layers.

    `name_width` and `rank_width` are in digits (the unit `ch` of CSS), `chips` in chips: what the widest lane needs.
    """

    title: str
    summary: str
    lanes: tuple[Lane, ...]
    ranked: bool
    deployed: bool
    reasons: tuple[tuple[str, int], ...]
    reasons_left: int
    strip: Strip | None
    columns: int
    name_width: int
    rank_width: int
    chips: int


def lane_figure(ranks: Sequence[RankRow], layers: Sequence[LayerRow]) -> LaneFigure | None:
    """The lanes of `ranks` with the deployed `layers` that came from each; None where there are no ranks and all weights have 32 bits.

    A deployed layer belongs to the row of its own name, or to the row whose name, with a dot, it begins with. Layers of no row, and all
    layers where there are no ranks, are lanes of their own after the others.
    """
    deployed = any(layer.weight_bits < FULL_BITS for layer in layers)
    if not ranks and not deployed:
        return None
    whole = max([*(max(row.parameters_before, row.parameters_after) for row in ranks), *(layer.parameters for layer in layers)])
    found = {row.name: [layer for layer in layers if _comes_from(layer, row)] for row in ranks}
    placed = {layer.name for parts in found.values() for layer in parts}
    lanes = [_ranked_lane(row, found[row.name], whole) for row in ranks]
    lanes += [_plain_lane(layer, whole) for layer in layers if layer.name not in placed]
    reasons = Counter(lane.reason for lane in lanes if lane.dense and lane.reason).most_common()
    return LaneFigure(
        title="Ranks and bits" if ranks and deployed else "Ranks" if ranks else "Bits",
        summary=_summary(ranks, layers),
        lanes=tuple(lanes),
        ranked=bool(ranks),
        deployed=bool(layers),
        reasons=tuple(reasons[:MOST_REASONS]),
        reasons_left=sum(count for _, count in reasons[MOST_REASONS:]),
        strip=bits_strip(layers),
        columns=1 if len(lanes) <= MOST_IN_ONE_COLUMN else 2,
        name_width=min(_WIDEST_NAME, max(len(lane.name) for lane in lanes)),
        rank_width=max(_digits_wide(lane.rank) for lane in lanes),
        chips=min(_MOST_CHIPS, max(len(lane.chips) for lane in lanes)),
    )


def bits_strip(layers: Sequence[LayerRow]) -> Strip | None:
    """The parameters of `layers` by the bits of their weights, fewest bits first; None where there are no parameters."""
    counts: Counter[int] = Counter()
    for layer in layers:
        counts[layer.weight_bits] += layer.parameters
    total = counts.total()
    if not total:
        return None
    pieces, shares, start = [], [], 0.0
    for bits, count in sorted(counts.items()):
        if count:
            family, share = weight_bits_of(bits), text.percent(count / total)
            told, width = f"{share} of the weights in {bits} bits", 1000 * count / total
            pieces.append(Piece(start=round(start, 2), width=round(width, 2), family=family, told=told, divided=width >= NARROW))
            shares.append((family, f"in {bits} bits", share))
            start += width
    return Strip(title="Weights by bits", what="weights", pieces=tuple(pieces), shares=tuple(shares))


def rank_label(row: RankRow) -> str:
    """'48 of 256', '32 × 24 of 128 × 64' for Tucker-2, 'dense' for a layer that was kept."""
    return f"{_product(row.ranks)} of {_product(row.full)}" if row.ranks else "dense"


def _product(ranks: Sequence[int]) -> str:
    return " × ".join(map(str, ranks))


def _digits_wide(label: str) -> int:
    # Letters, blanks and × are narrower than digits in every face of the page; without this, the bars lose what the label does not use.
    return math.ceil(sum(1 if letter.isdigit() else 0.7 for letter in label))


def _comes_from(layer: LayerRow, row: RankRow) -> bool:
    return layer.name == row.name or layer.name.startswith(f"{row.name}.")


def _ranked_lane(row: RankRow, parts: Sequence[LayerRow], whole: int) -> Lane:
    before, after = text.amount(row.parameters_before), text.amount(row.parameters_after)
    return Lane(
        name=row.name,
        kind=row.kind,
        rank=rank_label(row),
        dense=not row.ranks,
        reason=row.reason,
        amounts=f"{before if before == after else f'{before} {text.ARROW} {after}'} parameters",
        before=_length(row.parameters_before, whole),
        after=_length(row.parameters_after, whole),
        chips=tuple(map(_chip, parts)),
    )


def _plain_lane(layer: LayerRow, whole: int) -> Lane:
    length = _length(layer.parameters, whole)
    return Lane(
        name=layer.name,
        kind=layer.kind,
        rank="",
        dense=False,
        reason="",
        amounts=f"{text.amount(layer.parameters)} parameters",
        before=length,
        after=length,
        chips=(_chip(layer),),
    )


def _chip(layer: LayerRow) -> Chip:
    told = f"{layer.name}: {asked_bits(layer)}"
    return Chip(bits=layer.weight_bits, family=weight_bits_of(layer.weight_bits), told=f"{told}, {layer.note}" if layer.note else told)


def _summary(ranks: Sequence[RankRow], layers: Sequence[LayerRow]) -> str:
    if not ranks:
        quantised = sum(layer.weight_bits < FULL_BITS for layer in layers)
        return f"{quantised} of {len(layers)} layers have weights of fewer than {FULL_BITS} bits."
    thinner = sum(bool(row.ranks) for row in ranks)
    if not thinner:
        return f"All {len(ranks)} layers were kept dense."
    before = text.amount(sum(row.parameters_before for row in ranks))
    after = text.amount(sum(row.parameters_after for row in ranks))
    return f"{thinner} of {len(ranks)} layers became products of thinner ones: {before} {text.ARROW} {after} parameters."


def _length(count: int, whole: int) -> float:
    return round(100 * count / whole, 2) if whole else 0.0
