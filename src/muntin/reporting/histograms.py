"""The worst layers as histograms: their input values, and what the 8-bit grid covers of them.

Heights are logarithmic: what a grid clips are few values far out, and beside the peak at zero they would vanish. Coordinates are those of
a view box of WIDTH × HEIGHT, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from muntin.reporting import text
from muntin.reporting.charts import Tick
from muntin.reporting.layers import asked_bits
from muntin.reporting.schema import Histogram, LayerRow

WIDTH, HEIGHT = 280, 124
LEFT, RIGHT, TOP, BOTTOM = 8, 272, 20, 102
MOST_WORST = 8
# Half the width of the label over the grid: its middle keeps this far from the sides.
_LABEL_REACH = 62
_THINNEST = 0.6


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of a histogram; `outside` says that the grid does not reach its middle."""

    x: float
    y: float
    width: float
    height: float
    outside: bool


@dataclass(frozen=True, kw_only=True)
class WorstLayer:
    """One layer: its bits and figures in words, the histogram, the grid from `grid_left` to `grid_right` and the label over it.

    `summary` is read aloud instead of the drawing.
    """

    name: str
    bits: str
    sqnr: str
    clipped: str
    note: str
    summary: str
    bins: tuple[Bin, ...]
    grid_left: float
    grid_right: float
    grid_label: Tick
    ticks: tuple[Tick, ...]


def worst_layers(layers: Sequence[LayerRow]) -> tuple[WorstLayer, ...]:
    """The layers that carry a histogram, lowest SQNR first, those without one last; at most MOST_WORST."""
    drawn = [(layer, layer.histogram) for layer in layers if layer.histogram is not None]
    drawn.sort(key=lambda pair: math.inf if pair[0].sqnr_db is None else pair[0].sqnr_db)
    return tuple(_picture(layer, histogram) for layer, histogram in drawn[:MOST_WORST])


def _picture(layer: LayerRow, histogram: Histogram) -> WorstLayer:
    low, high = min(histogram.low, histogram.grid_low), max(histogram.high, histogram.grid_high)

    def at(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (RIGHT - LEFT), 1)

    left, right = at(histogram.grid_low), at(histogram.grid_high)
    clipped = "" if layer.clipped is None else _clipped(layer.clipped)
    covers = f"{_short(histogram.grid_low)} to {_short(histogram.grid_high)}"
    spans = f"Input values of {layer.name} from {_short(histogram.low)} to {_short(histogram.high)}"
    middle = min(max((left + right) / 2, LEFT + _LABEL_REACH), RIGHT - _LABEL_REACH)
    return WorstLayer(
        name=layer.name,
        bits=asked_bits(layer),
        sqnr="SQNR not measured" if layer.sqnr_db is None else f"SQNR {layer.sqnr_db:.1f} dB".replace("-", text.MINUS),
        clipped=clipped,
        note=layer.note,
        summary=f"{spans}; the 8-bit grid covers {covers}{f'; {clipped}' if clipped else ''}.",
        bins=_bins(histogram, at),
        grid_left=left,
        grid_right=right,
        grid_label=Tick(at=round(middle, 1), label=f"grid {covers}"),
        ticks=tuple(Tick(at=at(float(x)), label=_short(float(x))) for x in MaxNLocator(nbins=5).tick_values(low, high) if low <= x <= high),
    )


def _bins(histogram: Histogram, at: Callable[[float], float]) -> tuple[Bin, ...]:
    step = (histogram.high - histogram.low) / len(histogram.counts)
    scale = (BOTTOM - TOP) / (math.log1p(max(histogram.counts)) or 1.0)
    bins = []
    for index, count in enumerate(histogram.counts):
        start = histogram.low + index * step
        middle, left = start + step / 2, at(start)
        height = round(scale * math.log1p(count), 1)
        bins.append(
            Bin(
                x=left,
                y=round(BOTTOM - height, 1),
                width=max(_THINNEST, round(at(start + step) - left, 1)),
                height=height,
                outside=not histogram.grid_low <= middle <= histogram.grid_high,
            )
        )
    return tuple(bin_ for bin_ in bins if bin_.height > 0)


def _clipped(share: float) -> str:
    return "no value lies outside the grid" if share == 0 else f"{text.percent(share, 2)} of the values lie outside the grid"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", text.MINUS)
