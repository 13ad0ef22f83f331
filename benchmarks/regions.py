"""Measure a change of the recipe on unseen parts of the world: regions of the training split that are left out of training.

    python benchmarks/regions.py [--sources earth:climate earth earth:shore] [--variants "as it is" ...] [--model hybrid-xxs] [--steps 900]
                                 [--seeds 0] [--threads 2] [--precision bf16] [--set KEY=VALUE ...] [--output runs/benchmark-regions]
                                 [--json]

The demonstration's recipe in one precision, with one change at a time. Each of the three regions of the training split that hold land is
left out of a training of its own and scored, by the averaged weights in floats. The validation split is a strip of ocean, and strips beside
the training data are too similar to it (docs/log.md); the test split is not used. Columns:
    the regions   mIoU of the region that was left out
    mean          of the regions and the seeds
    points        100 x (variant - the first variant), region by region and seed by seed: mean +- standard error
    loss          of training, mean of its last tenth

`--set` changes the recipe for all variants. A row that is there already is not made again. Time: a minute or two a row on two cores, of
which a variant has three a seed and source. Scores do not suffer from other work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import yaml

from kept import Row, kept_row, now
from muntin.data.config import SourceName
from muntin.runtime import describe_hardware
from muntin.training.loop import LOG_EVERY
from muntin.training.precision import cpu_computes_bf16
from muntin.training.recipe import Recipe
from resumed import demo_recipe, network_of
from segmentation_peers.budget import Interrupted
from segmentation_peers.tuning import REGIONS, held_out

SOURCES = tuple(name for name in get_args(SourceName) if name.startswith("earth"))
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "not upside down": {"data.augmentation.flip_vertical": 0},
    "zoom": {"data.augmentation.scale": [0.7, 1.4]},
    "light": {f"data.augmentation.{what}": 0.15 for what in ("brightness", "contrast", "saturation")},
    "rare classes": {"data.rare": 0.3},
    "weight decay": {"training.weight_decay": 0.5},
    "longer average": {"training.average": 0.999},
    "cross-entropy alone": {"training.overlap_loss": 0},
}
"""Keys of the recipe that each changes."""


OWN = {
    "seed": "seeds", "model.name": "model", "data.source": "sources", "training.steps": "steps", "training.precision": "precision",
    "training.threads": "threads", "model": "model",
}  # fmt: skip
"""Keys of the recipe that have an option of their own, which says in the tables what they are."""


def recipe_of(source: str, variant: str, seed: int, given: argparse.Namespace) -> Recipe:
    never = given.steps + 1
    asked = {key: yaml.safe_load(value) for key, value in (one.split("=", 1) for one in given.set)}
    return demo_recipe({
        "name": "regions", "seed": seed, "model.name": given.model, "data.source": source,
        "training.steps": given.steps, "training.precision": given.precision, "training.threads": given.threads,
        "training.validate_every": never, "training.checkpoint_every": never, **asked, **VARIANTS[variant],
    })  # fmt: skip


def score(recipe: Recipe, region: str) -> Row:
    folder = Path(tempfile.mkdtemp(prefix="regions-"))
    try:
        training = held_out(recipe, folder, REGIONS[region])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = max(1, recipe.training.steps // LOG_EVERY // 10)
    return {
        "miou": training.validation[-1]["score"],
        "by_class": training.validation[-1]["by_class"],
        "loss": fmean(point["loss"] for point in training.curve[-last:]),
        "seconds": training.seconds,
    }


def print_table(source: str, rows: dict[tuple[str, str, int], Row], given: argparse.Namespace) -> None:
    regions, first = list(REGIONS), given.variants[0]
    print(f"\n{source}, {given.model}, {given.steps} steps, seeds {', '.join(map(str, given.seeds))}")
    print(f"{'':<22}{''.join(f'{name:>10}' for name in regions)}{'mean':>8}{'points':>16}{'loss':>8}")
    for variant in given.variants:
        mine = {(region, seed): rows[variant, region, seed] for region in regions for seed in given.seeds}
        means = "".join(f"{fmean(mine[region, seed]['miou'] for seed in given.seeds):>10.3f}" for region in regions)
        points = [100 * (row["miou"] - rows[first, *key]["miou"]) for key, row in mine.items()]
        ahead = "" if variant == first else f"{fmean(points):+.1f} +- {stdev(points) / sqrt(len(points)):.1f}"
        loss = fmean(row["loss"] for row in mine.values())
        print(f"{variant:<22}{means}{fmean(row['miou'] for row in mine.values()):>8.3f}{ahead:>16}{loss:>8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the first is what others are held against"
    )
    parser.add_argument("--model", default="hybrid-xxs")
    parser.add_argument("--steps", type=int, default=900, help="of training, batches of the recipe's size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="bf16" if cpu_computes_bf16() else "fp32", help="of training, the same for all"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe, for all variants; repeatable")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-regions"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    given = parser.parse_args()
    if wrong := [one for one in given.set if "=" not in one]:
        parser.error(f"--set {wrong[0]}: give KEY=VALUE")
    if wrong := [key for one in given.set if (key := one.partition("=")[0].strip()) in OWN]:
        parser.error(f"--set {wrong[0]}: give --{OWN[wrong[0]]}, which the table names")
    hardware, document = describe_hardware(), []
    for source in dict.fromkeys(given.sources):
        rows: dict[tuple[str, str, int], Row] = {}
        for seed in dict.fromkeys(given.seeds):
            for variant in dict.fromkeys(given.variants):
                recipe = recipe_of(source, variant, seed, given)
                settings = {"recipe": recipe.model_dump(mode="json"), "structure": network_of(given.model)["structure"]}
                for region in REGIONS:
                    path = given.output / source.replace(":", "-") / variant.replace(" ", "-") / f"{region}-{seed}.json"
                    try:
                        row = kept_row(path, {**settings, "spans": REGIONS[region]}, partial(score, recipe, region))
                    except Interrupted:
                        sys.exit("interrupted; the same command goes on, that row anew")
                    rows[variant, region, seed] = row
                    print(f"{source}, {variant}, {region}, seed {seed}: {row['miou']:.3f}", file=sys.stderr)
                    document.append({"source": source, "variant": variant, "region": region, "seed": seed, **row})
        if not given.json:
            print_table(source, rows, given)
    if given.json:
        print(json.dumps({"benchmark": "regions", "hardware": {**hardware, "created": now()}, "rows": document}, indent=1))
    else:
        print(f"\n{hardware['cpu']}, {hardware['physical_cores']} cores; {now()}")


if __name__ == "__main__":
    main()
