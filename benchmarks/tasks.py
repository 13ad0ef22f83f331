"""Quality and deployed latency by task, beside peers that are trained for the same minutes.

    python benchmarks/tasks.py [--only encoders classify restore] [--seeds 3] [--minutes 2] [--output runs/benchmark-tasks] [--json]

    encoders   segmentation of the demonstration's photograph, from the same ImageNet encoder: hybrids, and segmentation_models_pytorch's
               Unet and FPN
    classify   MNIST-5k, digits and a folder of pictures: hybrids and timm's small classifiers, from random weights
    restore    denoising and double size, on photographs

Each table is a module of `task_tables`, which is imported when it is needed, and holds

    DESCRIPTION: str                     one line
    MISSING: Callable[[], list[str]]     packages that it needs and that are not installed, as pip's names
    measure(seed: int, minutes: float, folder: Path) -> list[Row]

`measure` trains each model for `minutes` (wall clock, all stages together) in `folder`, deploys it, and returns a row a model:

    {"data": str, "model": str, "quality": {NAME: float, ...}, "ms": {SIDE: float, ...}, "mb": float, "parameters": int, "deployed": str}

`quality` is of the deployed form on the test split, under the metric's name (the first is the one that the goal is judged by, higher is
better); figures of the model in floats may stand beside it. `ms` is the median latency of one picture, deployed, all models of a seed in
one process, in turns. A row may hold more figures. `deployed` says in which form (`int8`, `bf16`, ...). A model that cannot be measured has
{"data", "model", "cannot": REASON} in place of the figures. A model whose name begins with `hybrid` is ours; the others are its peers.

A table's rows of a seed are kept in --output and are not measured again; rows of other minutes or another machine are refused. The goal for
each data set: at least the best peer's quality at no more than half of that peer's latency.

Needs `pip install '.[bench]'` from a checkout. Time: in encoders and classify a model takes twice --minutes (two learning rates) for each
data set and seed, and some minutes for export. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from kept import Row, kept_row, now
from muntin.runtime import describe_hardware
from options import at_least

TABLES = {"encoders": "encoders", "classify": "classification", "restore": "restoration"}
"""Modules of `task_tables` by the names of the tables."""
OURS = "hybrid"
"""Beginning of the names of our models."""
PROTOCOL = 1
"""Version of the rows."""
LATENCY_SHARE = 0.5
"""Most latency of ours, as a share of the peer's, that the goal allows."""


def summarise(rows: list[Row]) -> list[Row]:
    """One row a data set and model: means of all figures over the seeds, and the quality's standard deviation.

    A model that could not be measured with one of the seeds says why in place of the figures.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["model"]), []).append(row)
    summary: list[Row] = []
    for (data, model), of_seeds in groups.items():
        if failed := [row["cannot"] for row in of_seeds if "cannot" in row]:
            summary.append({"data": data, "model": model, "cannot": failed[0]})
            continue
        first = of_seeds[0]
        values = {name: [row["quality"][name] for row in of_seeds] for name in first["quality"]}
        summary.append({
            "data": data, "model": model, "seeds": len(of_seeds),
            "quality": {name: statistics.fmean(numbers) for name, numbers in values.items()},
            "deviation": {name: statistics.stdev(numbers) if len(numbers) > 1 else None for name, numbers in values.items()},
            "ms": {side: statistics.fmean(row["ms"][side] for row in of_seeds) for side in first["ms"]},
            "mb": statistics.fmean(row["mb"] for row in of_seeds),
            "parameters": first["parameters"], "deployed": sorted({row["deployed"] for row in of_seeds}),
        })  # fmt: skip
    return summary


def judge(summary: list[Row]) -> list[Row]:
    """For each data set: ours with at least the best peer's quality and the least latency, and whether that is within the goal.

    If none has the quality, ours with the best quality is named. None for a data set without a peer or without ours.
    """
    goals: list[Row] = []
    for data in dict.fromkeys(row["data"] for row in summary):
        measured = [row for row in summary if row["data"] == data and "cannot" not in row]
        ours = [row for row in measured if row["model"].startswith(OURS)]
        peers = [row for row in measured if not row["model"].startswith(OURS)]
        if not ours or not peers:
            goals.append({"data": data, "met": None, "reason": "no model of ours" if not ours else "no peer"})
            continue
        peer = max(peers, key=_quality)
        good = [row for row in ours if _quality(row) >= _quality(peer)]
        one = min(good, key=_latency) if good else max(ours, key=_quality)
        share = _latency(one) / _latency(peer)
        goals.append({
            "data": data, "met": bool(good) and share <= LATENCY_SHARE, "model": one["model"], "peer": peer["model"],
            "gain": _quality(one) - _quality(peer), "latency_share": share,
        })  # fmt: skip
    return goals


def _quality(row: Row) -> float:
    return float(next(iter(row["quality"].values())))


def _latency(row: Row) -> float:
    return float(next(iter(row["ms"].values())))


def print_table(name: str, summary: list[Row], goals: list[Row]) -> None:
    print(f"\n{name}")
    for row in summary:
        place = f"{row['data']:<22}{row['model']:<32}"
        if "cannot" in row:
            print(f"{place}cannot: {row['cannot']}")
            continue
        quality = ", ".join(
            f"{metric} {value:.4g}" + ("" if row["deviation"][metric] is None else f" ± {row['deviation'][metric]:.2g}")
            for metric, value in row["quality"].items()
        )
        times = ", ".join(f"{ms:.3g} ms at {side}" for side, ms in row["ms"].items())
        print(f"{place}{quality}; {times}; {row['mb']:.2f} MB, {row['parameters'] / 1e6:.2f} M, {' or '.join(row['deployed'])}")
    for goal in goals:
        if goal["met"] is None:
            print(f"goal      {goal['data']}: not judged, {goal['reason']}")
        else:
            word = "met" if goal["met"] else "missed"
            print(
                f"goal      {goal['data']}: {word}: {goal['model']} has {goal['gain']:+.4g} beside {goal['peer']} "
                f"in {goal['latency_share']:.0%} of its time"
            )


def measure_table(name: str, seeds: int, minutes: float, folder: Path) -> list[Row]:
    """The rows of a table, kept by seed."""
    table: Any = import_module(f"task_tables.{TABLES[name]}")
    if missing := table.MISSING():
        sys.exit(f"tasks.py: {name} needs {', '.join(missing)}: pip install {' '.join(missing)}, or leave it out by --only")
    hardware = describe_hardware()
    rows: list[Row] = []
    for seed in range(seeds):
        print(f"{name}, seed {seed}", file=sys.stderr)
        place = folder / name / str(seed)
        settings = {"protocol": PROTOCOL, "table": name, "seed": seed, "minutes": minutes}

        def make(seed: int = seed, place: Path = place) -> Row:
            return {"rows": table.measure(seed, minutes, place)}

        rows += kept_row(folder / name / f"{seed}.json", settings, make, hardware=hardware)["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--minutes", type=float, default=2.0, help="wall-clock minutes of training of each model")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-tasks"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    given = parser.parse_args()
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g}: give more than 0")
    document: dict[str, Any] = {}
    for name in dict.fromkeys(given.only):
        rows = measure_table(name, given.seeds, given.minutes, given.output)
        summary = summarise(rows)
        document[name] = {"summary": summary, "goals": judge(summary), "rows": rows}
        if not given.json:
            print_table(name, summary, document[name]["goals"])
    if given.json:
        print(json.dumps({"benchmark": "tasks", "hardware": describe_hardware(), "created": now(), "tables": document}, indent=1))


if __name__ == "__main__":
    main()
