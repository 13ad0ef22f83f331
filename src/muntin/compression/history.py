"""The changes that passes made to a model, kept on the model: a second run of a pass reads them, and `save` writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import nn

from muntin.errors import MuntinError
from muntin.models.compression_record import Change, PruningRecord

C = TypeVar("C", bound=BaseModel)
_CHANGES, _PRUNING = "_muntin_changes", "_muntin_pruning"
"""Attributes of the model, in its copies too."""


def history(model: nn.Module) -> tuple[Change, ...]:
    """The changes of all passes on this model, in order. A pass that left a layer as it was, once more, adds nothing."""
    changes: tuple[Change, ...] = vars(model).get(_CHANGES, ())
    return changes


def remember(model: nn.Module, changes: Iterable[Change]) -> list[Change]:
    """Add the changes of a pass to the history, and return them."""
    done = list(changes)
    before = history(model)
    known = set(before)
    vars(model)[_CHANGES] = (*before, *(change for change in done if change not in known))
    return done


def last_changes(model: nn.Module, pass_: str) -> dict[str, Change]:
    """The last change of each layer by a pass, by the layer's name."""
    return {change.layer: change for change in history(model) if change.pass_ == pass_}


def pruned_from(model: nn.Module) -> PruningRecord | None:
    """The model before its first pruning, or None."""
    record: PruningRecord | None = vars(model).get(_PRUNING)
    return record


def remember_pruning(model: nn.Module, record: PruningRecord | None) -> None:
    """Keep the record of a model before its first pruning on it."""
    vars(model)[_PRUNING] = record


def checked(config: type[C], **values: Any) -> C:
    """A section of a recipe made of a function's arguments. Raises `MuntinError`, with the argument's name, for values out of range."""
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise MuntinError(f"{name}={first['input']!r}: {message}" if name else message) from error
