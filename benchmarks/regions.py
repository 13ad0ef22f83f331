"""Measure a change of the recipe on unseen parts of the world: regions of the training split that are left out of training.

    python benchmarks/regions.py [--sources earth:climate ...] [--variants "as it is" ...] [--model NAME] [--steps 900]

The demonstration's recipe with one change at a time. The validation split is a strip of ocean, and strips beside the training data are too
similar to it (docs/log.md); the test split is not used. Time: a minute or two a training on
two cores, of which a variant has three a seed and source. Scores do not suffer from other work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from ablation import shown
from documents import Column, Row, Table, columns, grouped, mean, seeds_of
from harness import Benchmark, Options, Run, main, option, seeds_option
from muntin.data.config import SourceName
from muntin.training.loop import LOG_EVERY
from muntin.training.precision import cpu_computes_bf16
from muntin.training.recipe import Recipe
from resumed import demo_recipe, network_of
from segmentation_peers.training import REGIONS, held_out

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


class RegionsOptions(Options):
    sources: tuple[str, ...] = option(SOURCES, "label sets", choices=SOURCES, selects=True)
    variants: tuple[str, ...] = option(tuple(VARIANTS), "the first is the base", choices=tuple(VARIANTS), selects=True)
    model: str = option("hybrid-xxs", "network")
    steps: int = option(900, "steps of training, batches of the recipe's size", least=1)
    seeds: tuple[int, ...] = seeds_option(0)
    threads: int = option(2, "threads of training", least=1)
    precision: str = option("bf16" if cpu_computes_bf16() else "fp32", "of training", choices=("fp32", "bf16"))

    def recipe(self, source: str, variant: str, seed: int) -> Recipe:
        never = self.steps + 1
        return demo_recipe({
            "name": "regions", "seed": seed, "model.name": self.model, "data.source": source, "training.steps": self.steps,
            "training.precision": self.precision, "training.threads": self.threads, "training.validate_every": never,
            "training.checkpoint_every": never, **VARIANTS[variant],
        })  # fmt: skip


def score(recipe: Recipe, region: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="regions-") as folder:
        training = held_out(recipe, Path(folder), REGIONS[region])
    last, validation = max(1, recipe.training.steps // LOG_EVERY // 10), training.validation[-1]
    loss = fmean(point["loss"] for point in training.curve[-last:])
    return {"miou": validation["score"], "by_class": validation["by_class"], "loss": loss, "seconds": training.seconds}


def rows(run: Run) -> Iterator[Row]:
    cases = product(*map(dict.fromkeys, (run.options.sources, run.options.seeds, run.options.variants)), REGIONS)
    for source, seed, variant, region in cases:
        recipe, names = run.options.recipe(source, variant, seed), {"source": source, "variant": variant, "region": region, "seed": seed}
        settings = {"recipe": recipe.model_dump(mode="json"), "structure": network_of(run.options.model)["structure"]}
        name = f"{source.replace(':', '-')}/{variant}/{region}-{seed}"
        yield names | run.row(name, score, recipe, region, **settings, spans=REGIONS[region])


def summary(rows: list[Row]) -> Iterator[Row]:
    """A row for each source and variant: means, and points against the first variant, region by region and seed by seed."""
    base: dict[str, list[float]] = {}
    for (source, variant), mine in grouped(rows, "source", "variant").items():
        scores = [row["miou"] for row in sorted(mine, key=lambda row: (row["region"], row["seed"]))]
        points = [100 * (one - other) for one, other in zip(scores, base.setdefault(source, scores), strict=True)]
        by_region = {region: mean((row for row in mine if row["region"] == region), "miou") for region in REGIONS}
        ahead = None if scores is base[source] else shown(points, ".1f")
        yield {"source": source, "variant": variant, **by_region, "mean": fmean(scores), "points": ahead, "loss": mean(mine, "loss")}


BENCHMARK = Benchmark(
    name="regions",
    options=RegionsOptions,
    measure=rows,
    about="""mIoU of each region that was left out of training, their mean over the seeds, the difference to the first variant in points
(mean ± standard error over regions and seeds), and the training loss, mean of its last tenth.""",
    newest=lambda document: "; ".join(f"{row['source']}, {row['variant']}: {row['mean']:.3f}" for row in summary(document.rows)),
    n=seeds_of,
    variant=lambda document: f"{document.settings['model']}, {document.settings['steps']} steps",
    tables=(
        Table(
            columns=(
                *columns("source, variant"), *(Column(title=name, value=name, form="{:.3f}") for name in REGIONS),
                *columns("mean:.3f, points, loss:.3f"),
            ),
            rows=summary,
        ),
    ),
    unrecorded="never run as a whole; single rows are in docs/log.md",
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
