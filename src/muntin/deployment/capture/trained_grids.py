"""The grids of a model that is quantised in PyTorch, and its float form, which is captured.

A quantised layer becomes its plain kind with the weight q · scale. Rounding that by the same scale gives q again, so no number changes.
"""

from __future__ import annotations

import torch
from torch import nn

from muntin.compression import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.quantization.quantized_layers import InputGrid
from muntin.compression.rewrite import named, replace
from muntin.graph.grids import SHARES, ByteGrid
from muntin.graph.insertion import Grids, ProductGrids
from muntin.layers import Product, SoftmaxProduct

Quantized = QuantizedConv2d | QuantizedLinear | QuantizedProduct | QuantizedSoftmaxProduct


def take_grids(model: nn.Module) -> Grids:
    """Replace the quantised layers and products of a model, in place, by float ones; return their grids by name."""
    grids: dict[str, ProductGrids] = {}
    quantized: list[tuple[str, Quantized]] = list(named(model, QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct))
    for name, layer in quantized:
        if isinstance(layer, QuantizedProduct):
            grids[name] = ProductGrids(activations={0: _grid_of(layer.left), 1: _grid_of(layer.right)})
            replace(model, name, Product())
        elif isinstance(layer, QuantizedSoftmaxProduct):
            grids[name] = ProductGrids(activations={0: SHARES, 1: _grid_of(layer.values)}, spread_softmax=True)
            replace(model, name, SoftmaxProduct())
        else:
            grids[name] = ProductGrids(activations={0: _grid_of(layer.input)}, weight_bits=layer.bits, scale=layer.weight_scale.numpy())
            replace(model, name, _plain(layer))
    model.eval()
    return grids


def _grid_of(grid: InputGrid) -> ByteGrid:
    return ByteGrid(scale=float(grid.scale), unsigned=grid.zero_point.dtype == torch.uint8, offset=int(grid.zero_point))


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
