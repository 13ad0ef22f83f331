"""Line charts of the training and histograms of the worst layers, as geometry that the template draws as SVG in the page's colours.

Coordinates are those of the view box of a `Frame`, y downwards. The heights of histograms are logarithmic, because a grid clips few values
that lie far out, and these would vanish beside the peak at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from muntin.reporting import text
from muntin.reporting.axes import Axis, Tick, linear_ticks
from muntin.reporting.schema import InputHistogram, LayerRow, Report, TrainingRow

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The view box of a chart and the rectangle in it that the data fill."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


LINES = Frame(width=280, height=176, left=42, right=270, top=10, bottom=150)
HISTOGRAM = Frame(width=280, height=124, left=8, right=272, top=20, bottom=102)
MOST_POINTS = 240
MOST_WORST = 8
# Half the width of the label above the grid: its middle keeps this far from the sides.
_LABEL_REACH = 62
_THINNEST_BIN = 0.6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line in data units, or in coordinates of a frame: its points, its CSS class, and a colour where the data define one."""

    points: Points
    style: str
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One line chart: its ticks and its curves, back to front. `summary` is read aloud instead of the drawing."""

    key: str
    title: str
    figure: str
    summary: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of a histogram; `outside` is true where its middle lies outside the grid."""

    x: float
    y: float
    width: float
    height: float
    outside: bool


@dataclass(frozen=True, kw_only=True)
class WorstLayer:
    """One layer with its histogram: the grid reaches from `grid_left` to `grid_right`. `summary` is read aloud instead of the drawing."""

    layer: LayerRow
    clipped: str
    summary: str
    bins: tuple[Bin, ...]
    grid_left: float
    grid_right: float
    grid_label: Tick
    ticks: tuple[Tick, ...]


def training_charts(report: Report) -> tuple[Chart, ...]:
    """Return the charts for which the report has rows: validation metric, loss, learning rate, images a second."""
    charts = []
    if report.validation:
        charts.append(_validation(report))
    if report.training:
        charts.append(_loss(report.training))
        charts.append(_plain("rate", "Learning rate", report.training, lambda row: row.learning_rate, _scientific))
    if any(row.images_per_s is not None for row in report.training):
        charts.append(_plain("speed", "Images a second", report.training, lambda row: row.images_per_s, lambda value: f"{value:,.0f}"))
    return tuple(charts)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Return centred moving means over `share` of all values; being centred, they do not lag behind a falling curve."""
    reach = round(share / 2 * len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    means: list[float] = ((total[last] - total[first]) / (last - first)).tolist()
    return means


def line_chart(
    *,
    key: str,
    title: str,
    figure: str,
    summary: str,
    curves: Sequence[Curve],
    y_range: tuple[float, float],
    y_label: Callable[[float], str],
) -> Chart:
    """Place `curves` (data units, at least one point each) in the view box; `figure` is the number shown beside the title."""
    x_low, x_high = _span([x for curve in curves for x, _ in curve.points], floor=0.0, pad=0.0)
    x_axis = Axis(low=x_low, high=x_high, start=LINES.left, end=LINES.right)
    y_values = linear_ticks(*y_range, 4)
    y_axis = Axis(low=y_values[0], high=y_values[-1], start=LINES.bottom, end=LINES.top)
    return Chart(
        key=key,
        title=title,
        figure=figure,
        summary=summary,
        x_ticks=x_axis.ticks(linear_ticks(x_low, x_high, 4, integer=True), lambda x: f"{x:,.0f}"),
        y_ticks=y_axis.ticks(y_values, y_label),
        curves=tuple(replace(curve, points=[(x_axis(x), y_axis(y)) for x, y in _thin(curve.points)]) for curve in curves),
    )


def worst_layers(layers: Sequence[LayerRow]) -> tuple[WorstLayer, ...]:
    """Return the layers that have a histogram, lowest SQNR first and those without SQNR last; at most MOST_WORST."""
    pairs = [(layer, layer.histogram) for layer in layers if layer.histogram is not None]
    pairs.sort(key=lambda pair: math.inf if pair[0].sqnr_db is None else pair[0].sqnr_db)
    return tuple(_worst_layer(layer, histogram) for layer, histogram in pairs[:MOST_WORST])


def _validation(report: Report) -> Chart:
    metric = text.METRICS[report.task]
    rows = report.validation
    mean = [(float(row.step), row.miou) for row in rows]
    curves = [
        Curve(points=points, style="faint", color=text.css_color(entry))
        for entry in report.classes
        if (points := [(float(row.step), value) for row in rows if (value := row.iou.get(entry.name)) is not None])
    ]
    best = max(rows, key=lambda row: row.miou)
    return line_chart(
        key="validation",
        title=f"Validation {metric.name}",
        figure=f"best {metric(best.miou)}",
        summary=(
            f"Validation {metric.name} over {len(rows)} evaluations: from {metric(rows[0].miou)} to {metric(rows[-1].miou)}, "
            f"best {metric(best.miou)} at step {best.step:,}."
        ),
        curves=[*curves, Curve(points=mean, style="main")],
        y_range=(0.0, 1.0) if metric.share else _span([value for _, value in mean]),
        y_label=lambda value: f"{value:g}",
    )


def _loss(rows: Sequence[TrainingRow]) -> Chart:
    steps = [float(row.step) for row in rows]
    losses = [row.loss for row in rows]
    means = smooth(losses)
    # A single early spike must not flatten the rest: the range is that of nearly all values, and the drawing clips the others.
    low, high = (float(bound) for bound in np.quantile(losses, (0.01, 0.99)))
    return line_chart(
        key="loss",
        title="Training loss",
        figure=f"{means[-1]:.3g}",
        summary=f"Training loss, smoothed, from {means[0]:.3g} to {means[-1]:.3g} in {len(rows)} logged steps.",
        curves=[
            Curve(points=list(zip(steps, losses, strict=True)), style="faint"),
            Curve(points=list(zip(steps, means, strict=True)), style="main"),
        ],
        y_range=_span([min(low, *means), max(high, *means)], floor=0.0 if min(losses) >= 0 else None),
        y_label=lambda value: f"{value:g}",
    )


def _plain(
    key: str, title: str, rows: Sequence[TrainingRow], value_of: Callable[[TrainingRow], float | None], label: Callable[[float], str]
) -> Chart:
    points = [(float(row.step), value) for row in rows if (value := value_of(row)) is not None]
    values = [value for _, value in points]
    median = float(np.median(values))
    return line_chart(
        key=key,
        title=title,
        figure=f"median {label(median)}" if key == "speed" else f"peak {label(max(values))}",
        summary=f"{title}: median {label(median)}, lowest {label(min(values))}, highest {label(max(values))}.",
        curves=[Curve(points=points, style="main")],
        y_range=_span(values, floor=0.0),
        y_label=label,
    )


def _thin(points: Points) -> Points:
    # Means of equal runs: 230 pixels show no more points, and means do not alias as every n-th point would.
    if len(points) <= MOST_POINTS:
        return points
    parts: list[npt.NDArray[np.float64]] = np.array_split(np.asarray(points, dtype=np.float64), MOST_POINTS)
    inner = [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts[1:-1])]
    return [points[0], *inner, points[-1]]


def _span(values: Sequence[float], *, floor: float | None = None, pad: float = 0.02) -> tuple[float, float]:
    low, high = min(values), max(values)
    if floor is not None:
        low = min(low, floor)
    if high <= low:
        high = low + (abs(low) or 1.0)
    margin = pad * (high - low)
    return (low if floor is not None else low - margin), high + margin


def _scientific(value: float) -> str:
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e-", f"e{text.MINUS}")


def _worst_layer(layer: LayerRow, histogram: InputHistogram) -> WorstLayer:
    low, high = min(histogram.low, histogram.grid_low), max(histogram.high, histogram.grid_high)
    axis = Axis(low=low, high=high, start=HISTOGRAM.left, end=HISTOGRAM.right)
    left, right = axis(histogram.grid_low), axis(histogram.grid_high)
    middle = min(max((left + right) / 2, HISTOGRAM.left + _LABEL_REACH), HISTOGRAM.right - _LABEL_REACH)
    covered = f"{_three_digits(histogram.grid_low)} to {_three_digits(histogram.grid_high)}"
    values = f"Input values of {layer.name} from {_three_digits(histogram.low)} to {_three_digits(histogram.high)}"
    clipped = ""
    if layer.clipped is not None:
        share = text.percent(layer.clipped, 2)
        clipped = f"{share} of the values lie outside the grid" if layer.clipped else "no value lies outside the grid"
    return WorstLayer(
        layer=layer,
        clipped=clipped,
        summary=f"{values}; the 8-bit grid covers {covered}{f'; {clipped}' if clipped else ''}.",
        bins=_bins(histogram, axis),
        grid_left=left,
        grid_right=right,
        grid_label=Tick(at=round(middle, 1), label=f"grid {covered}"),
        ticks=axis.ticks(linear_ticks(low, high, 5), _three_digits),
    )


def _bins(histogram: InputHistogram, axis: Axis) -> tuple[Bin, ...]:
    step = (histogram.high - histogram.low) / len(histogram.counts)
    scale = (HISTOGRAM.bottom - HISTOGRAM.top) / (math.log1p(max(histogram.counts)) or 1.0)
    bins = []
    for index, count in enumerate(histogram.counts):
        start = histogram.low + index * step
        left, height = axis(start), round(scale * math.log1p(count), 1)
        if height > 0:
            width = max(_THINNEST_BIN, round(axis(start + step) - left, 1))
            outside = not histogram.grid_low <= start + step / 2 <= histogram.grid_high
            bins.append(Bin(x=left, y=round(HISTOGRAM.bottom - height, 1), width=width, height=height, outside=outside))
    return tuple(bins)


def _three_digits(value: float) -> str:
    return text.with_minus(f"{value:.3g}")
