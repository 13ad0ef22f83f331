"""Running a model over calibration images and watching what goes into its operations.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.observer import Observer
from muntin.errors import MuntinError

Watch = Callable[[str, nn.Module, tuple[Tensor, ...]], None]
"""Called with an operation's name, the operation and its inputs, before it runs."""


def calibration_list(calibration: Iterable[Tensor]) -> list[Tensor]:
    """The batches that came, without empty ones where others did; raises `MuntinError` where none did."""
    batches = list(calibration)
    if not batches:
        raise MuntinError("calibration: no batch came; give at least one batch of training images")
    return [batch for batch in batches if batch.numel()] or batches


def as_input(model: nn.Module, batch: Tensor) -> Tensor:
    """The batch where and as the model's weights are, or its buffers: a model whose layers are all quantised has no parameters."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return batch.to(tensor.device, tensor.dtype)
    return batch.to(torch.float32)


def watch_inputs(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[Tensor], watch: Watch) -> None:
    """Run the batches `(B, C, H, W)`, raw pixels, through the model without gradients, and show `watch` what each operation is given."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda operation, inputs, by_name: watch(name, operation, (*inputs, *by_name.values()))

    handles = [operation.register_forward_pre_hook(hook(name), with_kwargs=True) for name, operation in operations.items()]
    try:
        with torch.no_grad():  # not inference mode: what a model keeps of a call by itself is used with gradients, perhaps
            for batch in batches:
                model(as_input(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, tuple[Observer, Observer]]:
    """Two passes over the batches: an observer of the first input of each operation and one of the second, where it has two.

    Raises `MuntinError`, naming the operation, on NaN or infinity.
    """
    observers = {name: (Observer(), Observer()) for name in operations}

    def ranges(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            try:
                observer.see_range(x)
            except ValueError as error:
                raise MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images") from error

    def values(name: str, operation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for observer, x in zip(observers[name], inputs, strict=False):
            observer.see_values(x)

    watch_inputs(model, operations, batches, ranges)
    watch_inputs(model, operations, batches, values)
    return observers


def check_weights(layers: Mapping[str, nn.Module], *, done: str = "quantised") -> None:
    """Raises `MuntinError` for a layer whose weight holds NaN or infinity."""
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not torch.isfinite(weight).all():
            raise MuntinError(
                f"layer '{name}': the weight holds NaN or infinity; nothing can be {done} from it, train again or restore a checkpoint"
            )
