"""Checks before a search begins: what would fail hours later is refused."""

from __future__ import annotations

from pathlib import Path

from muntin.data import Source
from muntin.data.batches import small_picture_notes
from muntin.data.source import CheckProgress
from muntin.errors import RecipeError
from muntin.models import PRESETS, ModelConfig
from muntin.searching.space import Space
from muntin.training.recipe import Recipe
from muntin.training.teachers.opening import open_teacher
from muntin.training.teachers.unlabelled import check_unlabelled
from muntin.training.weights import new_model


def check_model(recipe: Recipe) -> None:
    """Raise `RecipeError` for a model that a search cannot vary."""
    model = recipe.model
    if model.name not in PRESETS:
        raise RecipeError(f"model {model.name}: a search changes muntin's own networks: give one of {', '.join(PRESETS)}")
    if model.encoder is not None:
        raise RecipeError(
            f"model.encoder {model.encoder}: a search varies the convolutions that an encoder replaces: leave it out, or take `muntin fit`"
        )
    if model.weights is not None:
        raise RecipeError(
            f"model.weights {model.weights}: the file suits one network, and a search trains networks of other widths: leave it out "
            "(--set model.weights=null)"
        )


def base_config(recipe: Recipe, source: Source) -> ModelConfig:
    """The configuration of a recipe's own model."""
    check_model(recipe)
    config = new_model(recipe, tuple(source.classes)).config
    assert isinstance(config, ModelConfig)
    return config


def check_gates(recipe: Recipe, space: Space, base: ModelConfig) -> None:
    """Raise `RecipeError` if gates are to close in networks that may have none."""
    budget = recipe.training.gate_budget
    if budget < 1 and not (base.gate and all(space.kinds("gate", base))):
        where = "the space" if "gate" in space.choices else "model.options"
        raise RecipeError(
            f"training.gate_budget {budget:g} with gate false in {where}: networks without channel gates cannot close any: leave out gate "
            "false, or set training.gate_budget=1"
        )


def check_data(recipe: Recipe, source: Source, root: Path, progress: CheckProgress) -> list[str]:
    """Open every picture and the teacher once; returns notes on the data. Raises kinds of `MuntinError` for the first problem."""
    open_teacher(recipe, tuple(source.classes), root)
    checked = [*source.check(progress), *check_unlabelled(recipe, root, progress)]
    return [*source.notes, *checked, *small_picture_notes(source.split("train"), task=recipe.task, crop=recipe.data.crop)]
