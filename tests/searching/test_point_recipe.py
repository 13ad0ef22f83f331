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
    write_recipes(folder, [(network_recipe(recipe, one, {"depths": [2, 1]}, "005"), one)], root=root)
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


def test_ranks_and_bits(tiny: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe, ["compression.low_rank={criterion: energy, threshold: 0.9}"])
    low = written(recipe, replace(ONE, rank_share=0.6), tmp_path, tiny.root).compression
    assert low.low_rank is not None and low.low_rank.parameters == 0.6 and low.low_rank.threshold is None
    eight = written(recipe, replace(ONE, bits=8), tmp_path, tiny.root).compression
    assert (eight.low_rank, eight.weight_bits, eight.average_bits) == (None, 8, 8)


def test_commands() -> None:
    folder = Path("my runs")
    fit = "muntin fit 'my runs/005.yaml' -o 'my runs/005'"
    export = "muntin export 'my runs/005/compressed"
    assert commands(folder, "005", ONE) == f"{fit} && muntin export 'my runs/005'"
    low, both = replace(ONE, rank_share=0.6), replace(ONE, rank_share=0.6, bits=4)
    assert commands(folder, "005", low) == f"{fit} && muntin compress 'my runs/005' --until low-rank && {export}/1-low-rank'"
    assert commands(folder, "005", both) == f"{fit} && muntin compress 'my runs/005' --until w4a8 && {export}/2-w4a8'"
