"""The picture of a front: two panels, the metric against bytes and against milliseconds, both on logarithmic axes.

A line joins the points that no other one beats. Trials within the budget lie above the dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muntin.reporting import text
from muntin.reporting.axes import Axis, Tick, linear_ticks, log_ticks
from muntin.reporting.files import template
from muntin.reporting.front.schema import FrontPoint, FrontRecord
from muntin.reporting.labels import Label, place_labels

WIDTH, HEIGHT = 920.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 58.0, 14.0, 30.0, 292.0, 46.0
_RADIUS, _FONT = 5.0, 12.0
_MARGIN = 0.06
"""Share of the scores' range above and below them."""
_LABELLED_DIGITS = (1, 2, 5)
"""Leading digits of the labelled ticks; all of a short range."""


@dataclass(frozen=True, kw_only=True)
class FrontDot:
    """A point of the picture. `style`: "reference", "kept", "uncertain" or "broken"; `chosen`: drawn with a ring."""

    x: float
    y: float
    style: str
    chosen: bool
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class FrontPanel:
    """One panel. `line`: the front's points as SVG takes them."""

    title: str
    left: float
    right: float
    ticks: tuple[Tick, ...]
    line: str
    dots: tuple[FrontDot, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, kw_only=True)
class FrontPicture:
    """The picture's geometry. `budget`: y of the dashed line. `summary` is read aloud instead of the drawing."""

    width: float
    height: float
    top: float
    bottom: float
    metric: str
    y_ticks: tuple[Tick, ...]
    budget: float
    legend: str
    panels: tuple[FrontPanel, ...]
    summary: str


def front_svg(record: FrontRecord) -> str:
    """Return the picture as an SVG file that needs no other files and follows the reader's light or dark mode."""
    return template("front.svg.j2").render(picture=front_picture(record), title=record.title)


def front_picture(record: FrontRecord) -> FrontPicture:
    """Return the geometry of the picture."""
    scores = [*(point.score for point in record.points), record.least_score]
    spread = max(scores) - min(scores) or abs(scores[0]) or 1.0
    values = linear_ticks(min(scores) - _MARGIN * spread, max(scores) + _MARGIN * spread, 6)
    y_axis = Axis(low=values[0], high=values[-1], start=_BOTTOM, end=_TOP)
    panel = (WIDTH - _LEFT - _RIGHT - _BETWEEN) / 2
    kinds: list[tuple[str, Callable[[FrontPoint], float], Callable[[float], str]]] = [
        ("Bytes of the artifact", lambda point: float(max(1, point.bytes)), lambda value: text.size(round(value))),
        ("Milliseconds for one picture or row", lambda point: max(1e-6, point.ms), lambda value: f"{value:g} ms"),
    ]
    panels = [
        _panel(record, title, cost, label, y_axis, left=_LEFT + index * (panel + _BETWEEN), width=panel)
        for index, (title, cost, label) in enumerate(kinds)
    ]
    chosen = next((point for point in record.points if point.number == record.chosen), None)
    about = "nothing was chosen" if chosen is None else f"{chosen.name} was chosen: {_words(chosen, record.metric)}"
    return FrontPicture(
        width=WIDTH,
        height=HEIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        metric=record.metric,
        y_ticks=y_axis.ticks(values, lambda value: text.with_minus(f"{value:g}")),
        budget=y_axis(record.least_score),
        legend=record.legend,
        panels=tuple(panels),
        summary=(
            f"{record.metric} against bytes and milliseconds for {len(record.points) - 1} trials and the {record.reference.name} model; "
            f"{about}."
        ),
    )


def on_front(points: Sequence[FrontPoint], cost: Callable[[FrontPoint], float]) -> list[FrontPoint]:
    """Return the points that no other one beats in cost and score, by cost."""
    found: list[FrontPoint] = []
    for point in sorted(points, key=lambda point: (cost(point), -point.score, point.number)):
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def _panel(
    record: FrontRecord,
    title: str,
    cost: Callable[[FrontPoint], float],
    label: Callable[[float], str],
    y_axis: Axis,
    *,
    left: float,
    width: float,
) -> FrontPanel:
    costs = [cost(point) for point in record.points]
    low, high = min(costs) / 1.25, max(costs) * 1.25
    x_axis = Axis(low=low, high=high, start=left, end=left + width, log=True)
    ticks = log_ticks(low, high)
    digits = _LABELLED_DIGITS if high / low > 5 else tuple(range(1, 10))
    dots = [_dot(record, point, x_axis(cost(point)), y_axis(point.score)) for point in record.points]
    order = sorted(zip(record.points, dots, strict=True), key=lambda pair: (not pair[1].chosen, pair[0].number))
    names = [((dot.x, dot.y, _RADIUS), point.name.removeprefix("trial ")) for point, dot in order]
    frame = (left, _TOP, left + width, _BOTTOM)
    line = " ".join(f"{x_axis(cost(point))},{y_axis(point.score)}" for point in on_front(record.points, cost))
    return FrontPanel(
        title=title,
        left=left,
        right=left + width,
        ticks=tuple(Tick(at=x_axis(value), label=label(value) if digit in digits else "") for value, digit in ticks),
        line=line,
        dots=tuple(dots),
        labels=place_labels(names, size=_FONT, frame=frame, avoid=[(dot.x, dot.y, _RADIUS) for dot in dots]),
    )


def _dot(record: FrontRecord, point: FrontPoint, x: float, y: float) -> FrontDot:
    style = "reference" if point.number == 0 else point.verdict or ("kept" if point.kept else "broken")
    tooltip = f"{point.name}: {_words(point, record.metric)}"
    return FrontDot(x=x, y=y, style=style, chosen=point.number == record.chosen, tooltip=tooltip)


def _words(point: FrontPoint, metric: str) -> str:
    return f"{metric} {text.with_minus(f'{point.score:.4g}')}, {text.size(point.bytes)}, {text.milliseconds(point.ms)}"
