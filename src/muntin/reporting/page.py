"""The page of a report: its files, and the values that the template `report.html.j2` lays out.

The page is one file without scripts, and it loads nothing from outside; its content policy forbids both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muntin.artifact.answers import ANSWERS
from muntin.reporting import charts, text
from muntin.reporting.files import REPORT_NAME, json_text, template, write_files
from muntin.reporting.front.picture import front_picture
from muntin.reporting.lanes import lane_figure
from muntin.reporting.layers import layer_shares
from muntin.reporting.pictures import EXAMPLE_EDGES, EXAMPLES_LIMIT, OVERLAY_EDGES, OVERLAY_LIMIT, Preview, preview
from muntin.reporting.schema import Baseline, Example, Report, parse_report, report_values
from muntin.reporting.steps import artifact_cells, artifact_headings, has_latency, has_weights, step_cells, taken

HTML_NAME = "report.html"
MOST_EXAMPLES = 24
MOST_COLUMNS = 20  # classes up to which a confusion matrix is open
EXAMPLE_PARTS = {"image": "picture", "truth": "truth", "prediction": "prediction", "difference": "difference"}
RESTORED_PARTS = {"image": "before", "prediction": "after", "truth": "clean picture", "difference": "error × 4"}


@dataclass(frozen=True, kw_only=True)
class Pane:
    """One of the large figures under the headline, with the values behind it."""

    label: str
    figure: str
    detail: str


def write_report(directory: Path, report: Report | Mapping[str, Any]) -> Path:
    """Check `report`, write `report.json` and `report.html` into `directory` (created if absent), and return the page's path.

    The pictures that the report names must already lie in `directory`; each costs one decode. Both files are complete on the disk before
    either takes its name, so an error leaves the earlier files unchanged. Raises MuntinError (DataError for a picture), one line.
    """
    checked = parse_report(report)
    page = render_html(checked, directory)
    write_files(directory, {REPORT_NAME: json_text(report_values(checked)), HTML_NAME: page}, what="report")
    return directory / HTML_NAME


def render_html(report: Report | Mapping[str, Any], directory: Path) -> str:
    """Return the page as text, with the pictures read from `directory`. Raises MuntinError (DataError for a picture), one line."""
    checked = parse_report(report)
    return template("report.html.j2").render(_context(checked, directory))


def _context(report: Report, directory: Path) -> dict[str, Any]:
    examples = () if report.pictures is None else report.pictures.examples
    worst = () if report.pictures is None else report.pictures.worst
    overlay = None if report.pictures is None else report.pictures.overlay
    captions = EXAMPLE_PARTS if ANSWERS[report.task].has_classes else RESTORED_PARTS
    histograms = sum(layer.histogram is not None for layer in report.layers)
    return {
        "record": report,
        "report": report,
        "json_name": REPORT_NAME,
        "headline": text.headline(report),
        "headline_parts": text.headline_parts(report),
        "panes": panes(report),
        "metric": text.METRICS[report.task],
        "overlay": None if overlay is None else preview(directory, overlay, edges=OVERLAY_EDGES, limit=OVERLAY_LIMIT),
        "steps": [(step, step_cells(report, step)) for step in report.steps],
        "has_weights": has_weights(report),
        "has_latency": has_latency(report),
        "artifacts": _artifacts(report),
        "front": None if report.search is None else front_picture(report.search),
        "disturbance": text.disturbance(report),
        "class_scale": _class_scale(report),
        "charts": charts.training_charts(report),
        "line_frame": charts.LINES,
        "examples": _examples(directory, examples[:MOST_EXAMPLES], captions, parts=2 if worst else 1),
        "worst_pictures": _examples(directory, worst[:MOST_EXAMPLES], captions, parts=2),
        "confusion": _confusion(report),
        "examples_left": max(0, len(examples) - MOST_EXAMPLES),
        "lanes": lane_figure(report.ranks, report.layers),
        "worst": charts.worst_layers(report.layers),
        "worst_left": max(0, histograms - charts.MOST_WORST),
        "histogram_frame": charts.HISTOGRAM,
        "layers": layer_shares(report.layers),
    }


def panes(report: Report) -> list[Pane]:
    """Return the large figures: changes of size, latency and metric, and the agreement, as far as measured; plain values for one step."""
    metric = text.METRICS[report.task]
    timed_at = "" if report.latency is None else f"at {report.latency.height} × {report.latency.width}"
    if len(report.ends) == 1:
        last = report.steps[-1]
        single = [
            Pane(label=text.capitalized(metric.name), figure=metric(last.miou), detail=last.engine),
            Pane(label="Size", figure=text.size(last.bytes), detail=f"{text.amount(last.params)} parameters"),
        ]
        if last.latency_ms is not None:
            detail = f"{timed_at}, {text.BESIDE}" if report.disturbed else timed_at
            single.append(Pane(label="Latency", figure=text.milliseconds(last.latency_ms), detail=detail))
        return single
    first, end = report.ends
    changes = []
    if smaller := text.ratio(first.bytes, end.bytes, less="smaller", more="larger"):
        changes.append(Pane(label="Size", figure=smaller, detail=text.from_to(text.size(first.bytes), text.size(end.bytes))))
    if faster := text.ratio(first.latency_ms, end.latency_ms, less="faster", more="slower"):
        figures = faster, text.from_to(text.milliseconds(first.latency_ms), text.milliseconds(end.latency_ms))
        figure, detail = (figures[1], text.BESIDE) if report.disturbed else figures
        changes.append(Pane(label=f"Latency {timed_at}".strip(), figure=figure, detail=detail))
    change = f"{text.change(first.miou, end.miou, metric.digits)}{metric.unit}"
    changes.append(Pane(label=text.capitalized(metric.name), figure=change, detail=text.from_to(metric(first.miou), metric(end.miou))))
    if report.baseline is not None:
        gain, name = end.miou - report.baseline.score, report.baseline.name
        changes.append(
            Pane(label=f"Over {name}", figure=text.with_minus(f"{gain:+.2f} dB"), detail=_over_baseline(report.baseline, end.miou))
        )
    if report.agreement is not None:
        figure = text.percent(report.agreement, 2)
        changes.append(Pane(label="Agreement", figure=figure, detail=f"of {metric.same} equal to those of the first model"))
    return changes


def _over_baseline(baseline: Baseline, score: float) -> str:
    """Return the PSNR and SSIM of the baseline and of the deployed model."""
    words = text.from_to(f"{baseline.score:.2f}", f"{score:.2f} dB")
    if baseline.ssim is None or baseline.deployed_ssim is None:
        return words
    return f"{words}, SSIM {text.from_to(f'{baseline.ssim:.3f}', f'{baseline.deployed_ssim:.3f}')}"


def _artifacts(report: Report) -> dict[str, Any] | None:
    """Return the table of deployed artefacts; None where there is only one, because the table of steps shows it."""
    record = report.artifacts
    if record is None or len(record.rows) < 3:
        return None
    return {
        "record": record,
        "headings": artifact_headings(record, report.task),
        "rows": [(row, artifact_cells(record, row, report.task)) for row in record.rows],
        "taken": taken(record),
    }


def _confusion(report: Report) -> dict[str, Any] | None:
    """Return the table of a report's confusion matrix, each row with its total and cells of (count, share of the row), and its mistakes."""
    record = report.confusion
    if record is None:
        return None
    rows = []
    for entry, counts in zip(report.classes, record.counts or (), strict=False):
        total = sum(counts)
        rows.append((entry, total, [(number, number / total if total else 0.0) for number in counts]))
    true = {entry.name: total for entry, total, _ in rows}
    mistakes = [(one, one.count / true[one.truth] if true.get(one.truth) else None) for one in record.mistakes]
    return {"rows": rows, "wide": len(rows) > MOST_COLUMNS, "mistakes": mistakes}


def _class_scale(report: Report) -> float:
    """Return the metric at the full length of a class's bar: 1, for PSNR the best figure; 0 where no step has figures."""
    values = [value for step in report.steps for value in step.iou.values() if value is not None]
    if not values:
        return 0.0
    return 1.0 if ANSWERS[report.task].score.share else max(values) or 1.0


def _examples(
    directory: Path, examples: tuple[Example, ...], captions: Mapping[str, str], *, parts: int
) -> list[tuple[str, list[tuple[str, Preview]]]]:
    """Return the name of each example and its pictures with their captions; all share one of `parts` of the page's limit of characters."""
    paths = [
        [(caption, path) for part, caption in captions.items() if (path := getattr(example, part)) is not None] for example in examples
    ]
    limit = EXAMPLES_LIMIT // parts // max(1, sum(map(len, paths)))
    return [
        (example.name, [(caption, preview(directory, path, edges=EXAMPLE_EDGES, limit=limit)) for caption, path in views])
        for example, views in zip(examples, paths, strict=True)
    ]
