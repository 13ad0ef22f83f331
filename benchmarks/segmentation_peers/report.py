"""Summarise the rows of a source: means over seeds and their spread, the goals, tables and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from muntin.reporting.labels import Box, Label, place_labels, text_width
from segmentation_peers.deployment import REFERENCE
from segmentation_peers.models import ENTRIES

LOSS = 0.005
"""Largest loss of score against f32 with which a variant is admitted."""
LEAD = {"earth": 0.02}
"""Lead of a hybrid's mean that a goal demands, if more than the spread."""
OF_BEST, OF_FASTEST = 1 / 4, 1 / 2
"""Goals for latency, as shares of the best peer's and of the fastest peer's."""
INK, SOFT, GRID, HYBRID, PEER = "#172023", "#56646a", "#e6ebec", "#0a6a86", "#93394a"
DPI, WIDTH, HEIGHT, FONT = 100, 640, 460, 12.0
"""Resolution of the picture; a panel's sides and the font in pixels."""

Row = dict[str, Any]


def admitted(variants: Mapping[str, Row]) -> list[str]:
    """The variants that may be deployed: within LOSS of f32 on what admits them. The test split chooses nothing."""
    least = variants[REFERENCE]["admission"] - LOSS
    return [name for name, variant in variants.items() if variant["admission"] >= least]


def summarise(rows: Sequence[Row], latencies: Mapping[int, Row]) -> list[Row]:
    """A row a model, over its seeds: figures of the variant that each seed deploys. `latencies`: by seed."""
    summary = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        timed = [latencies[row["seed"]] for row in mine]
        chosen = [latency["chosen"][name] for latency in timed]
        deployed = [row["variants"][variant] for row, variant in zip(mine, chosen, strict=True)]
        summary.append(
            {
                "model": name,
                "hybrid": ENTRIES[name].hybrid,
                "seeds": [row["seed"] for row in mine],
                "deployed": chosen,
                "miou": _figure(variant["test"] for variant in deployed),
                "iou": {label: _figure(variant["iou"][label] for variant in deployed) for label in deployed[0]["iou"]},
                "ms": {side: _figure(latency["ms"][side][name] for latency in timed) for side in timed[0]["ms"]},
                "variants": {
                    variant: {
                        **{
                            split: _figure(row["variants"][variant][split] for row in mine) for split in ("validation", "admission", "test")
                        },
                        "ms": _figure(latency["variants"][name][variant] for latency in timed),
                    }
                    for variant in mine[0]["variants"]
                },
                **{key: mean(row[key] for row in mine) for key in ("minutes", "samples", "images_per_s", "parameters", "learning_rate")},
                "bytes": mean(variant["bytes"] for variant in deployed),
            }
        )
    return summary


def judge(summary: Sequence[Row], source: str) -> list[Row]:
    """Each goal, whether it is met, and the figures that say so. None: cannot be judged, as anything that hangs on a score by one seed."""
    hybrids, peers = ([row for row in summary if row["hybrid"] is kind] for kind in (True, False))
    if not hybrids or not peers:
        return [{"goal": "hybrids against peers", "met": None, "told": "needs at least one of each"}]
    hybrid, peer = (max(models, key=_miou) for models in (hybrids, peers))
    ahead = _miou(hybrid) - _miou(peer)
    told = f"{_told(hybrid)}, {_told(peer)}: {ahead:+.4f}{_against(peers)}"
    spreads = [row["miou"]["spread"] for row in (hybrid, peer)]
    one_seed = None in spreads
    beyond = None if one_seed else ahead > sum(spreads)
    goals = [{"goal": "a hybrid has the best mIoU, by more than both spreads", "met": beyond, "told": told}]
    if source in LEAD:
        goals.append({"goal": f"by at least {LEAD[source]:g}", "met": None if one_seed else ahead >= LEAD[source], "told": told})
    return goals + [_judge_latency(hybrids, peers, peer, side) for side in summary[0]["ms"]]


def _judge_latency(hybrids: Sequence[Row], peers: Sequence[Row], best: Row, side: str) -> Row:
    def ms(row: Row) -> float:
        return float(row["ms"][side]["mean"])

    fastest = min(peers, key=ms)
    limit = OF_BEST * ms(best)
    # The half is asked of a fastest peer that is less good than the best; where it is the best, the quarter asks for more already.
    limit = limit if fastest is best else min(limit, OF_FASTEST * ms(fastest))
    reaching = [row for row in hybrids if _miou(row) >= _miou(best)]
    found = min(reaching, key=ms, default=None)
    asked = f"best peer {_told(best)} in {ms(best):.2f} ms, fastest {_told(fastest)} in {ms(fastest):.2f} ms: at most {limit:.2f} ms"
    answer = "no hybrid reaches the best peer" if found is None else f"{_told(found)} in {ms(found):.2f} ms"
    goal = f"{side}²: a hybrid reaches the best peer in a quarter of its time, and half of the fastest peer's"
    one_seed = any(row["miou"]["spread"] is None for row in (*hybrids, best))
    met = None if one_seed else found is not None and ms(found) <= limit
    return {"goal": goal, "met": met, "told": f"{asked}; {answer}{_against(peers)}"}


def _against(peers: Sequence[Row]) -> str:
    """Say by how many peers a goal was judged, if some failed or were left out."""
    known = sum(not entry.hybrid for entry in ENTRIES.values())
    return f"; against {len(peers)} of {known} peers" if len(peers) < known else ""


def print_tables(summary: Sequence[Row], goals: Sequence[Row]) -> None:
    if not summary:
        return
    sides = list(summary[0]["ms"])
    width = max(len(row["model"]) for row in summary) + 2
    head = "".join(f"{f'ms {side}':>10}" for side in sides)
    names = f"{'model':<{width}}{'deployed as':<30}{'seeds':>6}{'test mIoU':>16}{head}"
    print(f"{names}{'min':>7}{'crops':>9}{'im/s':>7}{'M':>7}{'MB':>7}{'rate':>9}")
    for row in sorted(summary, key=_miou, reverse=True):
        times = "".join(f"{row['ms'][side]['mean']:>10.2f}" for side in sides)
        forms = ", ".join(dict.fromkeys(row["deployed"]))
        print(
            f"{row['model']:<{width}}{forms:<30}{len(row['seeds']):>6}{_shown(row['miou']):>16}{times}"
            f"{row['minutes']:>7.2f}{row['samples']:>9.0f}{row['images_per_s']:>7.1f}{row['parameters'] / 1e6:>7.2f}"
            f"{row['bytes'] / 1e6:>7.2f}{row['learning_rate']:>9.2g}"
        )
    labels = list(summary[0]["iou"])
    print(f"\n{'test IoU':<{width}}" + "".join(f"{label:>16}" for label in labels))
    for row in sorted(summary, key=_miou, reverse=True):
        print(f"{row['model']:<{width}}" + "".join(f"{_shown(row['iou'][label]):>16}" for label in labels))
    print(f"\n{'every variant':<{width}}{'':<27}{'validation':>18}{'admitted by':>18}{'test mIoU':>18}{f'ms {sides[0]}':>10}")
    for row in summary:
        for name, variant in row["variants"].items():
            scores = "".join(f"{_shown(variant[split]):>18}" for split in ("validation", "admission", "test"))
            print(f"{row['model']:<{width}}{name:<27}{scores}{variant['ms']['mean']:>10.2f}")
    print()
    for goal in goals:
        print(f"{ {True: 'met', False: 'MISSED', None: 'not judged'}[goal['met']]:<12}{goal['goal']}: {goal['told']}")


def draw(summary: Sequence[Row], path: Path, *, title: str) -> None:
    """Test mIoU over latency, a panel for each size, with the models that no other one beats in both joined by a line."""
    sides = list(summary[0]["ms"])
    figure = Figure(figsize=(WIDTH * len(sides) / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=_points(FONT + 2), color=INK)
    panels = [figure.add_subplot(1, len(sides), 1 + index) for index in range(len(sides))]
    for axes, side in zip(panels, sides, strict=True):
        _panel(axes, summary, side)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=_points(FONT), frameon=False)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]  # the layout is known from here on
    for axes, side in zip(panels, sides, strict=True):
        _label(figure, axes, summary, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, summary: Sequence[Row], side: str) -> None:
    front = _front(summary, side)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=SOFT, linewidth=1, linestyle=":", zorder=1)
    for hybrid, color, marker, kind in ((True, HYBRID, "D", "hybrid"), (False, PEER, "o", "peer")):
        rows = [row for row in summary if row["hybrid"] is hybrid]
        if rows:
            axes.errorbar(
                [row["ms"][side]["mean"] for row in rows], [_miou(row) for row in rows], yerr=[row["miou"]["spread"] or 0 for row in rows],
                fmt=marker, color=color, markersize=7, elinewidth=1.2, capsize=3, label=kind, zorder=2,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.16, 0.12)
    axes.set_xlabel(f"ms for one image of {side} x {side}", fontsize=_points(FONT), color=INK)
    axes.set_ylabel("test mIoU, deployed", fontsize=_points(FONT), color=INK)
    axes.tick_params(labelsize=_points(FONT - 1), colors=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _label(figure: Figure, axes: Axes, summary: Sequence[Row], side: str) -> None:
    """Names beside the dots, in pixels from the top left; where dots crowd, over bars and dots rather than not at all."""
    height = figure.bbox.height

    def at(x: float, y: float) -> tuple[float, float]:
        right, up = axes.transData.transform((x, y))
        return float(right), float(height - up)

    dots = {row["model"]: (*at(row["ms"][side]["mean"], _miou(row)), 5.0) for row in summary}
    bars = [
        (x - 4, at(1, _miou(row) + spread)[1], x + 4, at(1, _miou(row) - spread)[1])
        for row in summary
        for spread, x in [(row["miou"]["spread"] or 0.0, dots[row["model"]][0])]
    ]
    corners = [at(*point) for point in _front(summary, side)]
    bars += [(x, y - 1, right, y + 1) for (x, y), (right, _) in pairwise(corners)]
    box = axes.get_window_extent()
    frame = (box.x0, height - box.y1, box.x1, height - box.y0)
    discs = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius in dots.values()]
    labels: list[Label] = []
    for obstacles in (bars, discs, []):
        left = [(disc, name) for name, disc in dots.items() if name not in {label.text for label in labels}]
        taken = [*obstacles, *(_box(label) for label in labels)]
        labels += place_labels(left, size=FONT, frame=frame, taken=taken, avoid=list(dots.values()))
    for label in labels:
        align = {"start": "left", "end": "right", "middle": "center"}[label.anchor]
        figure.text(
            label.x / figure.bbox.width, 1 - label.y / height, label.text, fontsize=_points(FONT), ha=align, va="baseline", color=INK,
            path_effects=[withStroke(linewidth=3, foreground="white")], zorder=4,
        )  # fmt: skip
        if label.leader is not None:
            x0, y0, x1, y1 = label.leader
            ends = [x0 / figure.bbox.width, x1 / figure.bbox.width], [1 - y0 / height, 1 - y1 / height]
            figure.add_artist(Line2D(*ends, color=SOFT, linewidth=0.8))


def _box(label: Label) -> Box:
    """About what a label covers."""
    width = text_width(label.text, FONT)
    left = label.x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor]
    return left, label.y - FONT, left + width, label.y + FONT / 4


def _front(summary: Sequence[Row], side: str) -> list[tuple[float, float]]:
    """Models that are better than all faster ones, from the fastest on."""
    front: list[tuple[float, float]] = []
    for row in sorted(summary, key=lambda row: (row["ms"][side]["mean"], -_miou(row))):
        if not front or _miou(row) > front[-1][1]:
            front.append((row["ms"][side]["mean"], _miou(row)))
    return front


def _figure(values: Iterable[float | None]) -> Row:
    """Mean and spread (standard deviation over seeds, None for one seed); both None where a class does not occur."""
    found = [value for value in values if value is not None]
    return {"mean": mean(found) if found else None, "spread": stdev(found) if len(found) > 1 else None}


def _shown(figure: Row) -> str:
    if figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.4f}" + ("" if figure["spread"] is None else f" ± {figure['spread']:.4f}")


def _miou(row: Row) -> float:
    return float(row["miou"]["mean"])


def _told(row: Row) -> str:
    return f"{row['model']} {_shown(row['miou'])}"


def _points(pixels: float) -> float:
    return pixels * 72 / DPI
