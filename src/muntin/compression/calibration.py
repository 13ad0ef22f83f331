"""Calibration: the batches, the ranges of the inputs of operations, and checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from muntin.errors import MuntinError
from muntin.graph.grids import RangeObserver
from muntin.models.eager import ModelInputs, batch_rows, inputs_of, tensors_of, watch_inputs

LARGEST_CALIBRATION = 512
"""Rows, such as images, that are read of a DataLoader. A list is used whole."""


def calibration_list(calibration: Iterable[ModelInputs], model: nn.Module | None = None) -> list[ModelInputs]:
    """The batches as a list, without empty ones unless all are empty. Raises `MuntinError` if there is no batch, or one holds no tensor.

    With `model`, labels are dropped (`inputs_of`), so that a DataLoader of (x, y) serves. Of an iterable that is no sequence, such as a
    DataLoader or an endless generator, only its first batches are read, until they hold `LARGEST_CALIBRATION` rows.
    """
    if isinstance(calibration, Tensor | Mapping) or not isinstance(calibration, Iterable):
        raise MuntinError(f"calibration is a {type(calibration).__name__}: give an iterable of batches, such as a list with it")
    batches: list[ModelInputs] = []
    rows = 0
    for given in calibration:
        batch = dict(given) if isinstance(given, Mapping) else given if model is None else _without_labels(given, model)
        if not tensors_of(batch):
            raise MuntinError(f"calibration: a batch ({type(batch).__name__}) holds no tensor: give tensors, tuples or dictionaries")
        batches.append(batch)
        rows += max(batch_rows(batch), 1)
        if rows >= LARGEST_CALIBRATION and not isinstance(calibration, Sequence):
            break
    if not batches:
        raise MuntinError("calibration: there is no batch; give at least one batch of training images")
    return [batch for batch in batches if all(tensor.numel() for tensor in tensors_of(batch))] or batches


def _without_labels(batch: ModelInputs, model: nn.Module) -> ModelInputs:
    try:
        return inputs_of(model, batch)
    except MuntinError as error:
        raise MuntinError(f"calibration: {error}") from error


def not_finite(name: str, error: ValueError) -> MuntinError:
    """The error for NaN or infinity at the input of layer `name`."""
    return MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images")


def observe(
    model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[ModelInputs]
) -> dict[str, tuple[RangeObserver, RangeObserver]]:
    """Observe the first and, if there is one, the second input of each operation, in two passes over the batches.

    Raises `MuntinError`, naming the operation, on NaN or infinity.
    """
    observers = {name: (RangeObserver(), RangeObserver()) for name in operations}

    def ranges(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            if not x.numel():
                continue
            try:
                observer.see_range(*(float(end) for end in torch.aminmax(x.detach().float())))
            except ValueError as error:
                raise not_finite(name, error) from error

    def values(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            if x.numel():
                observer.see_values(x.detach().float().cpu().numpy())

    watch_inputs(model, operations, batches, ranges)
    watch_inputs(model, operations, batches, values)
    return observers


def check_weights(layers: Mapping[str, nn.Module], *, done: str = "quantised") -> None:
    """Raise `MuntinError` for a layer whose weight holds NaN or infinity."""
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not torch.isfinite(weight).all():
            raise MuntinError(
                f"layer '{name}': the weight holds NaN or infinity; nothing can be {done} from it, train again or restore a checkpoint"
            )
