"""Finding layers that another form cannot replace, by replacing each one with a form that computes the same.

A model may test the kind of a layer (`isinstance(layer, nn.Conv2d)`), read attributes that other forms lack, call it with more than its
input, or replace its forward (adapters of low rank, circular padding). So each layer becomes, for one call, a module of another kind with
the same weights, and the model's answers are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.quantization.quantized_layers import GEOMETRY
from muntin.compression.rewrite import computed_weight, failing
from muntin.models.eager import ModelInputs, call, tensors_of
from muntin.runtime.host.memory import no_memory

NOTICED = (
    "the model uses more of it than the result of its kind (it tests the kind, reads an embedding's weight, or its forward was replaced)"
)
"""Reason to keep a layer."""
TOLERANCE, ROUNDING = 1e-3, 1e-4
"""Maximum change of an answer by rounding, as a share of the largest distance of its values from their mean, and of the largest value."""


def irreplaceable(model: nn.Module, layers: Mapping[str, nn.Module], image: ModelInputs) -> dict[str, str]:
    """Reasons to keep the layers, by dotted name, that no other form can replace; the model is restored.

    `image`: one row of inputs. Costs three forward passes, and about 2·log2(layers) more for each such layer. Returns only layers with
    submodules if two answers of the model to the image differ, or if it fails.
    """
    possible = {name: layer for name, layer in layers.items() if name and computed_weight(layer) is None}
    holders = {name: "it holds modules of its own" for name, layer in possible.items() if any(True for _ in layer.children())}
    before = _answer(model, image)
    again = _answer(model, image)
    if before is None or again is None or not all_same(before, again):
        return holders
    disguises = [(name, _Disguise(layer)) for name, layer in possible.items() if name not in holders]
    try:
        return holders | {name: NOTICED for name, _ in failing(disguises, lambda pairs: _unnoticed(model, pairs, image, before))}
    finally:
        for _, disguise in disguises:
            disguise.off()


def _unnoticed(model: nn.Module, layers: Sequence[tuple[str, _Disguise]], image: ModelInputs, before: Sequence[Tensor]) -> bool:
    """Disguise layers. Returns False, and undoes it, if the answer changes; otherwise they stay disguised."""
    for _, disguise in layers:
        disguise.on()
    after = _answer(model, image)
    if after is not None and all_same(before, after):
        return True
    for _, disguise in layers:
        disguise.off()
    return False


class StandIn(nn.Module):
    """The class of a disguised layer: neither a Linear, a Conv2d nor an Embedding, with the same result."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = vars(self)[_KEY].compute(input)
        return out


_KEY = "_muntin_disguise"
_KNOWN = frozenset((*GEOMETRY, *vars(nn.Module())))
"""Attributes that integer forms have too."""


class _Disguise:
    """Turns a layer into a `StandIn` in its place, without the attributes that integer forms lack, and back."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._kind = layer, type(layer)
        self._hidden: dict[str, Any] = {}
        self._table = layer._parameters.get("weight") if isinstance(layer, nn.Embedding) else None

    def on(self) -> None:
        attributes = vars(self._layer)
        self._hidden = {key: attributes[key] for key in attributes if key not in _KNOWN}
        attributes[_KEY] = self
        object.__setattr__(self._layer, "__class__", StandIn)
        for key in self._hidden:
            del attributes[key]
        if self._table is not None:
            del self._layer._parameters["weight"]

    def off(self) -> None:
        attributes = vars(self._layer)
        if attributes.pop(_KEY, None) is None:
            return
        attributes.update(self._hidden)
        object.__setattr__(self._layer, "__class__", self._kind)
        if self._table is not None:
            self._layer._parameters["weight"] = self._table

    def compute(self, x: Tensor) -> Tensor:
        """The result of the layer's class, without a forward that was set on the instance."""
        self.off()
        attributes = vars(self._layer)
        replaced: dict[str, Any] = {key: attributes.pop(key) for key in ("forward", "_conv_forward") if key in attributes}
        try:
            out: Tensor = self._kind.forward(self._layer, x)
            return out
        finally:
            attributes.update(replaced)
            self.on()


def _answer(model: nn.Module, image: ModelInputs) -> list[Tensor] | None:
    """The tensors in a model's answer of any structure; None if it fails."""
    try:
        with torch.no_grad():
            answer = call(model, image)
    except Exception as error:
        if no_memory(error):
            raise
        return None
    return [part.clone() for part in tensors_of(answer)]  # a model may reuse its output tensor


def all_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return len(before) == len(after) and all(same(one, other) for one, other in zip(before, after, strict=True))


def same(before: Tensor, after: Tensor) -> bool:
    """Return True if two answers are equal up to rounding, with NaN and infinity in the same places."""
    if before.shape != after.shape:
        return False
    before, after = before.double(), after.double()
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(after)):
        return False
    if not finite.any():
        return True
    difference = float(torch.where(finite, before - after, 0).abs().max())
    largest, centred = (float(torch.where(finite, values, 0).abs().max()) for values in (before, before - before[finite].mean()))
    if before.numel() == 1:  # the mean is the value itself
        centred = largest
    return difference <= max(TOLERANCE * centred, ROUNDING * largest, 1e-12)
