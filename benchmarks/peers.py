"""Compare muntin's hybrids with common segmenters: the same data, crops, loop and budget, each deployed in its own best way.

    python benchmarks/peers.py [--sources earth earth:climate earth:shore | --recipe RECIPE.yaml] [--models NAME ...] [--seeds 0 1 2]
                               [--minutes 4] [--samples N]

All models start from random weights and are trained by `muntin fit` with the demonstration's recipe (DeepLabV3+ in FP32 on CPUs, see
`check_maps`). `--recipe`: another one, with your own images; its model, rate, precision, threads and length are replaced. `--minutes` and
`--samples` (crops seen) are two budgets. The learning rate is tuned alike for each model and source (`segmentation_peers/training.py`):
three rates, the whole budget in FP32 each, seed 0; as long as the best one is at an end, at most two more. Deployed is, for each seed, the
fastest variant that loses at most half a point against f32 on data that is not the test split. A model that fails is left out.

Needs `pip install '.[bench]'` from a checkout; YOLO26n-sem also the package ultralytics (AGPL-3.0). Time: a model and a source take six to
eight times --minutes for three seeds, and a few minutes for timing, NNCF and scoring. Run it alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch

from documents import Column, Document, Goal, Row, Table, columns, seeds_of
from harness import Benchmark, Options, Run, main, option, seeds_option
from muntin.data import open_source
from muntin.data.config import SourceName
from muntin.errors import MuntinError, RecipeError
from muntin.training.precision import resolve_precision
from muntin.training.recipe import Recipe
from resumed import network_of
from segmentation_peers import report
from segmentation_peers.deployment import Variant, admitted, deploy, image_of, measure_latency, parameters_of, score_variants
from segmentation_peers.models import ENTRIES, Entry
from segmentation_peers.report import best_rate
from segmentation_peers.training import Budget, Setting, base_recipe, held_out, recipe_for, train_whole

SOURCES = tuple(name for name in get_args(SourceName) if name.startswith("earth"))
RATES = (2e-3, 4e-3, 8e-3)
FURTHER = 2
"""Rates that may be tried beyond an end of these."""
PROTOCOL = 7
"""Version of the rows. 2: the schedule keeps the minutes, and rates are chosen on strips of the training split. 3: training by Muon. 4:
crops are also flipped upside down. 5: a search continues beyond an end of its rates, and variants are also judged on land. 6: rates are
chosen with the whole budget on a region that is left out, instead of a quarter of it on strips beside the training data. 7: hybrids are
compressed by the search of `muntin compress`, whose candidates all count."""
SMALLEST = 128
"""Smallest side of crops and images, pixels: PAN takes no smaller ones."""
PACKAGES = {"segmentation-models-pytorch": "segmentation_models_pytorch", "timm": "timm", "nncf": "nncf"}
"""Packages of the extra `bench`, with their modules."""


class PeersOptions(Options):
    sources: tuple[str, ...] = option((), "label sets of the demonstration; all unless given", choices=SOURCES, parse=str, selects=True)
    recipe: Path | None = option(None, "a segmentation recipe of yours in place of the demonstration's", parse=Path, selects=True)
    models: tuple[str, ...] = option(tuple(ENTRIES), "models", choices=tuple(ENTRIES), selects=True)
    seeds: tuple[int, ...] = seeds_option(0, 1, 2)
    minutes: float | None = option(None, "wall-clock minutes of training (4 unless --samples is given)", parse=float, selects=True)
    samples: int | None = option(None, "crops seen in training", parse=int, selects=True)
    sides: tuple[int, ...] = option((512, 1024), "sides of the timed images, pixels", least=SMALLEST, parse=int, selects=True)
    rounds: int = option(30, "timed calls of each model and size", least=1, selects=True)
    threads: int = option(2, "threads of training and of the deployed models", least=1)
    crop: int | None = option(None, "side of the training crops, pixels; the recipe's unless given", least=SMALLEST)
    batch: int | None = option(None, "crops a step; the recipe's unless given", least=1)

    def __post_init__(self) -> None:
        if self.recipe is not None and self.sources:
            raise ValueError("argument --recipe: not allowed with argument --sources")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes:g}: give more than 0")
        try:
            batch = max(recipe.training.batch_size for recipe in self.recipes.values())
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if self.samples is not None and self.samples < batch:
            raise ValueError(f"--samples {self.samples}: a step takes {batch}: give more")

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Recipes by the name of their comparison. Raises RecipeError for one that these models cannot be compared with."""
        recipes = {}
        for source in dict.fromkeys(self.sources or SOURCES) if self.recipe is None else [""]:
            recipe = base_recipe(self.recipe, source, crop=self.crop, batch_size=self.batch)
            recipes[source or f"recipe {recipe.name if self.recipe is None else self.recipe.stem}"] = recipe
            training, lowest = recipe.training, min(RATES) / 2**FURTHER
            refusals = (
                (recipe.task != "segment", f"task {recipe.task}; all these models segment"),
                (recipe.data.crop < SMALLEST, f"data.crop {recipe.data.crop}: PAN takes no less than {SMALLEST}; give --crop"),
                (training.gate_budget < 1, f"training.gate_budget {training.gate_budget:g}: peers have no gates; set it to 1"),
                (training.compile, "training.compile: compiling would count as training, and differs from model to model"),
                (training.final_learning_rate > lowest, f"training.final_learning_rate {training.final_learning_rate:g}: rates from "
                 f"{lowest:g} on may be tried, and each falls to it; set it no higher"),
            )  # fmt: skip
            for refused, reason in refusals:
                if refused:
                    raise RecipeError(f"recipe {recipe.name}: {reason}")
        return recipes


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One source under one budget."""

    run: Run
    setting: Setting
    budget: Budget

    @property
    def place(self) -> str:
        return f"{self.budget.name}/{self.setting.source.replace(':', '-').replace(' ', '-')}"

    @property
    def folder(self) -> Path:
        return self.run.folder / self.place

    def row(self, part: str, name: str, make: Callable[[], Row], entry: Entry | None = None) -> Row:
        names = {"part": part, "source": self.setting.source, "budget": self.budget.name}
        structure = network_of(entry.model) if entry is not None and entry.hybrid else {}
        shared = {"protocol": PROTOCOL, "packages": versions(), **self.setting.identity, **structure}
        return self.run.row(f"{self.place}/{name}", lambda: {**names, **make()}, **shared)

    def searched(self, entry: Entry) -> list[Row]:
        """The learning rates that were tried, from the lowest on. Entries that train the same model share the search."""
        rows = [self._tried(entry, rate) for rate in RATES]
        for _ in range(FURTHER):
            best = rows.index(best_rate(rows))
            if best == 0:
                rows.insert(0, self._tried(entry, rows[0]["learning_rate"] / 2))
            elif best == len(rows) - 1:
                rows.append(self._tried(entry, 2 * rows[-1]["learning_rate"]))
        return rows

    def _tried(self, entry: Entry, rate: float) -> Row:
        name = f"rate-{entry.model.rpartition(':')[2]}-{rate:g}"
        place = self.folder / name

        def make() -> Row:
            recipe = recipe_for(entry, self.setting, self.budget, seed=0, learning_rate=rate, compressed=False)
            row = {"model": entry.model, "learning_rate": rate}
            shutil.rmtree(place, ignore_errors=True)  # of a search that was interrupted
            try:
                training = held_out(recipe, place, root=self.setting.root)
            except MuntinError as error:
                if type(error) is not MuntinError:  # its kinds are other troubles than a loss that is no longer finite
                    raise
                return {**row, "held_out": 0.0, "failed": str(error)}
            return {**row, "held_out": float(training.validation[-1]["score"]), "steps": training.step}

        row = self.row("rate", name, make, entry)
        shutil.rmtree(place, ignore_errors=True)  # its weights are not needed any more
        return row

    def model(self, entry: Entry, seed: int) -> Row:
        """A model that was trained, deployed in every form, and scored, or why it could not be. The forms stay on disk, to be timed."""
        name = f"model-{entry.name}-{seed}"
        place = self.folder / name

        def make() -> Row:
            try:
                rate = best_rate(self.searched(entry))["learning_rate"]
                recipe = recipe_for(entry, self.setting, self.budget, seed=seed, learning_rate=rate, compressed=entry.way == "compressed")
                checkpoint, compressed, figures = train_whole(entry, recipe, place / "run", self.setting.root)
                forms = deploy(entry, checkpoint, compressed, place)
                return {
                    "model": entry.name, "seed": seed, "learning_rate": rate, **figures, "parameters": parameters_of(checkpoint),
                    "forms": {form: str(path.relative_to(place)) for form, path in forms.items()},
                    "variants": score_variants(forms, checkpoint, threads=self.setting.threads),
                }  # fmt: skip
            except Exception as error:  # noqa: BLE001 - NNCF's own kinds have no other base; the other models go on
                return {"model": entry.name, "seed": seed, "cannot": f"{type(error).__name__}: {error}"}

        row = self.row("model", name, make, entry)
        if "cannot" not in row:
            shutil.rmtree(place / "run", ignore_errors=True)  # several times what is deployed, and many runs come together
        return row

    def latency(self, rows: list[Row], seed: int) -> Row:
        """Every variant of a seed's models at the first size, and the deployed one at all sizes: all timed together.

        Timed anew for other models, sizes or rounds, and if a model was made after it: these are in the row's name.
        """
        key = json.dumps([[(row["model"], row["created"]) for row in rows], self.run.options.sides, self.run.options.rounds])
        return self.row("latency", f"latency-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}", lambda: self._timed(rows, seed))

    def _timed(self, rows: list[Row], seed: int) -> Row:
        variants, (first, *others) = {}, dict.fromkeys(self.run.options.sides)
        for row in rows:
            place = self.folder / f"model-{row['model']}-{seed}"
            for name, variant in row["variants"].items():
                variants[row["model"], name] = Variant(path=place / row["forms"][variant["form"]], precision=variant["precision"])
        source = open_source(self.setting.recipe.data, task=self.setting.recipe.task, root=self.setting.root)
        how = {"threads": self.setting.threads, "rounds": self.run.options.rounds}
        all_ms = measure_latency(variants, image_of(source, first), **how)
        chosen = {}
        for row in rows:
            scores = {name: variant["admission"] for name, variant in row["variants"].items()}
            chosen[row["model"]] = min(admitted(scores), key=lambda name: all_ms[row["model"], name])
        ms = {str(first): {model: all_ms[model, name] for model, name in chosen.items()}}
        for side in others:
            timed = measure_latency({item: variants[item] for item in chosen.items()}, image_of(source, side), **how)
            ms[str(side)] = {model: value for (model, _), value in timed.items()}
        by_model = {row["model"]: {name: all_ms[row["model"], name] for name in row["variants"]} for row in rows}
        return {"seed": seed, "rounds": self.run.options.rounds, "chosen": chosen, "ms": ms, "variants": by_model}

    def rows(self, entries: list[Entry], seeds: list[int]) -> list[Row]:
        found: list[Row] = []
        for seed in seeds:
            rows = [self.model(entry, seed) for entry in entries]
            measured = [row for row in rows if "cannot" not in row]
            found += [*rows, *([self.latency(measured, seed)] if measured else [])]
        measured = [row for row in found if row["part"] == "model" and "cannot" not in row]
        for entry in {ENTRIES[row["model"]].model: ENTRIES[row["model"]] for row in measured}.values():
            found += self.searched(entry)
        return found


def versions() -> Row:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def rows(run: Run) -> Iterator[Row]:
    options = run.options
    if missing := [name for name, module in PACKAGES.items() if find_spec(module) is None]:
        raise SystemExit(f"peers.py: {', '.join(missing)} missing: pip install '.[bench]'")
    # "auto" might choose another precision for one model than for the rest: it is asked once for an output folder.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = run.row("setting", lambda: {"part": "setting", "precision": resolve_precision("auto", device).name})
    yield {**made, "protocol": PROTOCOL, "packages": versions()}
    entries, seeds = [ENTRIES[name] for name in dict.fromkeys(options.models)], list(dict.fromkeys(options.seeds))
    shared = {"root": Path.cwd() if options.recipe is None else options.recipe.parent, "threads": options.threads}
    minutes = 4.0 if options.minutes is None and options.samples is None else options.minutes
    budgets = [Budget(minutes=minutes)] if minutes is not None else []
    for budget in budgets + ([Budget(samples=options.samples)] if options.samples is not None else []):
        for source, recipe in options.recipes.items():
            setting = Setting(source=source, recipe=recipe, precision=made["precision"], **shared)
            yield from Comparison(run=run, setting=setting, budget=budget).rows(entries, seeds)


def model_columns(document: Document) -> tuple[Column, ...]:
    sides = dict.fromkeys(side for row in document.rows if row["part"] == "latency" for side in row["ms"])
    times = ", ".join(f"ms {side}²=ms.{side}:.1f" for side in sides)
    training = "min=minutes:.2f, crops=samples:.0f, im/s=images_per_s:.1f, M=millions:.2f, MB=mb:.2f, rate=learning_rate:.2g"
    return columns(f"source, budget, model, deployed as=deployed, seeds, test mIoU=test, in floats=float, {times}, {training}")


def class_columns(document: Document) -> tuple[Column, ...]:
    labels = dict.fromkeys(label for row in report.models(document.rows) for label in row.get("iou", ()))
    ious = (Column(title=label, value=lambda row, label=label: row["iou"].get(label)) for label in labels)
    return (*columns("source, budget, model"), *ious)


def goal(name: str, key: str, **bound: Any) -> Goal:
    return Goal(name=name, values=lambda document: report.goals(document)[key], **bound)


BENCHMARK = Benchmark(
    name="peers",
    options=PeersOptions,
    measure=rows,
    about="""Each model has the same crops, loop and budget of training (wall-clock minutes, or crops seen) and is deployed in its own best
way; all is OpenVINO on CPUs. Test mIoU (± standard deviation over seeds) is of the deployed model, *in floats* of the same one in FP32; ms
is one image, all models of a seed in turns; min is the median over seeds; rate is the tuned learning rate. A hybrid named -ptq is quantised
after training; the others spend a part of their budget on low rank, W4A8 and mixed precision.

Goals: a hybrid leads by more than both standard deviations, and on `earth` by two points; a hybrid that reaches the best peer's score takes
at most a quarter of its time, and half of the fastest peer's (inf: no hybrid reaches that score). They are judged over the seeds that all
models have; one seed can miss a goal but not meet it. No rate, form or stopping point was chosen by the test split, but the parts of a
hybrid were, by ablations on the test split of `earth`.""",
    newest=report.newest,
    n=seeds_of,
    variant=report.variant,
    tables=(
        Table(columns=model_columns, rows=report.models),
        Table(title="Test IoU by class", columns=class_columns, rows=lambda rows: [row for row in report.models(rows) if "iou" in row]),
        Table(
            title="Every variant",
            columns=columns("source, budget, model, variant, validation, admitted by=admission, test mIoU=test, ms:.2f"),
            rows=report.variants,
            paged=False,
        ),
        Table(
            title="Learning rates",
            columns=columns("source, budget, model, rate=learning_rate:g, held-out mIoU=held_out:.4f, steps, choice"),
            rows=report.rates,
            paged=False,
        ),
    ),
    goals=(
        goal("lead over the best peer less both standard deviations, points", "lead", at_least=0, form="{:.1f}"),
        goal("lead on earth, points", "earth", at_least=2, form="{:.1f}"),
        goal("time at the best peer's score, of that peer's", "best", at_most=1 / 4, form="{:.0%}"),
        goal("time at the best peer's score, of the fastest peer's", "fastest", at_most=1 / 2, form="{:.0%}"),
    ),
    blocks={"claim": report.claim},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
