"""A plot of a comparison: test mIoU over latency."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import stdev

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from documents import Row
from muntin.reporting.labels import Box, Label, place_labels, text_width

INK, SOFT, GRID, HYBRID, PEER = "#172023", "#56646a", "#e6ebec", "#0a6a86", "#93394a"
WIDTH, HEIGHT, FONT, DPI = 640, 460, 12.0, 72
"""A panel's sides and the font, pixels; at this resolution a point is a pixel."""


def draw(summary: Sequence[Row], path: Path, *, title: str) -> None:
    """A panel for each size. A line joins the models that no other one beats in both. `summary`: see `report.summarise`."""
    sides = list(summary[0]["ms"])
    figure = Figure(figsize=(WIDTH * len(sides) / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=FONT + 2, color=INK)
    panels = {side: figure.add_subplot(1, len(sides), 1 + index) for index, side in enumerate(sides)}
    for side, axes in panels.items():
        _panel(axes, summary, side)
    figure.legend(*panels[sides[0]].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=FONT, frameon=False)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]  # computes the layout
    for side, axes in panels.items():
        _label(figure, axes, summary, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _panel(axes: Axes, summary: Sequence[Row], side: str) -> None:
    axes.step(*zip(*_front(summary, side), strict=True), where="post", color=SOFT, linewidth=1, linestyle=":", zorder=1)
    for hybrid, color, marker, kind in ((True, HYBRID, "D", "hybrid"), (False, PEER, "o", "peer")):
        if rows := [row for row in summary if row["hybrid"] is hybrid]:
            axes.errorbar(
                [row["ms"][side] for row in rows], [row["score"] for row in rows], yerr=[_spread(row) for row in rows],
                fmt=marker, color=color, markersize=9, elinewidth=1.5, capsize=4, label=kind, zorder=2,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.16, 0.12)
    axes.set_xlabel(f"ms for one image of {side} x {side}", fontsize=FONT, color=INK)
    axes.set_ylabel("test mIoU, deployed", fontsize=FONT, color=INK)
    axes.tick_params(labelsize=FONT - 1, colors=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(figure: Figure, axes: Axes, summary: Sequence[Row], side: str) -> None:
    """Write names beside the dots. Coordinates are pixels from the top left; crowded names may cover bars, and then dots."""
    width, height = figure.bbox.width, figure.bbox.height

    def at(x: float, y: float) -> tuple[float, float]:
        right, up = axes.transData.transform((x, y))
        return float(right), float(height - up)

    dots = {row["model"]: (*at(row["ms"][side], row["score"]), 5.0) for row in summary}
    bars: list[Box] = []
    for row in summary:
        x, deviation = dots[row["model"]][0], _spread(row)
        bars.append((x - 4, at(1, row["score"] + deviation)[1], x + 4, at(1, row["score"] - deviation)[1]))
    bars += [(x, y - 1, right, y + 1) for (x, y), (right, _) in pairwise(at(*point) for point in _front(summary, side))]
    box = axes.get_window_extent()
    frame = (box.x0, height - box.y1, box.x1, height - box.y0)
    discs = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius in dots.values()]
    labels: list[Label] = []
    for obstacles in (bars, discs, []):
        remaining = [(disc, name) for name, disc in dots.items() if name not in {label.text for label in labels}]
        labels += place_labels(remaining, size=FONT, frame=frame, taken=[*obstacles, *map(_box, labels)], avoid=list(dots.values()))
    outline = [withStroke(linewidth=4, foreground="white")]
    for label in labels:
        style = {"ha": {"start": "left", "end": "right", "middle": "center"}[label.anchor], "va": "baseline", "path_effects": outline}
        figure.text(label.x / width, 1 - label.y / height, label.text, fontsize=FONT, color=INK, zorder=4, **style)
        if label.leader is not None:
            x0, y0, x1, y1 = label.leader
            figure.add_artist(Line2D([x0 / width, x1 / width], [1 - y0 / height, 1 - y1 / height], color=SOFT, linewidth=1))


def _box(label: Label) -> Box:
    """The approximate area of a label."""
    width = text_width(label.text, FONT)
    left = label.x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor]
    return left, label.y - FONT, left + width, label.y + FONT / 4


def _front(summary: Sequence[Row], side: str) -> list[tuple[float, float]]:
    """Latency and score of the models that are better than all faster ones, from the fastest on."""
    front: list[tuple[float, float]] = []
    for row in sorted(summary, key=lambda row: (row["ms"][side], -row["score"])):
        if not front or row["score"] > front[-1][1]:
            front.append((row["ms"][side], row["score"]))
    return front


def _spread(row: Row) -> float:
    return stdev(row["miou"]) if len(row["miou"]) > 1 else 0.0
