"""The steps of a report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from muntin.reporting.schema import Report, Step, parse_report
from muntin.reporting.text import METRICS, UNCHANGED, amount, change, gmacs, milliseconds, ratio, size


def terminal_table(report: Report | Mapping[str, Any]) -> Table:
    """One row a step: metric, parameters, bytes, GMACs, latency, engine; what changed against the first step in parentheses.

    Raises MuntinError where the report does not fit the schema.
    """
    checked = parse_report(report)
    metric = METRICS[checked.task]
    timed = any(step.latency_ms is not None for step in checked.steps)
    weighed = any(step.weights is not None for step in checked.steps)
    # Text, not str: names are the user's, and rich would read "[red]" in them as markup.
    # No lines between columns: 80 columns are just enough for the longest figure of each.
    table = Table(
        title=Text(checked.title), title_justify="left", caption=Text(checked.hardware.cpu), caption_justify="left",
        box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("step", style="bold", no_wrap=True)
    for heading in (metric.name, "params", *(["weights"] if weighed else []), "on disk", "GMACs", *(["latency"] if timed else [])):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("engine", overflow="fold")
    for step in checked.steps:
        cells = _cells(checked.steps[0], step, checked, timed, weighed)
        table.add_row(*(Text(cell) for cell in (step.name, *cells, step.engine)))
    return table


def _cells(first: Step, step: Step, report: Report, timed: bool, weighed: bool) -> list[str]:
    metric = METRICS[report.task]
    same = step is first
    cells = [
        metric(step.miou) + ("" if same else f" ({change(first.miou, step.miou, metric.digits)})"),
        amount(step.params) + _against(first.params, step.params, same),
        *([size(step.weights) + _against(first.weights, step.weights, same)] if weighed else []),
        size(step.bytes) + _against(first.bytes, step.bytes, same),
        gmacs(step.gmacs) + _against(first.gmacs, step.gmacs, same),
    ]
    if timed:
        shown = "–" if step.latency_ms is None else milliseconds(step.latency_ms)
        cells.append(shown + _against(first.latency_ms, step.latency_ms, same, less="faster", more="slower"))
    return cells


def _against(first: float | None, now: float | None, same: bool, *, less: str = "less", more: str = "more") -> str:
    told = None if same else ratio(first, now, less=less, more=more)
    return "" if told in (None, UNCHANGED) else f" ({told})"
