"""The classes of a task, and the names that a trained run's classes were given afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muntin.artifact.atomic_files import write_files
from muntin.errors import CheckpointError, DataError

Channel8 = Annotated[int, Field(ge=0, le=255)]
RENAMED = "renamed-classes.json"
"""File in a run's folder with the present names of its classes."""
_DEPTH = 7
"""Folders above a checkpoint in which its run is looked for: RUN/updates/1/compressed/trials/003/checkpoints is the deepest."""


class ClassInfo(BaseModel):
    """One class: name and colour (red, green, blue; 0-255)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    color: tuple[Channel8, Channel8, Channel8]


class RenamedClasses(BaseModel):
    """Content of `RENAMED`. `trained`: the names in training, by which the data are read. `classes`: the present names and colours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained: tuple[str, ...]
    classes: tuple[ClassInfo, ...]


def renamed(classes: Sequence[ClassInfo], names: Sequence[tuple[str, tuple[int, int, int] | None]]) -> tuple[ClassInfo, ...]:
    """Return the classes with other names, and colours where these are not None. Raises DataError for another number, or a name twice."""
    if not classes:
        raise DataError("the model restores images and has no classes to rename")
    if len(names) != len(classes):
        old = ", ".join(entry.name for entry in classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise DataError(f"{len(names)} classes are named, and the model has {len(classes)} ({old}): name as many, in their order")
    if repeated := [name for name, count in Counter(name for name, _ in names).items() if count > 1]:
        raise DataError(f"the class name {repeated[0]!r} is used twice: give each class its own name")
    return tuple(
        ClassInfo(name=name, color=old.color if color is None else color) for old, (name, color) in zip(classes, names, strict=True)
    )


def write_renamed(run: Path, trained: Sequence[ClassInfo], classes: Sequence[ClassInfo]) -> None:
    """Record the present names and colours of a run's classes, in place of an earlier record."""
    record = RenamedClasses(trained=tuple(entry.name for entry in trained), classes=tuple(classes))
    write_files(run, {RENAMED: record.model_dump_json(indent=1).encode() + b"\n"})


def present_classes(checkpoint: Path, trained: tuple[ClassInfo, ...]) -> tuple[ClassInfo, ...]:
    """Return the classes of a checkpoint with the names that its run has now. Classes that an update added keep theirs.

    The record of the nearest run around the checkpoint counts. Raises CheckpointError for one that is damaged or of other classes.
    """
    for folder in list(checkpoint.absolute().parents)[:_DEPTH]:
        file = folder / RENAMED
        if not (folder / "checkpoints").is_dir() or not file.is_file():
            continue
        try:
            record = RenamedClasses.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(f"{file}: damaged: remove it, and `muntin relabel` the run again") from error
        names = [entry.name for entry in trained]
        if names[: len(record.trained)] != list(record.trained) or len(record.classes) != len(record.trained):
            raise CheckpointError(
                f"{file}: renames other classes than the run was trained on: remove it, or `muntin relabel` the run again"
            )
        return (*record.classes, *trained[len(record.classes) :])
    return trained
