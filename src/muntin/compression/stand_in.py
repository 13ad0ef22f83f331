"""Which layers another form can stand in for: found by letting one stand in that computes the same.

A model may go by what kind a layer is (`isinstance(layer, nn.Conv2d)`), read of it what other forms do not have, call it with more than its
input, or have its forward replaced (adapters of low rank, padding that wraps around). Whatever form took the layer's place, the model would
compute something else, and nothing in the layer's weights says so. So each layer is replaced by a module of another kind with the same
weights and the same sum, and the model is asked whether it notices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.compression.calibration import as_input
from muntin.compression.quantized import keep_geometry
from muntin.compression.rewrite import computed_weight, replace
from muntin.runtime.memory import no_memory

NOTICED = "the model does not use it by what its kind computes alone (it asks for the kind, or its forward was replaced)"
"""Why a layer has no other form."""
TOLERANCE, ROUNDING = 1e-3, 1e-5
"""Largest change of an answer that rounding may explain: a share of how far its values lie from their mean, or of the largest of them: what
an offset leaves of float32."""


def irreplaceable(model: nn.Module, layers: Mapping[str, nn.Module], image: Tensor) -> dict[str, str]:
    """The layers, by dotted name, whose place no other form can take, and why; `model` is left as it was.

    `image`: one, `(1, C, H, W)`. Costs three forward passes, and for each layer that is found about 2·log2(layers) times more. Where the
    model answers an image each time otherwise, or fails, nothing can be told, and none is found.
    """
    possible = {name: layer for name, layer in layers.items() if name and computed_weight(layer) is None}
    holders = {name: "it holds modules of its own" for name, layer in possible.items() if any(True for _ in layer.children())}
    before = _answer(model, image)
    again = _answer(model, image)
    if before is None or again is None or not all_same(before, again):
        return holders
    asked = [(name, layer) for name, layer in possible.items() if name not in holders]
    return holders | dict.fromkeys(_noticed(model, asked, image, before), NOTICED)


def _noticed(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], image: Tensor, before: Sequence[Tensor]) -> list[str]:
    """Of these layers those that cannot be stood in for: all at once, or each half of them by itself."""
    if not layers:
        return []
    for name, layer in layers:
        replace(model, name, StandIn(layer))
    try:
        after = _answer(model, image)
    finally:
        for name, layer in layers:
            replace(model, name, layer)
    if after is not None and all_same(before, after):
        return []
    if len(layers) == 1:
        return [layers[0][0]]
    half = len(layers) // 2
    return _noticed(model, layers[:half], image, before) + _noticed(model, layers[half:], image, before)


class StandIn(nn.Module):
    """Computes what a Linear or a Conv2d of these weights computes, and is neither. Has what the integer forms have."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        keep_geometry(self, layer)
        self.weight, self.bias = layer.weight, layer.bias
        self._compute = _kinds_own(layer)

    def forward(self, input: Tensor) -> Tensor:
        return self._compute(input)


def _kinds_own(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What its kind computes, whatever was put in the place of its own forward. (Of a subclass is asked elsewhere whether that is what it
    computes.)"""
    if isinstance(layer, nn.Conv2d) and type(layer) is nn.Conv2d:
        return lambda x: nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)
    return lambda x: type(layer).forward(layer, x)


def _answer(model: nn.Module, image: Tensor) -> list[Tensor] | None:
    """The tensors in a model's answer, whatever it is packed into; None where it fails."""
    try:
        with torch.no_grad():
            answer = model(as_input(model, image))
    except Exception as error:
        if no_memory(error):
            raise
        return None
    return [part for part in _pytree.tree_leaves(answer) if isinstance(part, Tensor)]


def all_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return len(before) == len(after) and all(same(one, other) for one, other in zip(before, after, strict=True))


def same(before: Tensor, after: Tensor) -> bool:
    """Whether two answers are one but for rounding; where NaN or infinity was, there it must be."""
    if before.shape != after.shape:
        return False
    before, after = before.double(), after.double()
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(after)):
        return False
    if not finite.any():
        return True
    difference = torch.where(finite, before - after, 0).abs().max()
    largest, centred = (torch.where(finite, values, 0).abs().max() for values in (before, before - before[finite].mean()))
    return bool(difference <= max(TOLERANCE * float(centred), ROUNDING * float(largest), 1e-12))
