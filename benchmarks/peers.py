"""Compare muntin's hybrids with common segmenters: the same data, crops, loop and budget, each deployed in its own best way.

    python benchmarks/peers.py [--sources earth earth:climate earth:shore | --recipe RECIPE.yaml] [--models NAME ...] [--seeds 0 1 2]
                               [--minutes 4] [--samples N] [--output runs/benchmark-peers] [--json]

Peers: segmentation_models_pytorch's Linknet-resnet18, PAN-mobilenet_v2, Unet-resnet18, FPN-efficientvit_b0, FPN-mobilenetv4_conv_small,
Segformer-mit_b0 and DeepLabV3+-efficientnet-b0; YOLO26n-sem where the package ultralytics is installed (AGPL-3.0).
All models start from random weights and are trained by `muntin fit` with the
demonstration's recipe: crops, augmentation, loss, optimiser (Muon and AdamW), schedule, averaged weights and BF16 are the same code
(DeepLabV3+ trains in FP32 on CPUs, see `check_maps`). --recipe names a recipe of yours, with your own pictures (`muntin init` writes one).
This command replaces its model, rate, precision, threads and length of training. Two budgets, each with tables of its own (either or both
may be given):
    --minutes   wall-clock minutes of training; the learning rate falls with the time that is left
    --samples   crops seen
A hybrid's stages of compression (low rank, W4A8, mixed precision) are inside its budget, so its FP32 training is shorter than a peer's;
the entries ending in -ptq spend all of it on FP32 training and are quantised afterwards, as the peers are. Quantising after training and
export count for none. The learning rate is tuned alike for each model and source: three of them, the whole budget in FP32 each, seed 0,
scored on a region of the training split that is left out for it, Africa and Europe, of folders on every fifth picture
(`segmentation_peers/tuning.py`); as long as the best is the highest or the lowest, twice or half of it is tried, too, two more at the most.

Deployed: OpenVINO in f32 and in bf16; peers also in INT8 by NNCF, hybrids in W4A8 after the stages or in muntin's own INT8. For each seed
the fastest variant at the first of --sides is taken whose score is within half a point of f32. That score is of the validation split, which
is a strip of ocean without a desert, together with four strips of the training split, which have every class (all variants were trained on
them; a hybrid's stages train on them longer than its f32). With folders it is of the validation split alone. Calibration sees training
crops only, and the test split chooses nothing. Columns:
    test mIoU   of the deployed models, whole test split, mean ± standard deviation over the seeds
    ms SIDE     median latency of one image, pixels in and scores out: all models of a seed in one process, in turns; mean over the seeds
    min, crops  minutes and crops of training; im/s of FP32 training; M parameters as trained; MB on disk as deployed; rate as tuned
Below it the IoU of each class, every variant (a hybrid's float ones, too), and the goals, which are judged by the seeds that all models
have, those of score by two of them or more. Beside the rows lies a picture of each source.

Existing rows are not measured again, and training that was interrupted by Ctrl-C continues (a search of rates starts again).
Rows of another machine, or of another recipe or other threads, are refused. A model that fails is left out with the reason, and is tried
again the next time.
Needs `pip install '.[bench]'` from a checkout. Time: a model and a source take six to eight times --minutes for three seeds (three to five
rates, three trainings), and a few minutes for timing, NNCF and scoring. Run it alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from kept import MACHINE, now, write_whole
from muntin.data import open_source
from muntin.data.config import SourceName
from muntin.errors import MuntinError, RecipeError
from muntin.models import PRESETS
from muntin.runtime import describe_hardware
from muntin.training.precision import resolve_precision
from muntin.training.recipe import Recipe
from options import at_least
from resumed import network_of
from segmentation_peers.budget import Budget, Interrupted, Setting, base_recipe, recipe_for, train_whole
from segmentation_peers.deployment import Variant, deploy, parameters_of, score_variants
from segmentation_peers.latency import image_of, measure_latency
from segmentation_peers.models import ENTRIES, Entry
from segmentation_peers.report import Row, admitted, draw, judge, print_tables, summarise
from segmentation_peers.tuning import held_out_score

SOURCES = tuple(name for name in get_args(SourceName) if name.startswith("earth"))
RATES = (2e-3, 4e-3, 8e-3)
FURTHER = 2
"""Rates beyond an end of these, at the most, as long as the best one is there."""
SEARCH_SEED = 0
"""Seed of the trainings that search for a rate."""
PROTOCOL = 6
"""Version of the rows. 2: the schedule keeps the minutes, and rates are chosen on strips of the training split. 3: training by Muon. 4:
crops are also flipped upside down. 5: a search continues beyond an end of its rates, and variants are also judged on land. 6: rates are
chosen with the whole budget on a region that is left out, instead of a quarter of it on strips beside the training data."""
SMALLEST = 128
"""Side in pixels, of crops and of images: PAN takes no smaller ones."""
PACKAGES = {"segmentation-models-pytorch": "segmentation_models_pytorch", "timm": "timm", "nncf": "nncf"}
"""Packages of the extra `bench`, with their modules."""


class Refused(Exception):  # noqa: N818 - of a row, said in one line
    """A row cannot be compared with what this run measures."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One source under one budget, and the folder of its rows. `rounds`: timed calls of each model and size."""

    setting: Setting
    budget: Budget
    sides: tuple[int, ...]
    rounds: int
    folder: Path

    def row(self, name: str, make: Callable[[], Row], entry: Entry | None = None) -> Row:
        """The row that is there, or a new one. Raises `Refused` for one of another machine, setting, or preset of that name."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            row: Row = json.loads(path.read_text(encoding="utf-8"))
            if changed := differences(row["machine"], json.loads(json.dumps(self._machine(entry)))):
                raise Refused(f"{path} was measured with {'; '.join(changed)}: give another --output")
            return row
        row = {**make(), "created": now(), "machine": self._machine(entry)}
        write_whole(path, row)
        return row

    def _machine(self, entry: Entry | None) -> Row:
        hardware = describe_hardware()
        structure = network_of(entry.model) if entry is not None and entry.model in PRESETS else {}
        return {
            "protocol": PROTOCOL,
            **{key: hardware.get(key) for key in MACHINE},
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            **self.setting.identity,
            **structure,
        }

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
            recipe = recipe_for(entry, self.setting, self.budget, seed=SEARCH_SEED, learning_rate=rate, stages=False)
            row = {"model": entry.model, "learning_rate": rate}
            shutil.rmtree(place, ignore_errors=True)  # of a search that was interrupted
            try:
                score, steps = held_out_score(recipe, place, root=self.setting.root)
            except MuntinError as error:
                if type(error) is not MuntinError:  # its kinds are other troubles than a loss that is no longer finite
                    raise
                return {**row, "held_out": 0.0, "failed": str(error)}
            return {**row, "held_out": score, "steps": steps}

        row = self.row(name, make, entry)
        shutil.rmtree(place, ignore_errors=True)  # its weights are of no use any more
        return row

    def model(self, entry: Entry, seed: int) -> Row:
        """Trained, deployed in every form, and scored; the forms stay on disk, to be timed beside the other models'."""
        name = f"model-{entry.name}-{seed}"
        place = self.folder / name

        def make() -> Row:
            rate = best_rate(self.searched(entry))["learning_rate"]
            recipe = recipe_for(entry, self.setting, self.budget, seed=seed, learning_rate=rate, stages=entry.way == "stages")
            checkpoint, compressed, figures = train_whole(entry, recipe, place / "run", self.setting.root)
            forms = deploy(entry, checkpoint, compressed, place)
            return {
                "model": entry.name, "source": self.setting.source, "budget": self.budget.name, "seed": seed, "learning_rate": rate,
                **figures,
                "parameters": parameters_of(checkpoint), "forms": {form: str(path.relative_to(place)) for form, path in forms.items()},
                "variants": score_variants(forms, checkpoint, threads=self.setting.threads),
            }  # fmt: skip

        row = self.row(name, make, entry)
        shutil.rmtree(place / "run", ignore_errors=True)  # several times what is deployed, and many runs come together
        return row

    def latency(self, rows: list[Row], seed: int) -> Row:
        """Every variant of a seed's models at the first size, and at all sizes the one that is deployed: timed together or not at all.

        Anew where there are other models or sizes, another number of rounds, or a model that was made after it.
        """
        models = [row["model"] for row in rows]
        path = self.folder / f"latency-{seed}.json"
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            others = not set(models) <= set(there["chosen"]) or list(there["ms"]) != [str(side) for side in self.sides]
            older = any(row["created"] > there["created"] for row in rows)
            if others or older or there.get("rounds") != self.rounds:
                path.unlink()
        return self.row(path.stem, lambda: self._timed(rows, seed))

    def _timed(self, rows: list[Row], seed: int) -> Row:
        variants = {}
        for row in rows:
            place = self.folder / f"model-{row['model']}-{seed}"
            for name, variant in row["variants"].items():
                variants[row["model"], name] = Variant(path=place / row["forms"][variant["form"]], precision=variant["precision"])
        first, *others = self.sides
        source = open_source(self.setting.recipe.data, root=self.setting.root)
        all_ms = measure_latency(variants, image_of(source, first), threads=self.setting.threads, rounds=self.rounds)
        chosen = {row["model"]: min(admitted(row["variants"]), key=lambda name: all_ms[row["model"], name]) for row in rows}
        ms = {str(first): {model: all_ms[model, name] for model, name in chosen.items()}}
        for side in others:
            timed = measure_latency(
                {item: variants[item] for item in chosen.items()}, image_of(source, side), threads=self.setting.threads, rounds=self.rounds
            )
            ms[str(side)] = {model: value for (model, _), value in timed.items()}
        by_model = {row["model"]: {name: all_ms[row["model"], name] for name in row["variants"]} for row in rows}
        return {"seed": seed, "rounds": self.rounds, "chosen": chosen, "ms": ms, "variants": by_model}

    def run(self, entries: list[Entry], seeds: list[int]) -> Row:
        """All rows, what they say, and a picture of it."""
        rows: list[Row] = []
        latencies: dict[int, Row] = {}
        left_out: list[str] = []
        for seed in seeds:
            mine = []
            for entry in entries:
                print(f"{self.budget.name}, {self.setting.source}, seed {seed}: {entry.name}", file=sys.stderr)
                try:
                    mine.append(self.model(entry, seed))
                except (Interrupted, Refused):
                    raise
                except Exception as error:  # noqa: BLE001 - NNCF's own kinds have no other base; it is told, and other models go on
                    left_out.append(f"{entry.name}, seed {seed}: {type(error).__name__}: {error}")
                    print(f"left out  {left_out[-1]}", file=sys.stderr)
            if mine:
                latencies[seed] = self.latency(mine, seed)
            rows += mine
        summary = summarise(rows, latencies)
        common = seeds_of_all(rows)
        goals = judge(summarise([row for row in rows if row["seed"] in common], latencies), self.setting.source)
        picture = self.folder / "pareto.png"
        if summary:
            draw(summary, picture, title=f"{self.setting.source}, {self.budget.told}, seeds {', '.join(map(str, seeds))}")
        rates = [
            tried
            for entry in {ENTRIES[row["model"]].model: ENTRIES[row["model"]] for row in rows}.values()
            for tried in self.searched(entry)
        ]
        return {
            "source": self.setting.source, "budget": asdict(self.budget), "summary": summary, "goals": goals,
            "goal_seeds": common,
            "rates": rates, "rows": rows, "latencies": list(latencies.values()), "left_out": left_out, "picture": str(picture),
        }  # fmt: skip


def differences(there: Row, now: Row, where: str = "") -> list[str]:
    """List the settings in which an existing row differs from the present ones."""
    found: list[str] = []
    for key, value in now.items():
        name, before = f"{where}{key}", there.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += differences(before, value, f"{name}.")
        elif before != value:
            found.append(f"{name} {before} (now {value})")
    return found


def best_rate(rows: list[Row]) -> Row:
    """Return the row of the rate with the best score on the held-out data."""
    return max(rows, key=lambda row: float(row["held_out"]))


def at_an_end(rates: list[Row]) -> list[str]:
    """The models whose best rate is the lowest or the highest that was tried."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rates):
        tried = sorted((row for row in rates if row["model"] == model), key=lambda row: float(row["learning_rate"]))
        if best_rate(tried) in (tried[0], tried[-1]):
            found.append(model.rpartition(":")[2])
    return found


def seeds_of_all(rows: list[Row]) -> list[int]:
    """The seeds that every model has a row of: a model's mean over others says as much of the seeds as of the model."""
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["model"], set()).add(row["seed"])
    return sorted(set.intersection(*found.values())) if found else []


def recipes_of(given: argparse.Namespace) -> dict[str, Recipe]:
    """Return the recipes by name. Raises RecipeError for one that these models cannot be compared with."""
    sources = list(dict.fromkeys(given.sources)) if given.recipe is None else [given.recipe.stem]
    made = {source: base_recipe(given.recipe, source, crop=given.crop, batch_size=given.batch) for source in sources}
    for recipe in made.values():
        if recipe.task != "segment":
            raise RecipeError(f"recipe {recipe.name}: task {recipe.task}; all these models segment")
        if recipe.data.crop < SMALLEST:
            raise RecipeError(f"recipe {recipe.name}: data.crop {recipe.data.crop}: PAN takes no less than {SMALLEST}; give --crop")
        training, lowest = recipe.training, min(RATES) / 2**FURTHER
        if training.gate_budget < 1:
            raise RecipeError(f"recipe {recipe.name}: training.gate_budget {training.gate_budget:g}: peers have no gates; set it to 1")
        if training.compile:
            raise RecipeError(f"recipe {recipe.name}: training.compile: compiling would count as training, and differs from model to model")
        if training.final_learning_rate > lowest:
            raise RecipeError(
                f"recipe {recipe.name}: training.final_learning_rate {training.final_learning_rate:g}: rates from {lowest:g} on may be "
                "tried, and each falls to it; set it no higher"
            )
    return made if given.recipe is None else {f"recipe {recipe.name}": recipe for recipe in made.values()}


def precision_of(output: Path) -> str:
    """Return the precision of all training below `output`: FP32 on CPUs, where "auto" might choose another one for one model than for the
    rest.
    """
    path = output / "precision.json"
    if not path.is_file():
        write_whole(path, resolve_precision("auto", "cuda" if torch.cuda.is_available() else "cpu").name)
    return str(json.loads(path.read_text(encoding="utf-8")))


def print_comparison(found: Row, budget: Budget) -> None:
    print(f"\n{found['source']}, {budget.told}")
    print_tables(found["summary"], found["goals"])
    judged = ", ".join(map(str, found["goal_seeds"])) or "none, since there is none of all models"
    print(f"{'':<12}judged by the seeds {judged}")
    if edges := at_an_end(found["rates"]):
        print(f"{'':<12}the best rate is the lowest or the highest that was tried: {', '.join(edges)}")
    for line in found["left_out"]:
        print(f"{'left out':<12}{line}")
    print(f"{'picture':<12}{found['picture']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    data.add_argument("--recipe", type=Path, help="of yours, in place of the demonstration's and its sources; segmentation")
    parser.add_argument("--models", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="wall-clock minutes of training (4 unless --samples is given)")
    parser.add_argument("--samples", type=int, help="crops seen in training")
    parser.add_argument(
        "--sides", type=at_least(SMALLEST), nargs="+", default=[512, 1024], help="of the images that latency is measured on, pixels"
    )
    parser.add_argument("--rounds", type=at_least(1), default=30, help="timed calls of each model and size")
    parser.add_argument("--threads", type=at_least(1), default=2, help="of training and of the deployed models")
    parser.add_argument(
        "--crop", type=at_least(SMALLEST), help=f"side of the training crops, pixels (from {SMALLEST}; as in the recipe unless given)"
    )
    parser.add_argument("--batch", type=at_least(1), help="crops a step (as in the recipe unless given)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-peers"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    given = parser.parse_args()
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes {given.minutes:g}: give more than 0")
    try:
        recipes = recipes_of(given)
    except RecipeError as error:
        parser.error(str(error))
    batch = max(recipe.training.batch_size for recipe in recipes.values())
    if given.samples is not None and given.samples < batch:
        parser.error(f"--samples {given.samples}: a step takes {batch}: give more")
    if missing := [name for name, module in PACKAGES.items() if find_spec(module) is None]:
        sys.exit(f"{parser.prog}: {', '.join(missing)} missing: pip install '.[bench]'")
    minutes = 4.0 if given.minutes is None and given.samples is None else given.minutes
    budgets = [Budget(minutes=minutes)] if minutes is not None else []
    budgets += [Budget(samples=given.samples)] if given.samples is not None else []
    entries = [ENTRIES[name] for name in dict.fromkeys(given.models)]
    precision = precision_of(given.output)
    results: list[Row] = []
    for budget in budgets:
        for source, recipe in recipes.items():
            root = Path.cwd() if given.recipe is None else given.recipe.parent
            comparison = Comparison(
                setting=Setting(source=source, recipe=recipe, root=root, precision=precision, threads=given.threads),
                budget=budget, sides=tuple(dict.fromkeys(given.sides)), rounds=given.rounds,
                folder=given.output / budget.name / source.replace(":", "-").replace(" ", "-"),
            )  # fmt: skip
            try:
                results.append(comparison.run(entries, list(dict.fromkeys(given.seeds))))
            except Interrupted:
                sys.exit("interrupted; the same command goes on")
            except Refused as error:
                sys.exit(f"{parser.prog}: {error}")
            if not given.json:
                print_comparison(results[-1], budget)
    hardware = {**describe_hardware(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    hardware["created"] = now()
    if given.json:
        print(json.dumps({"benchmark": "peers", "hardware": hardware, "comparisons": results}, indent=1))
    else:
        where = [hardware["cpu"], f"{hardware['physical_cores']} cores", *hardware["features"], *hardware.get("gpus", ())]
        print(f"\n{', '.join(where)}; {hardware['created']}")


if __name__ == "__main__":
    main()
