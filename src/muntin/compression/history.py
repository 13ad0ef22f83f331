"""Records of passes on a model: their changes, which a second run of a pass reads and `save` writes, and their calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import nn

from muntin.errors import MuntinError
from muntin.models.compression_record import Change, PruningRecord
from muntin.models.eager import ModelInputs

ALREADY = "already "
"""Beginning of the reason of a change that kept a layer because an earlier run of the pass had changed it."""
C = TypeVar("C", bound=BaseModel)
_CHANGES, _PRUNING, _BATCHES = "_muntin_changes", "_muntin_pruning", "_muntin_batches"
"""Attributes of the model, in its copies too."""


def history(model: nn.Module) -> tuple[Change, ...]:
    """The changes of all passes on this model, in order. A pass that left a layer as it was, once more, adds nothing."""
    changes: tuple[Change, ...] = vars(model).get(_CHANGES, ())
    return changes


def remember(model: nn.Module, changes: Iterable[Change]) -> list[Change]:
    """Add the changes of a pass to the history, and return them. That a layer has its form already (`ALREADY`) is not added."""
    done = list(changes)
    before = history(model)
    known = set(before)
    new = (change for change in done if change not in known and not change.reason.startswith(ALREADY))
    vars(model)[_CHANGES] = (*before, *new)
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


class _Batches(tuple[ModelInputs, ...]):
    """Batches that copies of a model share, and that are not pickled with it."""

    def __deepcopy__(self, memo: Any) -> _Batches:
        return self

    def __reduce__(self) -> Any:
        return _Batches, ()


def remember_calibration(model: nn.Module, batches: Sequence[ModelInputs]) -> None:
    """Keep the calibration batches of a pass on the model and its copies in this process, so that export can calibrate with them."""
    vars(model)[_BATCHES] = _Batches(batches)


def remembered_calibration(model: nn.Module) -> list[ModelInputs]:
    """The batches of `remember_calibration`; none after the model was saved and loaded."""
    return list(vars(model).get(_BATCHES, ()))


def checked(config: type[C], **values: Any) -> C:
    """A section of a recipe made of a function's arguments. Raises `MuntinError`, with the argument's name, for values out of range."""
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise MuntinError(f"{name}={first['input']!r}: {message}" if name else message) from error
