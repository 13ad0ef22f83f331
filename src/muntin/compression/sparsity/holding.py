"""The pattern of a sparse layer, kept on the layer, and its zeros, held while the layer is trained.

The places that may change are read from the zeros of the weight, so no mask is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.rewrite import SPARSITY
from muntin.compression.sparsity.patterns import Pattern, parse_pattern
from muntin.errors import MuntinError


def pattern_of(layer: nn.Module) -> Pattern | None:
    """The pattern that a layer was given; None for a dense one."""
    text: str | None = vars(layer).get(SPARSITY)
    return None if text is None else parse_pattern(text)


def set_pattern(layer: nn.Module, pattern: Pattern | None) -> None:
    """Note the pattern of a layer on it; None for a dense one. Copies and other forms of the layer have it, too."""
    vars(layer).pop(SPARSITY, None)
    if pattern is not None:
        vars(layer)[SPARSITY] = pattern.text


def sparse_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that were given a pattern, in whatever form, by dotted name."""
    return {name: module for name, module in model.named_modules() if SPARSITY in vars(module)}


def held_places(layer: nn.Module) -> Tensor | None:
    """The places of a layer's weight that may change, bool, of its shape; None for a dense layer, and where its pattern does not hold."""
    pattern, weight = pattern_of(layer), layer.weight if hasattr(layer, "weight") else None
    return pattern.held(weight) if pattern is not None and isinstance(weight, Tensor) else None


def check_held(model: nn.Module) -> None:
    """Raise `MuntinError` for a layer whose weight has left its pattern."""
    for name, layer in sparse_layers(model).items():
        if held_places(layer) is None:
            raise MuntinError(
                f"layer '{name}' was given the pattern {vars(layer)[SPARSITY]}, and its weight does not have it any more: call "
                "muntin.compression.hold_sparsity(model, optimizer) before training, and muntin.sparsify again now"
            )


class HeldZeros:
    """The zeros of layers with a pattern, as they are now. Costs a byte for each weight."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        for layer in layers:
            weight = layer._parameters.get("weight")
            if weight is not None and (places := held_places(layer)) is not None:
                self._held.append((weight, ~places))

    def of_gradients(self) -> None:
        """Set gradients to zero where the weights are held, in place."""
        for weight, zeros in self._held:
            if weight.grad is not None:
                weight.grad.masked_fill_(zeros, 0)

    @torch.no_grad()
    def of_weights(self) -> None:
        """Set the weights back to zero, in place."""
        for weight, zeros in self._held:
            weight.masked_fill_(zeros, 0)


def hold_sparsity(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keep the zeros of a sparse model in each step of an optimiser from now on, whatever optimiser it is. `distil` does it itself.

    Costs a pass over the sparse weights and their gradients each step. Raises `MuntinError` for a layer that has left its pattern.
    """
    check_held(model)
    zeros = HeldZeros(sparse_layers(model).values())

    def before(_: Any, args: Any, kwargs: Any) -> None:
        zeros.of_gradients()

    def after(_: Any, args: Any, kwargs: Any) -> None:
        zeros.of_weights()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def sparse_structure(model: nn.Module) -> dict[str, str]:
    """The patterns of the sparse layers, by dotted name, for a record. Raises like `check_held`."""
    check_held(model)
    return {name: vars(layer)[SPARSITY] for name, layer in sparse_layers(model).items()}


def apply_patterns(model: nn.Module, structure: Mapping[str, str]) -> None:
    """Note the patterns of a record on the layers; load the weights next. Raises `MuntinError` for a name that is no layer."""
    layers = dict(model.named_modules())
    for name, text in structure.items():
        if name not in layers or not hasattr(layers[name], "weight"):
            raise MuntinError(f"sparsity: '{name}' is no layer of the model: build the model that was saved")
        set_pattern(layers[name], parse_pattern(text))
