"""Linears with a factor for each input channel before them, for inputs that other operations read too, as in a residual sum after a norm.

    x -> Linear   becomes   x · (1 / s) -> Linear with columns · s

Engines compute the factors and the rounding to 8 bits in one pass.

Axes: C input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from muntin.compression.equivalent.scaling import columns
from muntin.compression.replaceability import all_same
from muntin.compression.rewrite import SPARSITY, failing, named, replace
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, call, tensors_of


class ScaledLinear(nn.Module):
    """A Linear, `linear`, after a factor for each of its inputs, `factors` `(C,)`."""

    factors: Tensor

    def __init__(self, layer: nn.Linear, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors.to(layer.weight.device, layer.weight.dtype))
        self.linear: nn.Module = layer

    @property
    def in_features(self) -> int:
        """Number of inputs, as of the Linear."""
        return len(self.factors)

    @property
    def out_features(self) -> int:
        """Number of outputs, as of the Linear."""
        return cast(int, self.linear.out_features)

    @property
    def weight(self) -> Tensor:
        """The weight for inputs without factors, computed at each access: some models read a layer's weight for its type."""
        weight = self.linear.weight
        assert isinstance(weight, Tensor)
        return weight * self.factors

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's parameter name
        out: Tensor = self.linear(input * self.factors)
        return out


def insert_factors(model: nn.Module, groups: Mapping[str, Sequence[str]], scales: Mapping[str, Tensor], batch: ModelInputs) -> list[str]:
    """Divide the inputs of the Linears of each group by the group's scale `(C,)`, in place.

    Returns the groups that were left as they are because the answer to a batch changed by more than rounding. Costs two forward passes, and
    about 2·log2(groups) more for each of these, and a copy of each Linear.
    """
    if not scales:
        return []
    layers = {name: model.get_submodule(name) for group in scales for name in groups[group]}
    with torch.no_grad():
        before = [part.clone() for part in tensors_of(call(model, batch))]

    @torch.no_grad()
    def unchanged(some: Sequence[str]) -> bool:
        names = [(name, scales[group]) for group in some for name in groups[group]]
        for name, scale_C in names:
            layer = layers[name]
            assert isinstance(layer, nn.Linear)
            weight = layer.weight * columns(layer, scale_C).to(layer.weight.dtype)
            replace(model, name, ScaledLinear(_linear(layer, weight), 1 / scale_C))
        if all_same(before, tensors_of(call(model, batch))):
            return True
        for name, _ in names:
            replace(model, name, layers[name])
        return False

    return failing(list(scales), unchanged)


def _linear(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A Linear with another weight and the same bias. Hooks stay with the layer, of whose place `replace` moves them."""
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.weight, new.bias = nn.Parameter(weight, requires_grad=layer.weight.requires_grad), layer.bias
    if SPARSITY in vars(layer):
        vars(new)[SPARSITY] = vars(layer)[SPARSITY]
    return new


def factor_structure(model: nn.Module) -> tuple[str, ...]:
    """The names of the Linears with factors, for a record."""
    return tuple(name for name, _ in named(model, ScaledLinear))


def apply_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Put factors of 1 before the Linears of a record, in place; load the weights next. Raises `MuntinError` for another name."""
    layers = dict(named(model, nn.Linear))
    for name in names:
        if name not in layers:
            raise MuntinError(f"factors: '{name}' is no Linear of the model: build the model that was saved")
        layer = layers[name]
        replace(model, name, ScaledLinear(_linear(layer, layer.weight.detach()), torch.ones(layer.in_features)))
