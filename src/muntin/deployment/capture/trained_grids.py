"""The integers of a model whose weights are rounded in PyTorch, and its float form, which is captured.

A quantised layer becomes its plain kind with the weight q · scale. Rounding that by the same scale gives q again, so no number changes.
Layers after quantisation-aware training have grids of their inputs too; those of other layers are calibrated on the graph.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from muntin.compression import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.history import last_changes, remembered_calibration
from muntin.compression.quantization.quantized_layers import InputGrid
from muntin.compression.rewrite import named, replace
from muntin.errors import ExportError
from muntin.graph.grids import SHARES
from muntin.graph.insertion import Grids, ProductGrids
from muntin.layers import Product, SoftmaxProduct
from muntin.models.eager import ModelInputs

INTEGERS = re.compile(r"W[2-8]A8")
"""Form of `Change.done` for a layer that is to have integer weights and 8-bit inputs."""
Quantized = QuantizedConv2d | QuantizedLinear | QuantizedProduct | QuantizedSoftmaxProduct


def take_grids(model: nn.Module) -> Grids:
    """Replace the quantised layers and products of a model, in place, by float ones; return their grids by name."""
    grids: dict[str, ProductGrids] = {}
    quantized: list[tuple[str, Quantized]] = list(named(model, QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct))
    for name, layer in quantized:
        if isinstance(layer, QuantizedProduct):
            grids[name] = ProductGrids(activations={0: layer.left.grid(), 1: layer.right.grid()})
            replace(model, name, Product())
        elif isinstance(layer, QuantizedSoftmaxProduct):
            grids[name] = ProductGrids(activations={0: SHARES, 1: layer.values.grid()}, spread_softmax=True)
            replace(model, name, SoftmaxProduct())
        else:
            activations = {0: layer.input.grid()} if isinstance(layer.input, InputGrid) else {}
            grids[name] = ProductGrids(activations=activations, weight_bits=layer.bits, scale=layer.weight_scale.numpy())
            replace(model, name, _plain(layer))
    model.eval()
    return grids


def needed_calibration(model: nn.Module, *, normalised: bool = True) -> list[ModelInputs] | None:
    """Return the batches of `muntin.quantize` for a model with layers that export has to calibrate, None for another one.

    Raises ExportError where the model no longer has them, or not `normalised`, that is, where the artefact will take other inputs than it.
    """
    layers = [
        name for name, change in last_changes(model, "quantize").items() if INTEGERS.fullmatch(change.done) and not _has_grids(model, name)
    ]
    if not layers:
        return None
    if not (batches := remembered_calibration(model)) or not normalised:
        raise ExportError(
            f"'{layers[0]}' is to be in integers, and no scale of its inputs is known ({len(layers)} layers have none): give calibration, "
            "batches of training inputs"
        )
    return batches


def _has_grids(model: nn.Module, name: str) -> bool:
    layer = dict(model.named_modules()).get(name)
    return layer is None or any(isinstance(part, InputGrid) for part in layer.modules())


def _plain(layer: QuantizedConv2d | QuantizedLinear) -> nn.Module:
    """Return the Conv2d or Linear with the dequantised weight."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, QuantizedConv2d):
        O, I, height, width = layer.weight.shape  # noqa: E741 - the axes' letters
        plain = nn.Conv2d(
            I * layer.groups, O, (height, width), layer.stride, layer.padding, layer.dilation, layer.groups, bias=layer.bias is not None
        )
    else:
        O, I = layer.weight.shape  # noqa: E741
        plain = nn.Linear(I, O, bias=layer.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if layer.bias is not None and plain.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain
