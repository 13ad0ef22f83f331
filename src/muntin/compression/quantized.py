"""Quantised layers: integer weights, an input rounded to its 8-bit grid, float arithmetic that equals the integers' exactly.

Axes: B batch, O output and I input channels, H W map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.fake_quantization import dequantize_weight, quantize_dequantize, quantize_weight
from muntin.compression.observer import ActivationGrid


class InputGrid(nn.Module):
    """Rounds a tensor to a fixed 8-bit grid."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(grid.scale, dtype=torch.float32))
        kind = torch.uint8 if grid.unsigned else torch.int8
        self.register_buffer("zero_point", torch.tensor(grid.zero_point, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = quantize_dequantize(x, self.scale, self.zero_point)
        return rounded


class QuantizedLinear(nn.Module):
    """A Linear with int8 weights per output channel and 8-bit inputs; `(..., I) -> (..., O)`.

    The weight is kept as `(I, O)`: the product that runtimes take as it is, without a transposition between its integers and its use.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, grid: ActivationGrid) -> None:
        super().__init__()
        q_OI, scale_O = quantize_weight(layer.weight, 0)
        self.input = InputGrid(grid)
        self.register_buffer("weight", q_OI.t().contiguous())
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:  # the parameter's name is nn.Linear's: models may call it by keyword
        weight_IO = dequantize_weight(self.weight, self.weight_scale, 1)
        out = torch.matmul(self.input(input), weight_IO.to(input.dtype))
        return out if self.bias is None else out + self.bias.to(input.dtype)


class QuantizedConv2d(nn.Module):
    """A Conv2d (groups and depthwise included) with int8 weights per output channel and 8-bit inputs; zero padding."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, grid: ActivationGrid) -> None:
        super().__init__()
        q_OIHW, scale_O = quantize_weight(layer.weight, 0)
        self.input = InputGrid(grid)
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups
        self.register_buffer("weight", q_OIHW)
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        weight_OIHW = dequantize_weight(self.weight, self.weight_scale, 0).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(self.input(input), weight_OIHW, bias, self.stride, self.padding, self.dilation, self.groups)


QuantizedLayer = QuantizedLinear | QuantizedConv2d
