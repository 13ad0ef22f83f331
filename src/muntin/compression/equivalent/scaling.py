"""Moving positive factors of channels from a layer's output into the weights of the layers that read it.

    y / s = source with rows / s,   W y = (W · s) (y / s)

Axes: C channels between the layers, O outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muntin.compression.quantization.fake_quantization import along
from muntin.compression.replaceability import all_same
from muntin.compression.rewrite import failing
from muntin.models.eager import ModelInputs, call, tensors_of

MOST = 32.0
"""Maximum factor of a channel, and its inverse the minimum."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """The outputs of `source` (a Linear, a convolution or the affine part of a norm) are divided by `factors`, `(C,)`, and its readers'
    columns multiplied."""

    source: nn.Module
    readers: tuple[nn.Linear | nn.Conv2d, ...]
    factors: Tensor

    @torch.no_grad()
    def apply(self) -> None:
        for parameter in self.source.parameters(recurse=False):  # rows of a weight, and a bias
            parameter.div_(along(self.factors, parameter.ndim, 0).to(parameter.dtype))
        for reader in self.readers:
            reader.weight.mul_(columns(reader, self.factors).to(reader.weight.dtype))


def columns(layer: nn.Linear | nn.Conv2d, factor_C: Tensor) -> Tensor:
    """The factors of input channels, in the shape of a weight: (O, C of a group) and ones."""
    groups = getattr(layer, "groups", 1)
    outputs = layer.weight.shape[0]
    rows = factor_C.reshape(groups, 1, -1).expand(-1, outputs // groups, -1).reshape(outputs, -1)
    return rows.reshape(*rows.shape, *(1,) * (layer.weight.ndim - 2))


def scale(model: nn.Module, scalings: Sequence[Scaling], batch: ModelInputs) -> list[Scaling]:
    """Apply scalings in place, and return those that were undone because the answer to a batch changed by more than rounding.

    Costs two forward passes, and about 2·log2(scalings) more for each that is undone.
    """
    if not scalings:
        return []
    with torch.no_grad():
        before = [part.clone() for part in tensors_of(call(model, batch))]
    return failing(scalings, lambda some: _applied_if_same(model, some, batch, before))


@torch.no_grad()
def _applied_if_same(model: nn.Module, scalings: Sequence[Scaling], batch: ModelInputs, before: Sequence[Tensor]) -> bool:
    layers = {id(layer): layer for one in scalings for layer in (one.source, *one.readers)}
    kept = [(parameter, parameter.clone()) for layer in layers.values() for parameter in layer.parameters(recurse=False)]
    same = False
    try:
        for one in scalings:
            one.apply()
        same = all_same(before, tensors_of(call(model, batch)))
    finally:
        if not same:
            for parameter, value in kept:
                parameter.copy_(value)
    return same
