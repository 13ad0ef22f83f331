"""Measure the cost of integers on images of up to 68 times the area of the calibration images.

    python benchmarks/areas.py [--model hybrid-xs] [--crop 160] [--seeds 0 1 2] [--steps 700] [--precision bf16] [--threads N]

A hybrid trained by the demonstration's recipe on crops of --crop pixels is exported in floats and in integers: `INT8` and `W4A8` after
training, `compressed` by `muntin compress`. Each scores the test split (strips of 645 x 2700 pixels) in OpenVINO with
float layers in f32, in tiles and whole. Time on two cores: eight minutes a seed. TaskScores do not suffer from other work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import muntin
from ablation import error, shown
from documents import Column, Document, Goal, Row, Table, columns, mean, seeds_of, spread
from harness import Benchmark, Options, Run, main, option, seeds_option
from muntin.artifact import Artifact
from muntin.budgeting.run_budget import compress_run
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.tasks.scores import PictureAnswers
from muntin.training import Recipe
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import evaluate
from muntin.training.precision import cpu_computes_bf16
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, trained

FLOATS = "floats"
TIMES = (1, 2, 4)
"""Sides of tiles, over the crop's; after them comes the whole strip."""
LARGE = 64
"""Times the area, from which the goal is asked."""


def recipe_of(seed: int, given: Any) -> Recipe:
    demo = demo_recipe({})
    batch_size = max(1, round(demo.training.batch_size * demo.data.crop**2 / given.crop**2))
    return demo_recipe({
        "name": "areas", "seed": seed, "model.name": given.model, "data.crop": given.crop, "training.batch_size": batch_size,
        "training.steps": given.steps, "training.precision": given.precision, "training.threads": given.threads,
        "training.validate_every": given.steps, "training.checkpoint_every": given.steps,
    })  # fmt: skip


def measure(recipe: Recipe, folder: Path) -> Row:
    checkpoint = trained(recipe, folder)
    artifacts: dict[str, Artifact] = {
        FLOATS: float_artifact(checkpoint, folder / "floats"),
        "INT8": export_checkpoint(checkpoint, folder / "int8"),
        "W4A8": integer_artifact(checkpoint, folder / "w4a8"),
        "compressed": compress_run(checkpoint).artifact,
    }
    split = source_of(checkpoint).split("test")
    sizes = [sample.image.shape[:2] for sample in split]
    rows: list[Row] = []
    for tile in (*(times * recipe.data.crop for times in TIMES), max(max(size) for size in sizes)):
        area = min(min(tile, height) * min(tile, width) for height, width in sizes) / recipe.data.crop**2
        floats: list[Any] = []
        for form, artifact in artifacts.items():
            session = muntin.load(artifact.path, precision="f32", threads=recipe.training.threads, shapes=(), cache=False)
            labels: PictureAnswers = []
            result = evaluate(session, split, tile=tile, answers=labels)
            floats = floats or labels
            same = sum(int(np.count_nonzero(one == other)) for one, other in zip(labels, floats, strict=True))
            share = same / sum(each.size for each in labels)
            rows.append({"form": form, "area": area, "tile": tile, "miou": result.miou, "iou": result.iou, "labels": share})
    return {"forms": rows}


class AreasOptions(Options):
    model: str = option("hybrid-xs", "preset")
    crop: int = option(160, "side of training crops and calibration images, pixels", least=32)
    seeds: tuple[int, ...] = seeds_option(0, 1, 2)
    steps: int = option(700, "of FP32 training; each candidate of compression takes half as many", least=1)
    precision: str = option("bf16" if cpu_computes_bf16() else "fp32", "of training", choices=("fp32", "bf16"))
    threads: int = option(2, "of training and of the deployed models", least=1)


def rows(run: Run) -> Iterator[Row]:
    for seed in dict.fromkeys(run.options.seeds):
        recipe, name = recipe_of(seed, run.options), f"{run.options.model}-{seed}"
        settings = {"recipe": recipe.model_dump(mode="json"), **network_of(run.options.model)}
        row = run.row(f"{name}/row", measure, recipe, run.folder / name, **settings)
        yield from ({"seed": seed, **form, "created": row["created"]} for form in row["forms"])


def figures(found: list[Row]) -> Iterator[Row]:
    """A row for each form and size: scores, points and `more` of all seeds. The floats have no points, the first size no `more`."""
    scores = {(row["form"], row["tile"], row["seed"]): row for row in found}
    forms, tiles, seeds = (list(dict.fromkeys(values)) for values in zip(*scores, strict=True))
    for form in forms:
        first: list[float] = []
        for tile in tiles:
            group = [scores[form, tile, seed] for seed in seeds]
            row = {"form": form, "area": group[0]["area"], "miou": [row["miou"] for row in group]}
            if form != FLOATS:
                row["points"] = [100 * (row["miou"] - scores[FLOATS, tile, row["seed"]]["miou"]) for row in group]
                row["more"] = [large - small for large, small in zip(row["points"], first, strict=False)]
                row["labels"], first = mean(group, "labels"), first or row["points"]
            yield row


def change(values: list[float] | None) -> str | None:
    return shown(values, ".2f") if values else None


def surely(document: Document) -> dict[str, float]:
    """By form, the points beyond those at the calibration size, where the goal is asked: the lower end, two standard errors off."""
    large = {row["form"]: row["more"] for row in figures(document.rows) if row["area"] >= LARGE and len(row.get("more", ())) > 1}
    return {form: fmean(more) - 2 * error(more) for form, more in large.items()}


def newest(document: Document) -> str:
    *_, large = (row for row in figures(document.rows) if row["form"] == "INT8")
    return f"integers at {large['area']:.0f} times the calibration area, points beyond those at its own size: INT8 {change(large['more'])}"


def limits(documents: list[Document]) -> str:
    """What whole images cost a model in floats, for docs/limits.md."""
    small, *_, large = (fmean(row["miou"]) for row in figures(documents[-1].rows) if row["form"] == FLOATS)
    return f"A model trained on crops loses {100 * (small - large):.1f} points if it sees a whole large image at once"


BENCHMARK = Benchmark(
    name="areas",
    options=AreasOptions,
    measure=rows,
    about="""A hybrid trained and calibrated on crops, on the test split of `earth` in tiles and without. Area: over a calibration image's.
mIoU ± standard deviation. Points: integers against floats at the same size, ± standard error; more: points beyond those at the calibration
size; labels: share of equal labels. Goal: at 64 times the area and more, at most half a point beyond, twice the standard error included: a
form that misses it may be one that three seeds do not tell apart.""",
    newest=newest,
    n=seeds_of,
    variant=lambda document: document.settings["model"],
    tables=(
        Table(
            columns=(
                *columns("form, area:.0f"),
                Column(title="mIoU", value=lambda row: spread(row["miou"])),
                Column(title="points", value=lambda row: change(row.get("points"))),
                Column(title="more", value=lambda row: change(row.get("more"))),
                *columns("labels:.2%"),
            ),
            rows=figures,
        ),
    ),
    goals=(Goal(name="points beyond those at the calibration size, surely", values=surely, at_least=-0.5, form="{:.2f}"),),
    blocks={"limits": limits},
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
