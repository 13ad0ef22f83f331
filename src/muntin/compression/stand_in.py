"""Which layers another form can stand in for: found by letting one stand in that computes the same.

A model may go by what kind a layer is (`isinstance(layer, nn.Conv2d)`), read of it what other forms do not have, call it with more than its
input, or have its forward replaced (adapters of low rank, padding that wraps around). Whatever form took the layer's place, the model would
compute something else, and nothing in the layer's weights says so. So each layer is replaced by a module of another kind with the same
weights and the same sum, for the time of a call, and the model is asked whether it notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.compression.calibration import as_input
from muntin.compression.quantized import GEOMETRY
from muntin.compression.rewrite import computed_weight
from muntin.runtime.memory import no_memory

NOTICED = "the model does not use it by what its kind computes alone (it asks for the kind, or its forward was replaced)"
"""Why a layer has no other form."""
TOLERANCE, ROUNDING = 1e-3, 1e-4
"""Largest change of an answer that rounding may explain: a share of how far its values lie from their mean, or of the largest of them: what
an offset, or many layers, leave of float32."""


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
    asked = [(name, _Disguise(layer)) for name, layer in possible.items() if name not in holders]
    try:
        return holders | dict.fromkeys(_noticed(model, asked, image, before), NOTICED)
    finally:
        for _, disguise in asked:
            disguise.off()


def _noticed(model: nn.Module, layers: Sequence[tuple[str, _Disguise]], image: Tensor, before: Sequence[Tensor]) -> list[str]:
    """Of these layers those that cannot be stood in for: all at once, or each half of them by itself. Of the others stand-ins stay in their
    places, so that what each changes by a little is not lost."""
    if not layers:
        return []
    for _, disguise in layers:
        disguise.on()
    after = _answer(model, image)
    if after is not None and all_same(before, after):
        return []
    for _, disguise in layers:
        disguise.off()
    if len(layers) == 1:
        return [layers[0][0]]
    half = len(layers) // 2
    return _noticed(model, layers[:half], image, before) + _noticed(model, layers[half:], image, before)


class StandIn(nn.Module):
    """What a layer is while it stands in for itself: neither a Linear nor a Conv2d, though it computes what one of these weights does."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = vars(self)[_KEY].compute(input)
        return out


_KEY = "_muntin_disguise"
_KNOWN = frozenset((*GEOMETRY, *vars(nn.Module())))
"""What integer forms have, too."""


class _Disguise:
    """Makes a layer a `StandIn` where it is, with what integer forms have and nothing else, and back again."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._kind = layer, type(layer)
        self._hidden: dict[str, Any] = {}

    def on(self) -> None:
        own = vars(self._layer)
        self._hidden = {key: own[key] for key in own if key not in _KNOWN}
        own[_KEY] = self
        object.__setattr__(self._layer, "__class__", StandIn)
        for key in self._hidden:
            del own[key]

    def off(self) -> None:
        own = vars(self._layer)
        if own.pop(_KEY, None) is None:
            return
        own.update(self._hidden)
        object.__setattr__(self._layer, "__class__", self._kind)

    def compute(self, x: Tensor) -> Tensor:
        """What its kind computes, whatever was put in the place of its own forward. (Of a subclass is asked elsewhere whether that is what
        it computes.)"""
        self.off()
        own = vars(self._layer)
        replaced: dict[str, Any] = {key: own.pop(key) for key in ("forward", "_conv_forward") if key in own}
        try:
            out: Tensor = self._kind.forward(self._layer, x)
            return out
        finally:
            own.update(replaced)
            self.on()


def _answer(model: nn.Module, image: Tensor) -> list[Tensor] | None:
    """The tensors in a model's answer, whatever it is packed into; None where it fails."""
    try:
        with torch.no_grad():
            answer = model(as_input(model, image))
    except Exception as error:
        if no_memory(error):
            raise
        return None
    return [part.clone() for part in _pytree.tree_leaves(answer) if isinstance(part, Tensor)]  # a model may write into one and the same


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
    difference = float(torch.where(finite, before - after, 0).abs().max())
    largest, centred = (float(torch.where(finite, values, 0).abs().max()) for values in (before, before - before[finite].mean()))
    if before.numel() == 1:  # no mean to lie apart from
        centred = largest
    return difference <= max(TOLERANCE * centred, ROUNDING * largest, 1e-12)
