"""Quantised layers: integer weights, an input rounded to its 8-bit grid, float arithmetic that equals the integers' exactly.

Axes: B batch, O output and I input channels, H W map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.fake_quantization import dequantize_weight, quantize_dequantize, quantize_weight
from muntin.compression.observer import ActivationGrid, Observer
from muntin.compression.rewrite import computed_weight


class InputGrid(nn.Module):
    """Rounds a tensor to a fixed 8-bit grid."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(grid.scale, dtype=torch.float32))
        kind = torch.uint8 if grid.unsigned else torch.int8
        self.register_buffer("zero_point", torch.tensor(grid.zero_point, dtype=kind))

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value of the grid."""
        info = torch.iinfo(self.zero_point.dtype)
        return float((info.min - self.zero_point.int()) * self.scale), float((info.max - self.zero_point.int()) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = quantize_dequantize(x, self.scale, self.zero_point)
        return rounded


GEOMETRY = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


def keep_geometry(form: nn.Module, layer: nn.Module) -> None:
    """What models read of a layer, on the form that stands for it."""
    for name in GEOMETRY:
        if hasattr(layer, name):
            setattr(form, name, getattr(layer, name))


class QuantizedLinear(nn.Module):
    """A Linear with integer weights per output channel and 8-bit inputs; `(..., I) -> (..., O)`.

    Weights of fewer than 8 bits lie in int8 too: the same numbers at the speed of integers; only the artefact packs them. `integers` are
    kept as `(I, O)`: the product that runtimes take as it is, without a transposition between its integers and its use.
    """

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, grid: ActivationGrid, *, bits: int = 8, scale: Tensor | None = None) -> None:
        super().__init__()
        keep_geometry(self, layer)
        q_OI, scale_O = quantize_weight(layer.weight, 0, bits, scale)
        self.bits = bits
        self.input = InputGrid(grid)
        self.register_buffer("integers", q_OI.t().contiguous())
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float `(O, I)`, made anew at each reading: some models ask a layer's weight for its type
        and device."""
        weight_IO: Tensor = dequantize_weight(self.integers, self.weight_scale, 1)
        return weight_IO.t()

    def forward(self, input: Tensor) -> Tensor:  # the parameter's name is nn.Linear's: models may call it by keyword
        weight_IO = dequantize_weight(self.integers, self.weight_scale, 1)
        out = torch.matmul(self.input(input), weight_IO.to(input.dtype))
        return out if self.bias is None else out + self.bias.to(input.dtype)


class QuantizedConv2d(nn.Module):
    """A Conv2d (groups and depthwise included) with integer weights per output channel and 8-bit inputs; zero padding."""

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, grid: ActivationGrid, *, bits: int = 8, scale: Tensor | None = None) -> None:
        super().__init__()
        keep_geometry(self, layer)
        q_OIHW, scale_O = quantize_weight(layer.weight, 0, bits, scale)
        self.bits = bits
        self.input = InputGrid(grid)
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups
        self.register_buffer("integers", q_OIHW)
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float `(O, I, H, W)`, made anew at each reading; see `QuantizedLinear.weight`."""
        weight_OIHW: Tensor = dequantize_weight(self.integers, self.weight_scale, 0)
        return weight_OIHW

    def forward(self, input: Tensor) -> Tensor:
        weight_OIHW = self.weight.to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.conv2d(self.input(input), weight_OIHW, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantizedProduct(nn.Module):
    """A product of two activations, both rounded to 8 bits: `(..., I, J), (..., J, L) -> (..., I, L)`."""

    def __init__(self, left: ActivationGrid, right: ActivationGrid) -> None:
        super().__init__()
        self.left, self.right = InputGrid(left), InputGrid(right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.left(a), self.right(b))


SHARES = ActivationGrid(scale=1 / 255, zero_point=0, unsigned=True, low=0.0, high=1.0, clipped=0.0)
"""The grid of exp(s - max), which lies in 0..1 whatever the logits are."""


class QuantizedSoftmaxProduct(nn.Module):
    """softmax(logits)·values with exp(logits - max) and the values in 8 bits, divided by the sum after the product.

    A softmax over N entries shrinks as 1/N and vanishes in 8 bits; its largest exponential is 1 at every N. The divisor is the sum of the
    rounded exponentials, so that the weights of the values sum to 1 exactly.
    """

    def __init__(self, values: ActivationGrid) -> None:
        super().__init__()
        self.shares, self.values = InputGrid(SHARES), InputGrid(values)

    def forward(self, logits: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        shares = self.shares(exponentials(logits, bias))
        mixed: Tensor = torch.matmul(shares, self.values(values)) / shares.sum(-1, keepdim=True)
        return mixed


MOST = 24_000
"""Entries that may all have the share 1 without their sum growing beyond the 32 bits that engines add up in: values have up to 255 steps, a
share of 1 has 255, and a quarter is left over, since parts of a share are rounded up."""


def exponentials(logits: Tensor, bias: Tensor | None) -> Tensor:
    """exp(logits + bias - their maximum over the last dimension), in 0..1; a half of it for more than `MOST` entries, a third for more than
    twice as many, and so on: a uniform image has the share 1 at every token."""
    if bias is not None:
        logits = logits + bias
    found = torch.exp(logits - logits.amax(-1, keepdim=True))
    parts = (logits.shape[-1] + MOST - 1) // MOST
    return found if isinstance(parts, int) and parts == 1 else found / parts  # no plain int: the size is free where it is exported


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def no_integer_form(layer: nn.Module, observer: Observer) -> str | None:
    """Why a Linear or Conv2d cannot be quantised; None where it can."""
    if not observer.seen:
        return "no calibration image reached it"
    if (reason := computed_weight(layer)) is not None:
        return reason
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding '{layer.padding if isinstance(layer.padding, str) else layer.padding_mode}' has no integer form here"
    return None
