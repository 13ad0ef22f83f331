"""The recipe of a point of the front, a file from which `muntin fit` trains the network, and the commands that do it.

networks/NNN.yaml    all values of the search's recipe, with absolute paths, and the network's own
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from muntin.artifact.atomic_files import write_files
from muntin.searching.space import Architecture
from muntin.searching.study import StudyPoint
from muntin.tasks.folders import FolderPair
from muntin.training.recipe import Recipe, recipe_text

NETWORKS = "networks"
"""Folder of the recipes and runs of a search's networks."""


def place_name(point: StudyPoint) -> str:
    """Name of a point, of its recipe and of the folder of its run."""
    return f"{point.number + 1:03d}"


def network_recipe(recipe: Recipe, architecture: Architecture, options: dict[str, Any], name: str) -> Recipe:
    """The recipe with the name, the crop and the model of an architecture. `options`: fields that the architecture changes."""
    model = recipe.model.model_copy(update={"options": {**recipe.model.options, **options}})
    return recipe_of(recipe.model_copy(update={"model": model, "name": name}), architecture)


def recipe_of(recipe: Recipe, architecture: Architecture) -> Recipe:
    """A recipe with the crop of an architecture's resolution."""
    if architecture.resolution == 1:
        return recipe
    crop = max(8, round(architecture.resolution * recipe.data.crop))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"crop": crop})})


def write_recipes(folder: Path, recipes: Iterable[Recipe], *, root: Path) -> None:
    """Write the recipes of some networks into `folder`, by their names. `root`: where relative paths of the recipes start."""
    files = {f"{recipe.name}.yaml": recipe_text(recipe.model_copy(update=_absolute(recipe, root))).encode() for recipe in recipes}
    if files:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, files)


def commands(folder: Path, name: str) -> str:
    """The commands that train and export a network of `write_recipes`."""
    run = str(folder / name)
    return " && ".join(map(shlex.join, (["muntin", "fit", str(folder / f"{name}.yaml"), "-o", run], ["muntin", "export", run])))


def _absolute(recipe: Recipe, root: Path) -> dict[str, Any]:
    """The sections of a recipe that hold paths, with absolute ones."""

    def place(path: Path | None) -> Path | None:
        return None if path is None else root / path

    data, teacher = recipe.data, recipe.teacher
    changes: dict[str, Any] = {name: place(getattr(data, name)) for name in ("images", "masks", "targets")}
    changes["skip"] = tuple(root / path for path in data.skip)
    for name in ("validation", "test"):
        split = getattr(data, name)
        changes[name] = split.under(root) if isinstance(split, FolderPair) else split
    sections: dict[str, Any] = {"data": data.model_copy(update=changes)}
    if teacher is not None:
        model = str(root / teacher.model) if (root / teacher.model).is_dir() else teacher.model
        paths = {"weights": place(teacher.weights), "unlabelled": place(teacher.unlabelled)}
        sections["teacher"] = teacher.model_copy(update={"model": model, **paths})
    return sections
