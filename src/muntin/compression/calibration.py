"""Calibration: the batches, the ranges of the inputs of operations, and checks for NaN and infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from muntin.compression.quantization.observer import Observer
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, tensors_of, watch_inputs


def calibration_list(calibration: Iterable[ModelInputs]) -> list[ModelInputs]:
    """The batches as a list, without empty ones unless all are empty. Raises `MuntinError` if there is no batch, or one holds no tensor."""
    if isinstance(calibration, Tensor | Mapping) or not isinstance(calibration, Iterable):
        raise MuntinError(f"calibration is a {type(calibration).__name__}: give an iterable of batches, such as a list with it")
    batches: list[ModelInputs] = [dict(batch) if isinstance(batch, Mapping) else batch for batch in calibration]
    if not batches:
        raise MuntinError("calibration: there is no batch; give at least one batch of training images")
    for batch in batches:
        if not tensors_of(batch):
            raise MuntinError(f"calibration: a batch ({type(batch).__name__}) holds no tensor: give tensors, tuples or dictionaries")
    return [batch for batch in batches if all(tensor.numel() for tensor in tensors_of(batch))] or batches


def not_finite(name: str, error: ValueError) -> MuntinError:
    """The error for NaN or infinity at the input of layer `name`."""
    return MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images")


def observe(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[ModelInputs]) -> dict[str, tuple[Observer, Observer]]:
    """Observe the first and, if there is one, the second input of each operation, in two passes over the batches.

    Raises `MuntinError`, naming the operation, on NaN or infinity.
    """
    observers = {name: (Observer(), Observer()) for name in operations}

    def ranges(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            try:
                observer.see_range(x)
            except ValueError as error:
                raise not_finite(name, error) from error

    def values(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            observer.see_values(x)

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
