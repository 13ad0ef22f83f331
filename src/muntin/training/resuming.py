"""The checkpoint that a run goes on from, and whether it is of the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muntin.errors import CheckpointError
from muntin.training.checkpoint import Checkpoint, checkpoints_in, read_checkpoint
from muntin.training.recipe import Recipe


def find_start(directory: Path, recipe: Recipe, *, resume: bool) -> Checkpoint | None:
    """The newest checkpoint of a run, None where there is none. Raises `CheckpointError` for one that was not asked for (`resume`), and
    for one that another recipe trained."""
    folder = directory / "checkpoints"
    if not checkpoints_in(folder):
        return None
    if not resume:
        raise CheckpointError(f"{directory} already holds a run; --resume goes on with it, another --output starts anew")
    checkpoint = read_checkpoint(folder)
    trained, given = checkpoint.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")  # where a tuple is the list it is read as
    if trained != given:
        raise CheckpointError(
            f"{checkpoint.path} was trained by another recipe ({_difference(trained, given)}); "
            "give its recipe to resume, or another --output to start anew"
        )
    return checkpoint


def _difference(trained: Any, given: Any, where: str = "") -> str:
    """The first values that two recipes disagree in, at most three."""
    if isinstance(trained, dict) and isinstance(given, dict):
        keys = [key for key in {**trained, **given} if trained.get(key) != given.get(key)]
        return ", ".join(_difference(trained.get(key), given.get(key), f"{where}.{key}".lstrip(".")) for key in keys[:3])
    return f"{where} was {trained!r:.60}, is {given!r:.60}"
