"""Line charts as geometry: the template draws them as SVG in the page's own colours, so they follow light, dark and paper.

Ticks come from matplotlib's locators. Coordinates are those of a view box of WIDTH × HEIGHT, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from muntin.reporting.schema import Report, TrainingRow, ValidationRow
from muntin.reporting.text import METRICS, MINUS, Metric

WIDTH, HEIGHT = 280, 176
LEFT, RIGHT, TOP, BOTTOM = 42, 270, 10, 150
MOST_POINTS = 240

Floats = npt.NDArray[np.float64]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A grid line at `at` and its label."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline: `points` as SVG writes them, its last point (`end`), its CSS class, and an `rgb()` where the data says which colour."""

    points: str
    style: str
    end: tuple[float, float]
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: what it shows in words (`summary`, read aloud instead of the drawing), its ticks and its lines, back to front."""

    key: str
    title: str
    figure: str
    summary: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line still in data units."""

    points: Points
    style: str
    color: str | None = None


def training_charts(report: Report) -> tuple[Chart, ...]:
    """The charts that the report's rows allow: validation metric, loss, learning rate, throughput; none for rows that are absent."""
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
    """The mean of the neighbours within `share` / 2 of all values on each side: centred, so that it does not lag behind a falling curve."""
    reach = round(share / 2 * len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    means: list[float] = ((total[last] - total[first]) / (last - first)).tolist()
    return means


def _validation(report: Report) -> Chart:
    metric = METRICS[report.task]
    rows = report.validation
    mean = [(float(row.step), row.miou) for row in rows]
    curves = [
        Curve(points=points, style="faint", color=f"rgb({', '.join(map(str, entry.color))})")
        for entry in report.classes
        if (points := [(float(row.step), value) for row in rows if (value := row.iou.get(entry.name)) is not None])
    ]
    best = max(rows, key=lambda row: row.miou)
    return chart(
        key="validation",
        title=f"Validation {metric.name}",
        figure=f"best {metric(best.miou)}",
        summary=_validation_summary(metric, rows, best),
        curves=[*curves, Curve(points=mean, style="main")],
        y_range=(0.0, 1.0) if report.task != "restore" else _span([value for _, value in mean]),
        y_label=lambda value: f"{value:g}",
    )


def _validation_summary(metric: Metric, rows: Sequence[ValidationRow], best: ValidationRow) -> str:
    return (
        f"Validation {metric.name} over {len(rows)} evaluations: from {metric(rows[0].miou)} to {metric(rows[-1].miou)}, "
        f"best {metric(best.miou)} at step {best.step:,}."
    )


def _loss(rows: Sequence[TrainingRow]) -> Chart:
    steps = [float(row.step) for row in rows]
    raw = [row.loss for row in rows]
    calm = smooth(raw)
    # A single early spike must not flatten the rest: the range is that of nearly all values; the drawing clips what leaves it.
    low, high = (float(bound) for bound in np.quantile(raw, (0.01, 0.99)))
    return chart(
        key="loss",
        title="Training loss",
        figure=f"{calm[-1]:.3g}",
        summary=f"Training loss, smoothed, from {calm[0]:.3g} to {calm[-1]:.3g} in {len(rows)} logged steps.",
        curves=[
            Curve(points=list(zip(steps, raw, strict=True)), style="faint"),
            Curve(points=list(zip(steps, calm, strict=True)), style="main"),
        ],
        y_range=_span([min(low, *calm), max(high, *calm)], floor=0.0 if min(raw) >= 0 else None),
        y_label=lambda value: f"{value:g}",
    )


def _plain(
    key: str, title: str, rows: Sequence[TrainingRow], value_of: Callable[[TrainingRow], float | None], label: Callable[[float], str]
) -> Chart:
    points = [(float(row.step), value) for row in rows if (value := value_of(row)) is not None]
    values = [value for _, value in points]
    median = float(np.median(values))
    return chart(
        key=key,
        title=title,
        figure=f"median {label(median)}" if key == "speed" else f"peak {label(max(values))}",
        summary=f"{title}: median {label(median)}, lowest {label(min(values))}, highest {label(max(values))}.",
        curves=[Curve(points=points, style="main")],
        y_range=_span(values, floor=0.0),
        y_label=label,
    )


def chart(
    *,
    key: str,
    title: str,
    figure: str,
    summary: str,
    curves: Sequence[Curve],
    y_range: tuple[float, float],
    y_label: Callable[[float], str],
) -> Chart:
    """Places `curves` (data units, at least one point each) in the view box; `figure` is the one number shown beside the title."""
    x_low, x_high = _span([x for curve in curves for x, _ in curve.points], floor=0.0, pad=0.0)
    y_ticks = MaxNLocator(nbins=4).tick_values(*y_range)
    y_low, y_high = float(y_ticks[0]), float(y_ticks[-1])

    def x_at(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def y_at(y: float) -> float:
        return round(BOTTOM - (y - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    x_ticks = [x for x in MaxNLocator(nbins=4, integer=True).tick_values(x_low, x_high) if x_low <= x <= x_high]
    placed = [[(x_at(x), y_at(y)) for x, y in _thin(curve.points)] for curve in curves]
    return Chart(
        key=key,
        title=title,
        figure=figure,
        summary=summary,
        x_ticks=tuple(Tick(at=x_at(x), label=f"{x:,.0f}") for x in x_ticks),
        y_ticks=tuple(Tick(at=y_at(y), label=y_label(float(y))) for y in y_ticks),
        lines=tuple(
            Line(points=" ".join(f"{x:g},{y:g}" for x, y in points), style=curve.style, color=curve.color, end=points[-1])
            for curve, points in zip(curves, placed, strict=True)
        ),
    )


def _thin(points: Points) -> Points:
    # Means of equal runs: at 230 pixels more points cannot be seen, and a mean does not alias as picking every n-th would.
    if len(points) <= MOST_POINTS:
        return points
    parts: list[Floats] = np.array_split(np.asarray(points, dtype=np.float64), MOST_POINTS)
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
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e-", f"e{MINUS}")
