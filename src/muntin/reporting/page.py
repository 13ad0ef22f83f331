"""The page: what `report.html` tells, as values for the template. The template lays out, this module counts.

The page is one file without scripts and without anything loaded from outside; its content policy forbids both even if a name tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muntin.artifact.classes import ClassInfo
from muntin.reporting import charts, histograms, text
from muntin.reporting.lanes import lane_figure
from muntin.reporting.layers import layer_table
from muntin.reporting.pictures import EXAMPLE_EDGES, EXAMPLES_LIMIT, OVERLAY_EDGES, OVERLAY_LIMIT, Preview, preview
from muntin.reporting.profile_schema import Profile
from muntin.reporting.schema import Example, Report, Step, parse_report
from muntin.reporting.templating import template

MOST_EXAMPLES = 24
EXAMPLE_PARTS = {"image": "picture", "truth": "truth", "prediction": "prediction", "difference": "difference"}


@dataclass(frozen=True, kw_only=True)
class Pane:
    """One of the large figures under the headline: what changed, from what to what."""

    label: str
    figure: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of the steps table and how it compares with the first step ('' for the first itself)."""

    figure: str
    against: str = ""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar: `length` and `mark` (the 90th percentile) in percent of the scale."""

    name: str
    note: str
    figure: str
    against: str
    length: float
    mark: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class: its colour, its metric in the first and in the last step, and in each."""

    name: str
    color: str
    figures: tuple[str, ...]
    lengths: tuple[float | None, ...]
    change: str


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """The pictures of one example with their captions and alternative texts."""

    name: str
    pictures: tuple[tuple[str, str, Preview], ...]


def render_html(report: Report | Mapping[str, Any], directory: Path) -> str:
    """The page as text; the pictures it shows are read from `directory`. Raises MuntinError (DataError for a picture), one line."""
    checked = parse_report(report)
    return template("report.html.j2").render(_context(checked, directory))


def page_frame(record: Report | Profile, *, headline: str, json: str) -> dict[str, Any]:
    """What `base.html.j2` lays out around any page: head, notes, machine and footer; `json` is the file that holds the numbers."""
    return {
        "title": record.title,
        "headline": headline,
        "muntin": record.muntin,
        "created": record.created,
        "moment": text.moment(record.created),
        "notes": record.notes,
        "facts": text.machine_facts(record.hardware, record.muntin),
        "json": json,
    }


def _context(report: Report, directory: Path) -> dict[str, Any]:
    metric = text.METRICS[report.task]
    examples = () if report.pictures is None else report.pictures.examples
    overlay = None if report.pictures is None else report.pictures.overlay
    return {
        "report": report,
        **page_frame(report, headline=text.headline(report), json="report.json"),
        "headline_parts": text.headline_parts(report),
        "metric": metric,
        "panes": panes(report),
        "overlay": None if overlay is None else preview(directory, overlay, edges=OVERLAY_EDGES, limit=OVERLAY_LIMIT),
        "legend": [(entry.name, css_color(entry)) for entry in report.classes],
        "steps": [(step, step_cells(report, step)) for step in report.steps],
        "weighed": any(step.weights is not None for step in report.steps),
        "timed": any(step.latency_ms is not None for step in report.steps),
        "latency": latency_bars(report),
        "class_rows": class_rows(report),
        "charts": charts.training_charts(report),
        "chart": charts,
        "examples": _examples(directory, examples[:MOST_EXAMPLES]),
        "examples_left": max(0, len(examples) - MOST_EXAMPLES),
        "lanes": lane_figure(report.ranks, report.layers),
        "worst": histograms.worst_layers(report.layers),
        "worst_left": max(0, sum(layer.histogram is not None for layer in report.layers) - histograms.MOST_WORST),
        "histogram": histograms,
        "layers": layer_table(report.layers),
        "train_time": text.duration(report.seconds["train"]) if "train" in report.seconds else None,
        "seconds": [(name.replace("_", " "), text.duration(value)) for name, value in report.seconds.items()],
    }


def panes(report: Report) -> list[Pane]:
    """The large figures: size, latency, metric, agreement, as far as measured; none for a report of a single step but what it is."""
    first, last = report.steps[0], report.steps[-1]
    metric = text.METRICS[report.task]
    if first is last:
        found = [Pane(label=metric.name, figure=metric(last.miou), detail=last.engine)]
        found.append(Pane(label="Size", figure=text.size(last.bytes), detail=f"{text.amount(last.params)} parameters"))
        if last.latency_ms is not None:
            found.append(Pane(label="Latency", figure=text.milliseconds(last.latency_ms), detail=_timed_at(report)))
        return found
    found = []
    smaller = text.ratio(first.bytes, last.bytes, less="smaller", more="larger")
    if smaller is not None:
        found.append(Pane(label="Size", figure=smaller, detail=_from_to(text.size(first.bytes), text.size(last.bytes))))
    faster = text.ratio(first.latency_ms, last.latency_ms, less="faster", more="slower")
    if faster is not None and first.latency_ms is not None and last.latency_ms is not None:
        detail = _from_to(text.milliseconds(first.latency_ms), text.milliseconds(last.latency_ms))
        found.append(Pane(label=" ".join(["Latency", _timed_at(report)]).strip(), figure=faster, detail=detail))
    moved = text.change(first.miou, last.miou, metric.digits)
    found.append(Pane(label=metric.name, figure=f"{moved}{metric.unit}", detail=_from_to(metric(first.miou), metric(last.miou))))
    if report.agreement is not None:
        found.append(Pane(label="Agreement", figure=text.percent(report.agreement, 2), detail="of labels equal to the simulated model's"))
    return found


def step_cells(report: Report, step: Step) -> list[Cell]:
    """The numbers of one row of the steps table: metric, parameters, weights if known, disk, GMACs, latency if timed."""
    metric = text.METRICS[report.task]
    first = report.steps[0]

    def cell(figure: str, before: float | None, now: float | None, less: str, more: str) -> Cell:
        told = None if step is first else text.ratio(before, now, less=less, more=more)
        return Cell(figure=figure, against="" if told in (None, text.UNCHANGED) else str(told))

    cells = [
        Cell(figure=metric(step.miou), against="" if step is first else text.change(first.miou, step.miou, metric.digits)),
        cell(text.amount(step.params), first.params, step.params, "fewer", "more"),
        *(
            [cell(text.size(step.weights), first.weights, step.weights, "smaller", "larger")]
            if any(other.weights is not None for other in report.steps)
            else []
        ),
        cell(text.size(step.bytes), first.bytes, step.bytes, "smaller", "larger"),
        cell(text.gmacs(step.gmacs), first.gmacs, step.gmacs, "fewer", "more"),
    ]
    if any(other.latency_ms is not None for other in report.steps):
        shown = "–" if step.latency_ms is None else text.milliseconds(step.latency_ms)
        cells.append(cell(shown, first.latency_ms, step.latency_ms, "faster", "slower"))
    return cells


def latency_bars(report: Report) -> list[Bar]:
    """A bar a timed thing; the first is the baseline that the others are compared with."""
    if report.latency is None:
        return []
    rows = report.latency.rows
    longest = max(max(row.median_ms, row.p90_ms) for row in rows) or 1.0
    return [
        Bar(
            name=row.name,
            note=row.engine,
            figure=text.milliseconds(row.median_ms),
            against="baseline" if index == 0 else text.ratio(rows[0].median_ms, row.median_ms, less="faster", more="slower") or "",
            length=percent_of(row.median_ms, longest),
            mark=percent_of(row.p90_ms, longest),
        )
        for index, row in enumerate(rows)
    ]


def class_rows(report: Report) -> list[ClassRow]:
    """A row a class that any step has a figure for; a bar's whole length is 1 (for PSNR: the best figure)."""
    metric = text.METRICS[report.task]
    known = [value for step in report.steps for value in step.iou.values() if value is not None]
    if not known:
        return []
    whole = 1.0 if report.task != "restore" else max(known) or 1.0
    rows = []
    for entry in report.classes:
        values = [step.iou.get(entry.name) for step in report.steps]
        first, last = values[0], values[-1]
        both = len(values) > 1 and first is not None and last is not None
        rows.append(
            ClassRow(
                name=entry.name,
                color=css_color(entry),
                figures=tuple("–" if value is None else metric(value) for value in values),
                lengths=tuple(None if value is None else percent_of(value, whole) for value in values),
                change=text.change(first, last, metric.digits) if both and first is not None and last is not None else "",
            )
        )
    return rows


def css_color(entry: ClassInfo) -> str:
    """A class's colour as CSS writes it."""
    return f"rgb({', '.join(map(str, entry.color))})"


def percent_of(value: float, whole: float) -> float:
    """A length in percent of the `whole`, as CSS takes it."""
    return round(100 * value / whole, 2)


def _examples(directory: Path, examples: tuple[Example, ...]) -> list[ExampleRow]:
    named = [
        [(caption, path) for part, caption in EXAMPLE_PARTS.items() if (path := getattr(example, part)) is not None] for example in examples
    ]
    share = EXAMPLES_LIMIT // max(1, sum(map(len, named)))
    return [
        ExampleRow(
            name=example.name,
            pictures=tuple(
                (caption, f"{caption} of {example.name}", preview(directory, path, edges=EXAMPLE_EDGES, limit=share))
                for caption, path in parts
            ),
        )
        for example, parts in zip(examples, named, strict=True)
    ]


def _timed_at(report: Report) -> str:
    return "" if report.latency is None else f"at {report.latency.height} × {report.latency.width}"


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} {text.ARROW} {last}"
