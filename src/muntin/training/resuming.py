"""The checkpoint that a run goes on from, and what a recipe may change on the way.

A run goes on by the recipe that it was begun with, bit for bit, or by one in which keys of `training` differ that say how the state is
trained further, and not what it is of: a loss that has left the numbers is mended by a lower learning rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.errors import CheckpointError
from muntin.training.checkpoint import Checkpoint, checkpoints_in, read_checkpoint
from muntin.training.recipe import Recipe

FIXED = ("gate_budget",)
"""Keys of `training` that hold for all of a run: what gates have closed stays closed."""


def find_start(directory: Path, recipe: Recipe, *, resume: bool) -> Checkpoint | None:
    """The newest checkpoint of a run, None where there is none. Raises `CheckpointError` for one that was not asked for (`resume`), and
    for one whose recipe differs in more than `changes` tells."""
    folder = directory / "checkpoints"
    if not checkpoints_in(folder):
        return None
    if not resume:
        raise CheckpointError(f"{directory} already holds a run; --resume goes on with it, another --output starts anew")
    checkpoint = read_checkpoint(folder)
    other = _difference(_fixed(checkpoint.recipe), _fixed(recipe))
    if other:
        raise CheckpointError(
            f"{checkpoint.path} was trained by another recipe ({other}), and on the way only keys of training, except "
            f"{', '.join(FIXED)}, may change: give its recipe to resume, or another --output to start anew"
        )
    return checkpoint


def changes(start: Checkpoint, recipe: Recipe) -> str:
    """What a recipe changes on the way in a run that goes on from `start`, with both values; empty for nothing."""
    return _difference(_content(start.recipe), _content(recipe))


def _content(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")  # where a tuple is the list it is read as


def _fixed(recipe: Recipe) -> dict[str, Any]:
    content = _content(recipe)
    return {**content, "training": {key: content["training"][key] for key in FIXED}}


def _difference(trained: Any, given: Any, where: str = "") -> str:
    """The first values that two recipes disagree in, three of a part at most."""
    if isinstance(trained, dict) and isinstance(given, dict):
        keys = [key for key in {**trained, **given} if trained.get(key) != given.get(key)]
        shown = ", ".join(_difference(trained.get(key), given.get(key), f"{where}.{key}".lstrip(".")) for key in keys[:3])
        return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"{where} was {trained!r:.60}, is {given!r:.60}"
