"""Ranks and bits as a picture: a lane for each layer of the original model, with its size before and after and its deployed bits.

Lengths are in percent of the layer with most parameters. Colours show the bits of the weights, which are also written as numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from muntin.reporting import text
from muntin.reporting.layers import Strip, bits_style, segments
from muntin.reporting.schema import LayerRow, RankRow

FULL_BITS = 32
DENSE = "dense"
# Up to this many lanes stand in one column, which has the longer bars.
MOST_IN_ONE_COLUMN = 16
MOST_REASONS = 6
# Columns grow with their contents up to this many characters and chips; longer contents wrap.
_WIDEST_NAME, _MOST_CHIPS = 26, 4


@dataclass(frozen=True, kw_only=True)
class LayerLane:
    """One layer of the original model: `before` and `after` are the lengths of its bar and of the filled part.

    `rank` is '' where the report has no ranks; `reason` says why a dense layer was kept; `parts` are the deployed layers it became.
    """

    name: str
    kind: str
    rank: str
    reason: str
    amounts: str
    before: float
    after: float
    parts: Sequence[LayerRow]


@dataclass(frozen=True, kw_only=True)
class LaneFigure:
    """All lanes in the network's order, their sum in words, and the weights by bits; `reasons` are those of dense layers.

    `name_width` and `rank_width` are in digits (the unit `ch` of CSS), `chips` in chips: the needs of the widest lane.
    """

    title: str
    summary: str
    lanes: tuple[LayerLane, ...]
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
    """Return the lanes of `ranks` with the deployed `layers` that came from each; None without ranks and with all weights in 32 bits.

    A deployed layer belongs to the row of its own name, or to the row whose name and a dot it begins with. Layers without a row, and all
    layers where there are no ranks, are lanes of their own after the others.
    """
    deployed = any(layer.weight_bits < FULL_BITS for layer in layers)
    if not ranks and not deployed:
        return None
    whole = max([*(max(row.parameters_before, row.parameters_after) for row in ranks), *(layer.parameters for layer in layers)])
    layers_of = {row.name: [layer for layer in layers if f"{layer.name}.".startswith(f"{row.name}.")] for row in ranks}
    placed = {layer.name for parts in layers_of.values() for layer in parts}
    lanes = [_lane(row, layers_of[row.name], whole) for row in ranks]
    lanes += [_lane(layer, [layer], whole) for layer in layers if layer.name not in placed]
    reasons = Counter(lane.reason for lane in lanes if lane.rank == DENSE and lane.reason).most_common()
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
        chips=min(_MOST_CHIPS, max(len(lane.parts) for lane in lanes)),
    )


def bits_strip(layers: Sequence[LayerRow]) -> Strip | None:
    """Return the parameters of `layers` by the bits of their weights, fewest bits first; None where there are no parameters."""
    counts: Counter[int] = Counter()
    for layer in layers:
        counts[layer.weight_bits] += layer.parameters
    total = counts.total()
    if not total:
        return None
    groups = [(bits, count, text.percent(count / total)) for bits, count in sorted(counts.items()) if count]
    return Strip(
        title="Weights by bits",
        what="weights",
        segments=segments([(count, bits_style(bits), f"{share} of the weights in {bits} bits") for bits, count, share in groups], total),
        shares=tuple((bits_style(bits), f"in {bits} bits", share) for bits, _, share in groups),
    )


def rank_label(row: RankRow) -> str:
    """Return '48 of 256', '32 × 24 of 128 × 64' for Tucker-2, or 'dense' for a layer that was kept."""
    return " of ".join(" × ".join(map(str, ranks)) for ranks in (row.ranks, row.full)) if row.ranks else DENSE


def _digits_wide(label: str) -> int:
    # Letters, blanks and × are narrower than digits in every font of the page; the saved width goes to the bars.
    return math.ceil(sum(1 if letter.isdigit() else 0.7 for letter in label))


def _lane(row: RankRow | LayerRow, parts: Sequence[LayerRow], whole: int) -> LayerLane:
    if isinstance(row, RankRow):
        before, after, rank, reason = row.parameters_before, row.parameters_after, rank_label(row), row.reason
    else:
        before, after, rank, reason = row.parameters, row.parameters, "", ""
    return LayerLane(
        name=row.name,
        kind=row.kind,
        rank=rank,
        reason=reason,
        amounts=f"{text.from_to(text.amount(before), text.amount(after))} parameters",
        before=text.percent_of(before, whole),
        after=text.percent_of(after, whole),
        parts=parts,
    )


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
