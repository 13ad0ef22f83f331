"""Passes of float layers on a quantised model: its layers become floats of the same values, and integers again afterwards.

integers -> float layers of the same values -> pass -> layers that it left alone: the integers they were
                                                     layers that it changed: quantised in the same bits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from muntin.compression.quantization.post_training import quantize
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear, plain_layer
from muntin.compression.rewrite import named, replace
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedConv2d]:
    """The quantised Linears and convolutions of a model, by dotted name."""
    return dict(named(model, QuantizedLinear, QuantizedConv2d))


def through_floats(model: nn.Module, batches: Sequence[ModelInputs], pass_: Callable[[], list[Change]]) -> list[Change]:
    """Run a pass of float layers on a quantised model, in place; `pass_` changes `model` and returns its changes.

    Costs two copies of the weights, and `quantize` with the layers that the pass has changed; these keep their bits. If the pass raises,
    the model is as it was.
    """
    before = quantized_layers(model)
    floats = {name: plain_layer(form) for name, form in before.items()}
    weights = {name: layer.weight.detach().clone() for name, layer in floats.items()}
    for name, layer in floats.items():
        replace(model, name, layer)
    done: list[Change] | None = None
    try:
        done = pass_()
    finally:
        same = [
            name for name, layer in floats.items() if model.get_submodule(name) is layer and (done is None or _equal(layer, weights[name]))
        ]
        for name in same:
            replace(model, name, before[name])
    changed = [name for name in before if name not in same]
    if not changed:
        return done
    bits = {name: before[name].bits for name in changed}
    again = quantize(model, batches, bits=bits, only=changed, min_sqnr_db=0)
    return done + [change for change in again if not change.kept]


def _equal(layer: nn.Linear | nn.Conv2d, weight: Any) -> bool:
    return layer.weight.shape == weight.shape and bool((layer.weight == weight).all())
