"""Compress hybrid-m on `earth` within an accuracy budget: muntin's search, each pass alone, the three stages, and a small network.

    python benchmarks/budget_hybrid.py [--budgets 0.005 0.01 0.02] [--seeds 3] [--fit 660] [--trials 8] [--steps 480]
                                       [--only muntin channels ...] [--set training.batch_size=8 ...]
                                       [--output runs/benchmark-budget-hybrid] [--json]

The recipe is that of the demonstration with hybrid-m and `--fit` steps. Every contender has `--steps` training steps, shared evenly among
its candidates, chooses by the mean IoU of its artefacts on the validation part, and is judged on the test part:
    muntin          `muntin compress --max-drop`: widths, ranks and bits by tables
    bits, ranks, channels       the same search among uniform bits, the same share of each rank, or widths alone (the last two with INT8)
    one stage       muntin's plan again, with all the steps in one training
    stages, cumulative stages   the recipe's three stages, with ranks by its criterion or by the cumulative energy of each weight
    scratch         a HybridNet whose INT8 artefact has the bytes of muntin's, trained for the seconds of FP32 and muntin's search together
The last four know no budget: their drop is what it is. Columns: drop on validation and test, parameters of the artefact, bytes and how many
times fewer than FP32's weights, milliseconds, minutes of the contender. Run it alone: hours on two cores. A row that is measured already is
not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import muntin
from kept import Row, kept_row, now
from muntin.artifact import open_artifact
from muntin.budgeting.forms.layer_forms import KEPT, layer_forms, offered_ranks
from muntin.budgeting.forms.plans import Form, Plan
from muntin.budgeting.run import compress_run
from muntin.compression.stages import compress_checkpoint
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.deployment.layer_rows import deployed_sizes
from muntin.runtime import describe_hardware
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import read_checkpoint
from muntin.training.checkpoint import checkpoints_in, source_of
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.recipe import Recipe, load_recipe, override_recipe
from muntin.training.weights import new_model
from options import at_least

PROTOCOL = 1
"""Version of the rows."""
MODEL = "hybrid-m"
SEARCHED = ("muntin", "one stage", "scratch", "bits", "ranks", "channels")
"""Contenders for each budget, in the order in which they are measured."""
STAGES = {"stages": "activation", "cumulative stages": "cumulative"}
"""Contenders that know no budget, and the criterion of their ranks."""
FOLLOWING = ("one stage", "scratch")
"""Contenders that need muntin's row."""
SIDE = 512
"""Of the picture whose latency is measured."""
SMALL: tuple[dict[str, Any], ...] = tuple(
    {"stem": [stem, 2 * stem, 4 * stem], "pairs": [0, 1], "dims": dims, "depths": depths, "decoder": 4 * stem, "latents": 16}
    for stem in (8, 12, 16)
    for dims, depths in (([128], [2]), ([128], [4]), ([128, 128], [2, 2]), ([192, 192], [2, 2]), ([256, 256], [2, 2]), ([256, 256], [4, 2]))
)
"""Networks of which one is trained from scratch."""


@dataclass(frozen=True)
class Uniform:
    """Plans from one list, the mildest first, with a limit of harm for each."""

    width: float
    plans: Sequence[Plan]

    def propose(self, limit: float) -> Plan | None:
        fitting = [plan for plan in self.plans if plan.harm <= limit]
        return min(fitting, key=lambda plan: plan.cost) if fitting else None


def uniform(kind: str, width: float, model: nn.Module, batches: Any, *_: Any) -> Uniform:
    """The plans of a pass alone: 16, 8, 6, 5, 4 and 3 bits; 8 bits with shares of the greatest rank that saves parameters; or 8 bits."""
    layers = layer_forms(model, batches).layers
    bits = (KEPT, 8, 6, 5, 4, 3) if kind == "bits" else (8,)
    shares = (None, 0.7, 0.5, 0.35, 0.25, 0.15) if kind == "ranks" else (None,)
    plans = []
    for share in shares:
        for bit in bits:
            forms = {name: _form(layer.layer, layer.forms, share, bit) for name, layer in layers.items()}
            cost = sum(layers[name].forms[form].bytes for name, form in forms.items())
            plans.append(Plan(width=width, forms=forms, harm=10.0 ** (len(plans) - 6), cost=cost))
    return Uniform(width, plans)


def _form(layer: Any, forms: Any, share: float | None, bits: int) -> Form:
    ranks = offered_ranks(layer) if share is not None else []
    rank = min(ranks, key=lambda one: abs(one - (share or 1) * ranks[0])) if ranks else None
    return next(form for form in (Form(rank, bits), Form(None, bits), Form(None, KEPT)) if form in forms)


class Bench:
    """The FP32 run of a seed, and its contenders."""

    def __init__(self, recipe: Recipe, seed: int, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.recipe = override_recipe(recipe, [f"seed={seed}"])
        started = time.perf_counter()
        _fit(self.recipe, folder / "fp32")
        self.fp32 = read_checkpoint(folder / "fp32")
        self.fp32_seconds = time.perf_counter() - started
        source = source_of(self.fp32)
        self.parts = {"validation": source.split("validation"), "test": source.split("test")}

    def reference(self) -> Row:
        artifact = export_checkpoint(self.fp32, self.folder / "float", integer=False)
        minutes = float(self.fp32.state.seconds) / 60
        return {**self._judged(artifact.path), "minutes": minutes}

    def search(self, name: str, max_drop: float) -> Row:
        """muntin's search, or a pass alone."""
        widths = [1, 0.8, 0.6, 0.5, 0.4, 0.3] if name == "channels" else [1] if name in ("bits", "ranks") else [1, 0.8, 0.6]
        trials = self.settings["trials"]
        changes = [f"budget.trials={trials}", f"budget.steps={self.settings['steps'] // trials}", f"budget.widths={widths}"]
        return self._compressed(name, max_drop, changes, {} if name == "muntin" else {"plans": partial(uniform, name)})

    def one_stage(self, max_drop: float, made: dict[str, Row]) -> Row:
        """The plan that muntin's search chose, trained in one go."""
        found = made["muntin"]
        forms = {name: Form(*form) for name, form in found["forms"].items()}
        plan = Plan(width=found["width"], forms=forms, harm=1.0, cost=1.0)

        def plans(width: float, *_: Any) -> Uniform:
            return Uniform(width, [plan] if width == plan.width else [replace(plan, width=width, harm=1e9)])

        changes = ["budget.trials=1", f"budget.steps={self.settings['steps']}", "budget.widths=[1]"]
        return self._compressed("one-stage", max_drop, changes, {"plans": plans})

    def _compressed(self, name: str, max_drop: float, changes: list[str], options: dict[str, Any]) -> Row:
        checkpoint = replace(self.fp32, state=self.fp32.state.model_copy(update={"recipe": override_recipe(self.recipe, changes)}))
        started, folder = time.perf_counter(), self.folder / f"{name}-{max_drop:g}"
        result = compress_run(checkpoint, muntin.Budget(max_drop=max_drop, confidence=None), folder, **options)
        best, held = result.best, result.holdout
        assert best is not None and held is not None
        return {
            **self._judged(result.artifact.path), "outcome": result.outcome, "width": best.plan.width, "interval": held.interval,
            "forms": {layer: [form.rank, form.bits] for layer, form in best.plan.forms.items()}, "trials": len(result.trials),
            "minutes": (time.perf_counter() - started) / 60,
        }  # fmt: skip

    def stages(self, criterion: str) -> Row:
        share = self.settings["steps"] / self.settings["fit"]
        shares = {"recover": 0.4, "quantize": 0.1, "mix": 0.5}
        changes = [f"compression.{stage}.share={part * share:g}" for stage, part in shares.items()]
        if criterion == "cumulative":  # the article's: by the energy of each weight, without a budget of multiply-adds
            changes.append("compression.low_rank={criterion: cumulative, threshold: 0.95}")
        config = override_recipe(self.recipe, changes).compression
        started = time.perf_counter()
        run = compress_checkpoint(self.fp32, self.folder / f"stages-{criterion}", config=config, resume=True)
        if run.interrupted or run.stop_requested:
            raise SystemExit("interrupted: the same command goes on")
        last = read_checkpoint(run.checkpoint)
        artifact = export_checkpoint(last, self.folder / f"stages-{criterion}-artifact")
        record = last.state.compression
        return {
            **self._judged(artifact.path), "outcome": "no budget", "record": None if record is None else record.model_dump(mode="json"),
            "minutes": (time.perf_counter() - started) / 60,
        }  # fmt: skip

    def scratch(self, max_drop: float, made: dict[str, Row]) -> Row:
        """A small network whose bytes are those of muntin's artefact, trained for the minutes of FP32 and the search."""
        found, minutes = made["muntin"], made["fp32"]["minutes"] + made["muntin"]["minutes"]
        sizes = {index: self._integer_bytes(options) for index, options in enumerate(SMALL)}
        fitting = [index for index, size in sizes.items() if size <= found["bytes"]] or [min(sizes, key=lambda index: sizes[index])]
        options = SMALL[max(fitting, key=lambda index: sizes[index])]
        changes = ["model.name=hybrid-s", f"model.options={json.dumps(options)}"]
        changes += [f"training.minutes={minutes:.3f}", "training.steps=1000000"]
        recipe = override_recipe(self.recipe, changes)
        _fit(recipe, self.folder / f"scratch-{max_drop:g}")
        checkpoint = read_checkpoint(self.folder / f"scratch-{max_drop:g}")
        artifact = export_checkpoint(checkpoint, self.folder / f"scratch-{max_drop:g}-artifact")
        return {
            **self._judged(artifact.path), "outcome": "no budget", "options": options, "minutes": minutes,
        }  # fmt: skip

    def _integer_bytes(self, options: dict[str, Any]) -> int:
        recipe = override_recipe(self.recipe, ["model.name=hybrid-s", f"model.options={json.dumps(options)}"])
        model = new_model(recipe, self.fp32.state.classes)
        return sum(one.numel() for one in model.parameters()) + 60_000  # graph, manifest and golden pairs

    def _judged(self, path: Path) -> Row:
        session, tile = muntin.load(path), tile_of(self.recipe.data.crop)
        scores = {part: evaluate(session, samples, tile=tile).score for part, samples in self.parts.items()}
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return {"path": str(path.relative_to(self.folder)), "bytes": size, **scores}


def _fit(recipe: Recipe, folder: Path) -> None:
    result = muntin.fit(recipe, directory=folder, resume=bool(checkpoints_in(folder / "checkpoints")))
    if result.interrupted or result.stop_requested:
        raise SystemExit("interrupted: the same command goes on")


def measure(seed: int, arguments: argparse.Namespace, settings: dict[str, Any], recipe: Recipe, machine: Row) -> dict[str, dict[str, Row]]:
    """The rows of a seed: by budget and contender."""
    folder = arguments.output.resolve() / str(seed)
    bench = Bench(recipe, seed, folder, settings)
    keep = partial(kept_row, settings=settings, hardware=machine)
    shared = {"fp32": keep(folder / "fp32.json", measure=bench.reference)}
    shared |= {
        name: keep(folder / f"{name.replace(' ', '-')}.json", measure=partial(bench.stages, criterion))
        for name, criterion in STAGES.items()
        if name in arguments.only
    }
    rows: dict[str, dict[str, Row]] = {}
    for budget in arguments.budgets:
        made = dict(shared)
        works: dict[str, Callable[[], Row]] = {
            "muntin": partial(bench.search, "muntin", budget), "one stage": partial(bench.one_stage, budget, made),
            "scratch": partial(bench.scratch, budget, made),
            **{name: partial(bench.search, name, budget) for name in ("bits", "ranks", "channels")},
        }  # fmt: skip
        for name in (name for name in SEARCHED if name in arguments.only):
            made[name] = keep(folder / f"{name.replace(' ', '-')}-{budget:g}.json", measure=works[name])
            _tell(seed, budget, name, made[name], shared["fp32"])
        names = "-".join(made).replace(" ", "-")
        timed = keep(folder / f"latency-{budget:g}-{names}.json", measure=partial(_timed, folder, made, arguments.rounds))
        counted = {name: deployed_sizes(open_artifact(folder / row["path"])) for name, row in made.items()}
        rows[f"{budget:g}"] = {
            name: {**row, "ms": timed["ms"][name], "parameters": counted[name]["params"], "gmacs": counted[name]["gmacs"]}
            for name, row in made.items()
        }  # fmt: skip
    return rows


def _timed(folder: Path, made: dict[str, Row], rounds: int) -> Row:
    picture = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    latencies = interleaved_latency({name: muntin.load(folder / row["path"]) for name, row in made.items()}, picture, rounds=rounds)
    return {"ms": {name: latency.median_ms for name, latency in latencies.items()}}


def _tell(seed: int, budget: float, name: str, row: Row, fp32: Row) -> None:
    drop = fp32["test"] - row["test"]
    print(f"seed {seed}, budget {budget:g}, {name}: drop {drop:+.4f} at {row['bytes'] / 1e6:.3f} MB", file=sys.stderr, flush=True)


def print_table(rows: dict[str, dict[str, list[Row]]], hardware: Row) -> None:
    fp32 = next(iter(rows.values()))["fp32"]
    weights = 4 * fp32[0]["parameters"]
    print(f"{MODEL}: test mIoU {statistics.mean(row['test'] for row in fp32):.4f} in FP32, weights {weights / 1e6:.2f} MB")
    head = {"drop, validation": 18, "drop, test": 18, "parameters": 12, "MB": 8, "smaller": 9, "ms": 8, "minutes": 9}
    print(f"{'budget':<8}{'contender':<19}{''.join(f'{title:>{width}}' for title, width in head.items())}")
    for budget, contenders in rows.items():
        for name, seeds in contenders.items():
            drops = [[base[part] - row[part] for base, row in zip(fp32, seeds, strict=True)] for part in ("validation", "test")]
            size = statistics.mean(row["bytes"] for row in seeds)
            print(
                f"{budget:<8}{name:<19}{_over(drops[0]):>18}{_over(drops[1]):>18}{seeds[0]['parameters']:>12,}{size / 1e6:>8.3f}"
                f"{weights / size:>9.1f}"
                f"{statistics.mean(row['ms'] for row in seeds):>8.2f}{statistics.mean(row['minutes'] for row in seeds):>9.1f}"
            )
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def _over(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f}" + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--fit", type=at_least(1), default=660, help="training steps of FP32")
    parser.add_argument("--trials", type=at_least(1), default=8, help="most candidates of a search")
    parser.add_argument("--steps", type=at_least(1), default=480, help="training steps of a contender, all its candidates together")
    every = [*SEARCHED, *STAGES]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="CONTENDER", help=", ".join(every))
    parser.add_argument("--set", nargs="+", default=[], dest="changes", help="values of the recipe to replace")
    parser.add_argument("--rounds", type=at_least(1), default=40, help="of latency")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-budget-hybrid"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    if "muntin" not in arguments.only and (following := [name for name in FOLLOWING if name in arguments.only]):
        parser.error(f"--only {following[0]!r} needs muntin's plan: add muntin")
    machine = describe_hardware()
    changes = [f"model.name={MODEL}", f"training.steps={arguments.fit}", *arguments.changes]
    recipe = load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", changes)
    settings = {"fit": arguments.fit, "trials": arguments.trials, "steps": arguments.steps, "protocol": PROTOCOL}
    settings["recipe"] = recipe.model_dump(mode="json")
    rows: dict[str, dict[str, list[Row]]] = {}
    for seed in range(arguments.seeds):
        for budget, contenders in measure(seed, arguments, settings, recipe, machine).items():
            for name, row in contenders.items():
                rows.setdefault(budget, {}).setdefault(name, []).append(row)
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "budget_hybrid", "hardware": hardware, "settings": settings, "rows": rows}, indent=1))
    else:
        print_table(rows, hardware)


if __name__ == "__main__":
    main()
