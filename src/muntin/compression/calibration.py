"""Running a model over calibration images and recording the inputs of its operations.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.quantization.observer import Observer
from muntin.errors import MuntinError

Watch = Callable[[str, nn.Module, tuple[Tensor, ...]], None]
"""Called with an operation's name, the operation and its inputs, before the operation runs."""


def calibration_list(calibration: Iterable[Tensor]) -> list[Tensor]:
    """The batches as a list, without empty ones unless all are empty. Raises `MuntinError` if there is no batch."""
    batches = list(calibration)
    if not batches:
        raise MuntinError("calibration: there is no batch; give at least one batch of training images")
    return [batch for batch in batches if batch.numel()] or batches


def as_input(model: nn.Module, batch: Tensor) -> Tensor:
    """The batch on the device and in the type of the model's weights, or of its buffers if all layers are quantised."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return batch.to(tensor.device, tensor.dtype)
    return batch.to(torch.float32)


def watch_inputs(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[Tensor], watch: Watch) -> None:
    """Run the batches `(B, C, H, W)`, raw pixels, through the model without gradients; call `watch` before each operation."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda operation, inputs, by_name: watch(name, operation, (*inputs, *by_name.values()))

    handles = [operation.register_forward_pre_hook(hook(name), with_kwargs=True) for name, operation in operations.items()]
    run(model, batches, handles)


def run(model: nn.Module, batches: Sequence[Tensor], handles: Sequence[Any]) -> None:
    """Run the batches through the model without gradients, then remove the hooks `handles`."""
    try:
        with torch.no_grad():  # tensors of inference mode that the model keeps could not be trained
            for batch in batches:
                model(as_input(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def not_finite(name: str, error: ValueError) -> MuntinError:
    """The error for NaN or infinity at the input of layer `name`."""
    return MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images")


def observe(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, tuple[Observer, Observer]]:
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
