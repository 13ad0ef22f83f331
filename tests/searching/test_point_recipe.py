"""Recipes of the points of a front: the same training and data from another folder, and the commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from muntin.data import open_source
from muntin.models import ModelConfig
from muntin.searching.point_recipe import commands, network_recipe, write_recipes
from muntin.searching.space import Architecture
from muntin.training import Recipe, load_recipe

ONE = Architecture(config=ModelConfig())


def written(recipe: Recipe, one: Architecture, folder: Path, root: Path) -> Recipe:
    write_recipes(folder, [network_recipe(recipe, one, {"depths": [2, 1]}, "005")], root=root)
    return load_recipe(folder / "005.yaml")


def test_recipe_in_another_folder(tiny: Any, tmp_path: Path) -> None:
    changes = [
        "training.minutes=2",
        "training.steps=77",
        "data.skip=[train/images/train-0.png]",
        "teacher={model: train, unlabelled: more}",
    ]
    recipe = load_recipe(tiny.recipe, changes)
    found = written(recipe, ONE, tmp_path / "networks", tiny.root)
    assert found.training == recipe.training and found.model.options == {**recipe.model.options, "depths": [2, 1]}
    assert found.compression == recipe.compression and found.data.crop == recipe.data.crop
    here, there = (
        open_source(recipe.data, task=recipe.task, root=tiny.root),
        open_source(found.data, task=found.task, root=tmp_path / "networks"),
    )
    for split in ("train", "validation", "test"):
        assert here.split(split).names() == there.split(split).names()
    assert len(there.split("train")) == 3
    assert found.teacher is not None and found.teacher.model == str(tiny.root / "train")
    assert found.teacher.unlabelled == tiny.root / "more" and found.teacher.weights is None


def test_crop_of_a_resolution(tiny: Any, tmp_path: Path) -> None:
    found = written(load_recipe(tiny.recipe), replace(ONE, resolution=0.5), tmp_path, tiny.root)
    assert found.data.crop == 16


def test_commands() -> None:
    fit = "muntin fit 'my runs/005.yaml' -o 'my runs/005'"
    assert commands(Path("my runs"), "005") == f"{fit} && muntin export 'my runs/005'"
