"""Training, deployment and timing of the models of one data set: the same for ours and for their peers.

recipe with each model -> `muntin fit` at each of RATES for the whole minutes -> the one of the better validation score
    -> artifacts in floats and in INT8 (`muntin export`, calibrated on training crops), float layers in f32 and, if there are such
       kernels, in bf16 -> the fastest of them within half a point of float f32 on the validation split -> its score on the test split
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from documents import Row
from muntin.data import Samples
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import MuntinError
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, parse_recipe
from segmentation_peers.deployment import REFERENCE, Variant, admitted, bytes_of, measure_latency, parameters_of, precisions
from segmentation_peers.training import ENDLESS, train

RATES = (1e-3, 4e-3)
"""Learning rates that are tried with each model."""
THREADS, ROUNDS = 2, 30
"""Threads of training and of the deployed models; timed calls of each."""


def measure_models(
    data: str, base: Recipe, root: Path, contenders: Mapping[str, Row], *, seed: int, minutes: float, folder: Path, sides: Sequence[int]
) -> list[Row]:
    """A row a model of one data set. `contenders`: their `model` sections in a recipe. `sides`: of the timed image, pixels."""
    rows: list[Row] = []
    checkpoints: dict[str, Checkpoint] = {}
    variants: dict[tuple[str, str], Variant] = {}
    scores: dict[str, dict[str, float]] = {}
    for name, model in contenders.items():
        print(f"{data}, seed {seed}: {name}", file=sys.stderr)
        place = folder / data.replace(" ", "-") / name
        try:
            recipes = {f"run-{rate:g}": recipe_of(base, name, model, seed=seed, minutes=minutes, rate=rate) for rate in RATES}
            trained = [train(recipe, place / run, root) for run, recipe in recipes.items()]
            checkpoint = max(trained, key=lambda each: float(each.state.validation[-1]["score"]))
            forms = {form: export_checkpoint(checkpoint, place / form, integer=form == "int8").path for form in ("float", "int8")}
            mine = {f"{form} {kind}": Variant(path=path, precision=kind) for form, path in forms.items() for kind in precisions()}
            scores[name] = {variant: _score(each, checkpoint, "validation") for variant, each in mine.items()}
        except MuntinError as error:
            rows.append({"data": data, "model": name, "cannot": str(error)})
            continue
        checkpoints[name] = checkpoint
        variants |= {(name, variant): each for variant, each in mine.items()}
    if not checkpoints:
        return rows
    samples = source_of(next(iter(checkpoints.values()))).split("validation")
    times = {side: measure_latency(variants, _image(samples, side), threads=THREADS, rounds=ROUNDS) for side in sides}
    for name, checkpoint in checkpoints.items():
        chosen = min(admitted(scores[name]), key=lambda variant: times[sides[0]][name, variant])
        deployed, floats = variants[name, chosen], variants[name, REFERENCE]
        training, step = checkpoint.recipe.training, checkpoint.state.step
        rows.append({
            "data": data, "model": name,
            "quality": {"score": _score(deployed, checkpoint, "test"), "float score": _score(floats, checkpoint, "test")},
            "ms": {str(side): times[side][name, chosen] for side in sides},
            "mb": bytes_of(deployed.path) / 1e6, "parameters": parameters_of(checkpoint), "deployed": chosen,
            "learning_rate": training.learning_rate, "steps": step, "crops": step * training.batch_size,
            "variants": {key: {"validation": score, "ms": times[sides[0]][name, key]} for key, score in scores[name].items()},
        })  # fmt: skip
    return rows


def recipe_of(base: Recipe, name: str, model: Row, *, seed: int, minutes: float, rate: float) -> Recipe:
    """The base recipe with a model, its length and rate."""
    content = base.model_dump(mode="json") | {"name": name, "seed": seed, "model": model}
    content["training"] |= {
        "steps": ENDLESS, "minutes": minutes, "learning_rate": rate, "final_learning_rate": 0.0, "threads": THREADS,
        "validate_every": ENDLESS, "checkpoint_every": ENDLESS,
    }  # fmt: skip
    return parse_recipe(content, where=f"recipe of {name}")


def _score(variant: Variant, checkpoint: Checkpoint, split: Any) -> float:
    tile = tile_of(checkpoint.recipe.data.crop)
    return float(muntin.evaluate(variant.open(THREADS), source_of(checkpoint).split(split), tile=tile).score)


def _image(samples: Samples, side: int) -> NDArray[np.uint8]:
    """The corner of an image of the split, repeated and cut to `side` x `side`."""
    corner = samples[0].corner[:side, :side]
    repeats = (-(-side // corner.shape[0]), -(-side // corner.shape[1]), 1)
    return np.ascontiguousarray(np.tile(corner, repeats)[:side, :side])
