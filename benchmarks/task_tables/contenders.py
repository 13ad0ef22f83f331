"""Training, deployment and timing of the models of one data set: the same for ours and for their peers.

    recipe with each model -> `muntin fit` at each of RATES for the whole minutes -> the one of the better validation score
        -> artefacts in floats and in INT8 (`muntin export`, calibrated on training crops), float layers in f32 and, if there are such
           kernels, in bf16 -> the fastest of them within LOSS of float f32 on the validation split -> its score on the test split

The test split chooses nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from kept import Row
from muntin.data import Samples
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import MuntinError
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, parse_recipe
from segmentation_peers.budget import ENDLESS, Interrupted, train
from segmentation_peers.deployment import Variant, parameters_of, precisions
from segmentation_peers.latency import measure_latency

RATES = (1e-3, 4e-3)
"""Learning rates that are tried with each model."""
LOSS = 0.005
"""Allowed loss of the score on the validation split, beside floats."""
REFERENCE = "float f32"
THREADS, ROUNDS = 2, 30
"""Threads of training and of the deployed models; timed calls of each."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model by its name in the table, and its `model` section in a recipe."""

    name: str
    model: dict[str, Any]


def recipe_of(base: Recipe, contender: Contender, *, seed: int, minutes: float, rate: float) -> Recipe:
    """The base recipe with a model, its length and rate."""
    content = base.model_dump(mode="json") | {"name": contender.name, "seed": seed, "model": contender.model}
    content["training"] |= {
        "steps": ENDLESS, "minutes": minutes, "learning_rate": rate, "final_learning_rate": 0.0, "threads": THREADS,
        "validate_every": ENDLESS, "checkpoint_every": ENDLESS,
    }  # fmt: skip
    return parse_recipe(content, where=f"recipe of {contender.name}")


def measure_models(
    data: str, base: Recipe, root: Path, contenders: Sequence[Contender], *, seed: int, minutes: float, folder: Path, sides: Sequence[int]
) -> list[Row]:
    """A row a model of one data set. `sides`: of the picture that latency is measured on, pixels."""
    rows: list[Row] = []
    made: dict[str, tuple[Checkpoint, dict[str, Variant], dict[str, float]]] = {}
    for contender in contenders:
        print(f"{data}, seed {seed}: {contender.name}", file=sys.stderr)
        place = folder / data.replace(" ", "-") / contender.name
        try:
            checkpoint = _best_of_rates(base, contender, root, seed=seed, minutes=minutes, folder=place)
            variants = _deployed(checkpoint, place)
            scores = {name: _score(variant, checkpoint, "validation") for name, variant in variants.items()}
            made[contender.name] = checkpoint, variants, scores
        except Interrupted:
            sys.exit("interrupted; the same command goes on")
        except MuntinError as error:
            rows.append({"data": data, "model": contender.name, "cannot": str(error)})
    if not made:
        return rows
    times = _latencies({name: variants for name, (_, variants, _) in made.items()}, next(iter(made.values()))[0], sides)
    for name, (checkpoint, variants, scores) in made.items():
        admitted = [variant for variant, score in scores.items() if score >= scores[REFERENCE] - LOSS]
        chosen = min(admitted, key=lambda variant: times[sides[0]][name, variant])
        quality = {"score": _score(variants[chosen], checkpoint, "test"), "float score": _score(variants[REFERENCE], checkpoint, "test")}
        training = checkpoint.recipe.training
        rows.append({
            "data": data, "model": name, "quality": quality, "ms": {str(side): times[side][name, chosen] for side in sides},
            "mb": _bytes(variants[chosen].path) / 1e6, "parameters": parameters_of(checkpoint), "deployed": chosen,
            "learning_rate": training.learning_rate, "steps": checkpoint.state.step, "crops": checkpoint.state.step * training.batch_size,
            "variants": {
                variant: {"validation": scores[variant], "ms": times[sides[0]][name, variant]} for variant in variants
            },
        })  # fmt: skip
    return rows


def _best_of_rates(base: Recipe, contender: Contender, root: Path, *, seed: int, minutes: float, folder: Path) -> Checkpoint:
    trained = [train(recipe_of(base, contender, seed=seed, minutes=minutes, rate=rate), folder / f"run-{rate:g}", root) for rate in RATES]
    return max(trained, key=lambda checkpoint: float(checkpoint.state.validation[-1]["score"]))


def _deployed(checkpoint: Checkpoint, folder: Path) -> dict[str, Variant]:
    forms = {form: export_checkpoint(checkpoint, folder / form, integer=form == "int8").path for form in ("float", "int8")}
    return {f"{form} {precision}": Variant(path=path, precision=precision) for form, path in forms.items() for precision in precisions()}


def _score(variant: Variant, checkpoint: Checkpoint, split: Any) -> float:
    recipe = checkpoint.recipe
    tile = tile_of(recipe.data.crop)
    return float(muntin.evaluate(variant.open(THREADS), source_of(checkpoint).split(split), tile=tile).score)


def _latencies(
    variants: dict[str, dict[str, Variant]], checkpoint: Checkpoint, sides: Sequence[int]
) -> dict[int, dict[tuple[str, str], float]]:
    """Median ms of every variant of all models, in turns, by side."""
    everything = {(name, variant): one for name, of_model in variants.items() for variant, one in of_model.items()}
    samples = source_of(checkpoint).split("validation")
    return {side: measure_latency(everything, _picture(samples, side), threads=THREADS, rounds=ROUNDS) for side in sides}


def _picture(samples: Samples, side: int) -> NDArray[np.uint8]:
    """A picture of the split, repeated and cut to `side` x `side`."""
    corner = samples[0].corner[:side, :side]
    repeats = (-(-side // corner.shape[0]), -(-side // corner.shape[1]), 1)
    return np.ascontiguousarray(np.tile(corner, repeats)[:side, :side])


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def missing(packages: dict[str, Callable[[], object]]) -> list[str]:
    """The packages, by pip's names, whose check raises ImportError or returns nothing."""
    absent = []
    for name, check in packages.items():
        try:
            found = check()
        except ImportError:
            found = None
        if not found:
            absent.append(name)
    return absent
