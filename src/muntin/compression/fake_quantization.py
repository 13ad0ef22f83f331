"""The arithmetic of quantisation as two operators: what they compute in PyTorch is what the runtime's integers mean.

They are custom operators so that an exporter finds them whole and writes QuantizeLinear / DequantizeLinear for them,
instead of a pattern that a runtime may or may not recognise.

Axes: O output channels; the scale of a weight has one entry for each.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("muntin::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round `x` to the 8-bit grid scale · (q - zero_point) and return the grid's value, in the dtype of `x`.

    `scale`: float32 scalar, > 0. `zero_point`: uint8 or int8 scalar; its type says which range q has. Ties go to even, as in
    ONNX's QuantizeLinear.
    """
    info = torch.iinfo(zero_point.dtype)
    offset = zero_point.to(torch.float32)
    q = torch.round(x.to(torch.float32) / scale).add_(offset).clamp_(info.min, info.max)
    return q.sub_(offset).mul_(scale).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("muntin::dequantize_weight", mutates_args=())
def dequantize_weight(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """int8 weight times its scale along `axis`: float32."""
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.to(torch.float32) * scale.reshape(shape)


@dequantize_weight.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


def quantize_weight(weight: Tensor, axis: int, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Symmetric per-channel quantisation: `(q int8 of the weight's shape, scale float32 (O,))`.

    weight ≈ q · scale, q in [-(2^(bits-1) - 1), 2^(bits-1) - 1]. A channel that is all zero gets scale 1. A weight that is not finite
    raises `ValueError`: no scale can mean anything for it.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    limit = 2 ** (bits - 1) - 1
    other = [d for d in range(weight.ndim) if d != axis]
    peak = weight.detach().to(torch.float32).abs().amax(other)
    scale = torch.where(peak > 0, peak / limit, torch.ones_like(peak)).clamp_min(torch.finfo(torch.float32).tiny)
    shape = [1] * weight.ndim
    shape[axis] = -1
    q = torch.round(weight.detach().to(torch.float32) / scale.reshape(shape)).clamp_(-limit, limit)
    return q.to(torch.int8), scale
