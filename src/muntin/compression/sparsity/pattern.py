"""N:M sparsity of a layer's weight: which places stay, the pattern noted on the layer, and its zeros, held while the layer is trained.

At each tap of a kernel, at most N of M neighbouring inputs are not zero. The places that may change are read from the zeros of the weight,
so no mask is stored.

Axes: O outputs, T taps of a kernel (1 of a Linear), I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.artifact.sparsity import GROUPS
from muntin.compression.rewrite import SPARSITY
from muntin.errors import MuntinError

_FORM = re.compile(r"(\d+):(\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """At most `kept` of `group` neighbouring inputs are not zero."""

    kept: int
    group: int

    @property
    def text(self) -> str:
        """The pattern as `parse_pattern` reads it: "2:4"."""
        return f"{self.kept}:{self.group}"

    def misfit(self, weight: Tensor) -> str | None:
        """Why a weight (O, I, ...) cannot have the pattern; None if it can."""
        return f"{weight.shape[1]} inputs are no multiple of {self.group}" if weight.shape[1] % self.group else None

    def mask(self, saliency_OTI: Tensor) -> Tensor:
        """The places that stay, bool, of the shape of the saliencies (>= 0): those with the largest in each group."""
        groups = saliency_OTI.reshape(*saliency_OTI.shape[:2], -1, self.group)
        order = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., : self.kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(2)

    def held(self, weight: Tensor) -> Tensor | None:
        """The places of a weight (O, I, ...) that may change without leaving the pattern, bool; None if the pattern does not hold.

        In groups with fewer than `kept` values, the first zeros count as values.
        """
        if self.misfit(weight) is not None:
            return None
        weight_OTI = taps_first(weight.detach())
        mask = self.mask((weight_OTI != 0).to(torch.float32))
        return None if bool((weight_OTI[~mask] != 0).any()) else taps_last(mask, weight)


def parse_pattern(text: str) -> Pattern:
    """Read "2:4", "4:8" or another N:M. Raises `MuntinError` for one that the artefact does not record: N above M/2, other M."""
    form = _FORM.fullmatch(text) if isinstance(text, str) else None
    n, m = map(int, form.groups()) if form is not None else (0, 0)
    if m not in GROUPS or not 0 < 2 * n <= m:
        raise MuntinError(f"pattern={text!r}: give N:M, such as '2:4', with M of {', '.join(map(str, GROUPS))}, and N from 1 to M/2")
    return Pattern(kept=n, group=m)


def taps_first(weight: Tensor) -> Tensor:
    """A weight (O, I) or (O, I, H, W) as (O, T, I)."""
    return weight.flatten(2).transpose(1, 2) if weight.ndim > 2 else weight[:, None]


def taps_last(weight_OTI: Tensor, like: Tensor) -> Tensor:
    """Inverse of `taps_first`, in the shape of `like`."""
    return weight_OTI.transpose(1, 2).reshape(like.shape)


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
