"""The tables of steps and of deployed artefacts: their cells, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from muntin.artifact.answers import Task
from muntin.reporting import text
from muntin.reporting.records import parse_record
from muntin.reporting.schema import FORMAT, ArtifactRow, ArtifactsRecord, Report, StepRecord, parse_report


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of the table and how it compares with the first step ('' in the first step and where nothing changed).

    A latency that was measured beside other work says so in place of the comparison.
    """

    figure: str
    against: str = ""


def has_weights(report: Report) -> bool:
    """Return whether the bytes of any step's weights are known."""
    return any(step.weights is not None for step in report.steps)


def has_latency(report: Report) -> bool:
    """Return whether any step was timed."""
    return any(step.latency_ms is not None for step in report.steps)


def step_cells(report: Report, step: StepRecord, *, short: bool = False) -> list[Cell]:
    """Return the numbers of one step: metric, parameters, weights if known, bytes on the disk, GMACs, latency if timed.

    `short` compares amounts by the words 'less' and 'more' alone, which fit a terminal.
    """
    metric = text.METRICS[report.task]
    first = report.steps[0]
    count_words, size_words = (("less", "more"), ("less", "more")) if short else (("fewer", "more"), ("smaller", "larger"))

    def cell(figure: str, before: float | None, now: float | None, words: tuple[str, str]) -> Cell:
        against = None if step is first else text.ratio(before, now, less=words[0], more=words[1])
        return Cell(figure=figure, against="" if against in (None, text.UNCHANGED) else str(against))

    cells = [
        Cell(figure=metric(step.miou), against="" if step is first else text.change(first.miou, step.miou, metric.digits)),
        cell(text.amount(step.params), first.params, step.params, count_words),
    ]
    if has_weights(report):
        cells.append(cell(text.size(step.weights), first.weights, step.weights, size_words))
    cells.append(cell(text.size(step.bytes), first.bytes, step.bytes, size_words))
    cells.append(cell(text.gmacs(step.gmacs), first.gmacs, step.gmacs, count_words))
    if has_latency(report):
        latency = cell(text.milliseconds(step.latency_ms), first.latency_ms, step.latency_ms, ("faster", "slower"))
        beside = "" if short else text.BESIDE  # a terminal's table says it once, below
        cells.append(Cell(figure=latency.figure, against=beside) if report.disturbed and step.latency_ms is not None else latency)
    return cells


def has_peaks(artifacts: ArtifactsRecord) -> bool:
    """Return whether the memory of any artefact was measured."""
    return any(row.peak_mib is not None for row in artifacts.rows)


def artifact_headings(artifacts: ArtifactsRecord, task: Task) -> list[str]:
    """Return the headings of the numbers of an artefact."""
    metric = text.METRICS[task].name
    peak = ["peak memory"] if has_peaks(artifacts) else []
    return [
        f"validation {metric}",
        f"test {metric}",
        f"{text.METRICS[task].same} as fp32",
        "on disk",
        "latency",
        "p90",
        *peak,
    ]


def artifact_cells(artifacts: ArtifactsRecord, row: ArtifactRow, task: Task, *, short: bool = False) -> list[Cell]:
    """Return the numbers of one artefact, compared with FP32: scores, equal labels, bytes, latency, and memory if measured.

    `short`: as in `step_cells`.
    """
    metric, first = text.METRICS[task], artifacts.rows[0]

    def cell(figure: str, against: str | None) -> Cell:
        return Cell(figure=figure, against="" if row is first or against in (None, text.UNCHANGED) else str(against))

    less = "less" if short else "smaller"
    cells = [
        cell(metric(row.validation), text.change(first.validation, row.validation, metric.digits)),
        cell(metric(row.test), text.change(first.test, row.test, metric.digits)),
        cell(text.DASH if row is first else text.percent(row.same_labels), None),
        cell(text.size(row.bytes), text.ratio(first.bytes, row.bytes, less=less, more="more" if short else "larger")),
        Cell(figure=text.milliseconds(row.median_ms), against="" if short else text.BESIDE)
        if artifacts.disturbed
        else cell(text.milliseconds(row.median_ms), text.ratio(first.median_ms, row.median_ms, less="faster", more="slower")),
        cell(text.milliseconds(row.p90_ms), None),
    ]
    if has_peaks(artifacts):
        cells.append(cell(text.DASH if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB", None))
    return cells


def taken(artifacts: ArtifactsRecord) -> ArtifactRow:
    """Return the artefact to take."""
    return next(row for row in artifacts.rows if row.name == artifacts.take)


def artifacts_table(artifacts: ArtifactsRecord | Mapping[str, Any], *, task: Task, title: str) -> Table:
    """Return a table with one row an artefact, for the terminal; comparisons with FP32 are in parentheses.

    Raises MuntinError where the values do not fit the schema.
    """
    checked = parse_record(ArtifactsRecord, artifacts, what="comparison", newest=FORMAT)
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("artefact", style="bold", overflow="fold")
    for heading in artifact_headings(checked, task):
        table.add_column(heading, justify="right", overflow="fold")
    for row in checked.rows:
        cells = artifact_cells(checked, row, task, short=True)
        table.add_row(*map(Text, (row.name, *(cell.figure + (f" ({cell.against})" if cell.against else "") for cell in cells))))
    return table


def terminal_table(report: Report | Mapping[str, Any]) -> Table:
    """Return a table with one row a step, for the terminal; comparisons with the first step are in parentheses.

    Raises MuntinError where the report does not fit the schema.
    """
    checked = parse_report(report)
    # Text instead of str, because rich reads "[red]" in a str as markup, and names are the user's.
    # No lines between columns: 80 columns are just enough for the longest figure of each.
    caption = "\n".join(filter(None, (text.disturbance(checked), checked.hardware.cpu)))
    table = Table(
        title=Text(checked.title), title_justify="left", caption=Text(caption), caption_justify="left",
        box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    weights, latency = ["weights"] if has_weights(checked) else [], ["latency"] if has_latency(checked) else []
    table.add_column("step", style="bold", no_wrap=True)
    for heading in (text.METRICS[checked.task].name, "params", *weights, "on disk", "GMACs", *latency):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("engine", overflow="fold")
    for step in checked.steps:
        cells = [cell.figure + (f" ({cell.against})" if cell.against else "") for cell in step_cells(checked, step, short=True)]
        table.add_row(*map(Text, (step.name, *cells, step.engine)))
    return table
