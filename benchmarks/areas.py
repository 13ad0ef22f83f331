"""Measure the cost of integers on images of up to 68 times the area of the calibration images.

    python benchmarks/areas.py [--model hybrid-xs] [--crop 160] [--seeds 0 1 2] [--steps 700] [--precision bf16] [--threads N]
                               [--output runs/benchmark-areas] [--json]

A hybrid trained by the demonstration's recipe (source earth) on crops of --crop pixels, as many pixels a step as the recipe has, is
exported in floats and in integers, which are calibrated on such crops: `INT8` and `W4A8` after training, `stages` through low rank,
W4A8 and mixed precision. Each artefact, in OpenVINO with its float layers in f32, scores the whole test split in tiles of that crop's
side, of twice and four times it, and without tiles: strips of 645 x 2700 pixels, 68 times the area of crops of 160. Columns:
    area      area that is computed at once, over the area of a calibration image
    mIoU      of the test split: mean over the seeds +- standard deviation
    points    100 x (form - floats) at the same size, seed by seed: mean +- standard error
    more      points minus the points at the calibration images' own size: the cost of size alone
    labels    share of the test split's pixels with the same label as in floats at the same size: mean over the seeds
Goal: at 64 times the area and more, integers cost at most half a point more than at the calibration images' size. It counts as met or
missed if the mean is more than twice its standard error away from the goal.

Existing rows are not measured again, and an interrupted training continues. Time on two cores: eight minutes a seed for
hybrid-xs. Scores do not suffer from other work.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

import muntin
from ablation import SURE, difference
from kept import Row, kept_row, now
from muntin.artifact import Artifact
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.runtime import describe_hardware
from muntin.training import read_checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import predictions, score
from muntin.training.precision import cpu_computes_bf16
from muntin.training.recipe import Recipe
from resumed import PERCENTILE, compressed, demo_recipe, float_artifact, integer_artifact, network_of, print_machines, trained

FLOATS = "floats"
FORMS = (FLOATS, "INT8", "W4A8", "stages")
TIMES = (1, 2, 4)
"""Sides of tiles, over the crop's; after them comes the whole strip."""
GOAL = 0.5
"""Points."""
LARGE = 64
"""Times the area, from which the goal is asked."""


def recipe_of(seed: int, given: argparse.Namespace) -> Recipe:
    demo = demo_recipe({})
    batch_size = max(1, round(demo.training.batch_size * demo.data.crop**2 / given.crop**2))
    return demo_recipe({
        "name": "areas", "seed": seed, "model.name": given.model, "data.crop": given.crop, "training.batch_size": batch_size,
        "training.steps": given.steps, "training.precision": given.precision, "training.threads": given.threads,
        "training.validate_every": given.steps, "training.checkpoint_every": given.steps,
    })  # fmt: skip


def measure(recipe: Recipe, folder: Path) -> Row:
    checkpoint = trained(recipe, folder)
    staged = read_checkpoint(compressed(checkpoint, folder / "compressed", recipe.compression).checkpoint)
    artifacts: dict[str, Artifact] = {
        FLOATS: float_artifact(checkpoint, folder / "floats"),
        "INT8": export_checkpoint(checkpoint, folder / "int8"),
        "W4A8": integer_artifact(checkpoint, folder / "w4a8"),
        "stages": export_checkpoint(staged, folder / "stages"),
    }
    split = source_of(checkpoint).split("test")
    sizes = [sample.image.shape[:2] for sample in split]
    rows: Row = {}
    for tile in (*(times * recipe.data.crop for times in TIMES), max(max(size) for size in sizes)):
        area = min(min(tile, height) * min(tile, width) for height, width in sizes) / recipe.data.crop**2
        floats: list[Any] = []
        for form in FORMS:
            session = muntin.load(artifacts[form].path, precision="f32", threads=recipe.training.threads, shapes=(), cache=False)
            pairs = list(predictions(session, split, tile=tile))
            result = score(iter(pairs), session)
            labels = [given for _, given in pairs]
            floats = floats or labels
            counted = sum(found.size for found in labels)
            same = sum(int(np.count_nonzero(found == of)) for found, of in zip(labels, floats, strict=True)) / counted
            rows.setdefault(form, []).append({"area": area, "tile": tile, "miou": result.miou, "iou": result.iou, "labels": same})
    return {"forms": rows}


def figures(rows: list[Row], form: str, index: int) -> dict[str, Any]:
    """Compute the figures of one form at one size, over the seeds."""
    scores = [row["forms"][form][index]["miou"] for row in rows]
    points = [[100 * (row["forms"][form][at]["miou"] - row["forms"][FLOATS][at]["miou"]) for row in rows] for at in (index, 0)]
    more = [large - small for large, small in zip(*points, strict=True)]
    return {
        "area": rows[0]["forms"][form][index]["area"], "miou": scores, "points": points[0], "more": more,
        "labels": fmean(row["forms"][form][index]["labels"] for row in rows),
    }  # fmt: skip


def spread_of(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")


def print_table(rows: list[Row], given: argparse.Namespace) -> None:
    print(f"{given.model}, crops of {given.crop}, {given.steps} steps, seeds {', '.join(map(str, given.seeds))}")
    print(f"{'form':<8}{'area':>6}{'mIoU':>20}{'points':>16}{'more':>16}{'labels':>9}")
    for form in FORMS:
        for index in range(len(TIMES) + 1):
            found = figures(rows, form, index)
            line = f"{form:<8}{found['area']:>6.0f}{spread_of(found['miou']):>20}"
            if form != FLOATS:
                more = difference(found["more"]).text(".2f") if index else ""
                line += f"{difference(found['points']).text('.2f'):>16}{more:>16}{found['labels']:>9.2%}"
            print(line)
    for form, word in goals(rows).items():
        print(f"{form}: {word} (goal {-GOAL:g} at {LARGE} times the area)")
    print_machines(rows)


def goals(rows: list[Row]) -> dict[str, str]:
    """Judge the goal of each form in integers by these seeds."""
    return {form: verdict(figures(rows, form, len(TIMES))) for form in FORMS[1:]}


def verdict(found: dict[str, Any]) -> str:
    if found["area"] < LARGE:
        return "not asked: the images are too small"
    more = difference(found["more"])
    if more.error is None:
        return "one seed"
    least, most = more.mean - SURE * more.error, more.mean + SURE * more.error
    return "met" if least >= -GOAL else "MISSED" if most < -GOAL else "not told apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hybrid-xs")
    parser.add_argument("--crop", type=int, default=160, help="side of training crops and calibration images, pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=700, help="of FP32 training; the stages take half as many more")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if cpu_computes_bf16() else "fp32", help="of training")
    parser.add_argument("--threads", type=int, default=2, help="of training and of the deployed models")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-areas"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    rows = []
    for seed in dict.fromkeys(given.seeds):
        recipe, folder = recipe_of(seed, given), given.output / f"{given.model}-{seed}"
        settings = {"recipe": recipe.model_dump(mode="json"), "percentile": PERCENTILE, **network_of(given.model)}
        rows.append({"seed": seed, **kept_row(folder / "row.json", settings, partial(measure, recipe, folder))})
    if given.json:
        print(json.dumps({
            "benchmark": "areas", "created": now(), "hardware": describe_hardware(), "rows": rows,
            "goal": {"more": -GOAL, "area": LARGE, "met": goals(rows)},
        }, indent=1))  # fmt: skip
    else:
        print_table(rows, given)


if __name__ == "__main__":
    main()
