"""Compare the presets with networks that `muntin search` found at about their latency: as many training steps each, deployed in INT8.

    python benchmarks/presets.py [--seeds 3] [--steps 660] [--only hybrid-xxs ...] [--output runs/benchmark-presets] [--json]

Every network is trained by the demonstration's recipe (source earth) on the same crops, seed by seed. FOUND are the networks of
`search.py --minutes 10` (results/search-2026-12-01-epyc.json) next to a preset on the front. A preset is replaced by a network that
takes at most 5 % more time and is ahead on the validation split by more than twice the standard error of the difference; the test split
decides nothing. `earth`'s validation split is one region, so every seed is also trained and judged on the two other splits
of the same picture (`earth:climate`, `earth:shore`).

Columns: mIoU of the artefact on validation and test, mean over splits and seeds, the difference to the preset in points with its standard
error over pairs, megabytes, median milliseconds of 512 x 512 (all networks of a seed in turns). Rows are kept in --output and are not
measured again. Scores do not suffer from other work; for the timings run it alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import muntin
from kept import Row, kept_row, now
from muntin.data import open_source
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint
from muntin.runtime import describe_hardware, load
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import evaluate, fit, load_recipe, read_checkpoint
from muntin.training.checkpoint import checkpoints_in
from muntin.training.evaluation import tile_of
from options import at_least

RECIPE = Path(muntin.__file__).parent / "recipes" / "demo.yaml"
SHARED: dict[str, Any] = {
    "stem": [8, 16, 32], "pairs": [0, 0], "attention": "local", "window": 4, "mlp_ratio": 1, "fusion": "upernet", "finest": 8,
}  # fmt: skip
FOUND: dict[str, dict[str, dict[str, Any]]] = {
    "hybrid-xxs": {"062": {**SHARED, "dims": [128, 128], "depths": [1, 1], "decoder": 32}},
    "hybrid-xs": {
        "059": {**SHARED, "dims": [128, 192], "depths": [3, 1], "decoder": 48, "block": "serial", "gate": False},
    },
}
"""By preset, networks that a search found near its latency, as `model.options`."""
SPLITS = ("earth", "earth:climate", "earth:shore")
AS_FAST = 1.05
ROUNDS = 60


def trained(source: str, preset: str, options: dict[str, Any], seed: int, steps: int, folder: Path) -> Row:
    """Train and export one network and score its artefact."""
    changes = {"data.source": source, "model.name": preset, "seed": seed, "training.steps": steps}
    recipe = load_recipe(RECIPE, [f"{name}={value}" for name, value in changes.items()])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"options": options})})
    result = fit(recipe, directory=folder, root=RECIPE.parent, resume=bool(checkpoints_in(folder / "checkpoints")))
    if result.interrupted or result.stop_requested:
        raise SystemExit("interrupted: the same command goes on")
    artifact = export_checkpoint(read_checkpoint(result.checkpoint), folder / ARTIFACT)
    data = open_source(recipe.data, root=RECIPE.parent)
    with closing(load(artifact.path)) as session:
        scores = {split: evaluate(session, data.split(split), tile=tile_of(recipe.data.crop)).score for split in ("validation", "test")}
    print(f"{source}, seed {seed}, {folder.name}: {scores}", file=sys.stderr, flush=True)
    return {**scores, "bytes": artifact.bytes}


def measure(preset: str, arguments: argparse.Namespace, machine: Row) -> Row:
    """All rows of a preset and its rivals: by name, figures over splits and seeds."""
    networks = {preset: {}, **FOUND[preset]}
    folder, settings = arguments.output.resolve() / preset, {"steps": arguments.steps, "networks": networks}
    rows: dict[str, list[Row]] = {name: [] for name in networks}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for seed in range(arguments.seeds):
        for source in SPLITS:
            where = folder / f"{source.replace(':', '-')}-{seed}"
            for name, options in networks.items():
                make = partial(trained, source, preset, options, seed, arguments.steps, where / name)
                rows[name].append({"source": source, "seed": seed, **kept_row(where / f"{name}.json", settings, make)})
        ms = kept_row(folder / f"latency-{seed}.json", settings, partial(timed, folder / f"earth-{seed}", networks), hardware=machine)["ms"]
        for name in networks:
            times[name].append(ms[name])
    return {name: figures(rows[name], rows[preset], times[name], times[preset]) for name in networks}


def timed(folder: Path, networks: dict[str, Any]) -> Row:
    """Median milliseconds of all networks of a seed, in turns."""
    image = np.random.default_rng(0).integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)
    sessions = {name: load(folder / name / ARTIFACT) for name in networks}
    latencies = interleaved_latency(sessions, image, rounds=ROUNDS)
    for session in sessions.values():
        session.close()
    return {"ms": {name: latency.median_ms for name, latency in latencies.items()}}


def figures(rows: list[Row], base: list[Row], ms: list[float], base_ms: list[float]) -> Row:
    """Means, and differences to the preset's over pairs of one split and seed; `replaces`: by the rule above."""
    found: Row = {"rows": [{key: row[key] for key in ("source", "seed", "validation", "test", "bytes")} for row in rows]}
    for split in ("validation", "test"):
        gains = [100 * (row[split] - other[split]) for row, other in zip(rows, base, strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
        found[split] = {"mean": statistics.mean(row[split] for row in rows), "points": statistics.mean(gains), "error": error}
    ratio = statistics.mean(own / other for own, other in zip(ms, base_ms, strict=True))
    ahead = found["validation"]["points"] > 2 * found["validation"]["error"]
    return {**found, "ms": statistics.mean(ms), "time": ratio, "replaces": rows is not base and ratio <= AS_FAST and ahead}


def print_table(presets: dict[str, Row], hardware: Row) -> None:
    print(f"{'network':<14}{'validation':>11}{'points':>14}{'test':>8}{'points':>14}{'MB':>7}{'ms':>7}{'time':>6}")
    for networks in presets.values():
        for name, row in networks.items():
            cells = [
                f"{row[split]['mean']:>{width}.3f}{row[split]['points']:>8.1f} ±{row[split]['error']:<4.1f}"
                for split, width in (("validation", 11), ("test", 8))
            ]
            size = row["rows"][0]["bytes"] / 1e6
            print(f"{name:<14}{''.join(cells)}{size:>7.2f}{row['ms']:>7.2f}{row['time']:>6.2f}{'  replaces it' if row['replaces'] else ''}")
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=660)
    parser.add_argument("--only", nargs="+", choices=list(FOUND), default=list(FOUND))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-presets"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    presets = {preset: measure(preset, arguments, machine) for preset in arguments.only}
    hardware, settings = {**machine, "created": now()}, {"steps": arguments.steps, "seeds": arguments.seeds, "found": FOUND}
    if arguments.json:
        print(json.dumps({"benchmark": "presets", "hardware": hardware, "settings": settings, "rows": presets}, indent=1))
    else:
        print_table(presets, hardware)


if __name__ == "__main__":
    main()
