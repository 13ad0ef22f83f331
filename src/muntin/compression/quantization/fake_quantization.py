"""The arithmetic of quantisation: what PyTorch computes here equals what the runtime computes in integers.

Axes: O output channels; the scale of a weight has one entry for each.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

SHRINKS = 60
"""Candidate clipping ranges, between a fifth of the observed range and all of it."""
Scales = Literal["mse", "minmax", "percentile"]
"""How the scales of a grid are chosen: by least squared error, the extremes, or a percentile of the magnitudes."""
WEIGHT_PERCENTILE = 0.999
"""Share of the magnitudes of an output's weights below the end of its grid with "percentile"."""
HALF_DB = 60.0
"""Signal over noise below which a weight stays in FP32. FP16 gives 73 dB unless values are out of its range."""


def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round `x` to the 8-bit grid scale · (q - zero_point), in the dtype of `x`. Ties go to even, as in ONNX's QuantizeLinear.

    `scale`: float32 scalar, > 0. `zero_point`: uint8 or int8 scalar, whose type is the range of q.
    """
    info = torch.iinfo(zero_point.dtype)
    offset = zero_point.to(torch.float32)
    q = torch.round(x.to(torch.float32) / scale).add_(offset).clamp_(info.min, info.max)
    return q.sub_(offset).mul_(scale).to(x.dtype)


def dequantize_weight(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """int8 weight times its scale along `axis`, float32."""
    return q.to(torch.float32) * along(scale, q.ndim, axis)


class _RoundToGrid(torch.autograd.Function):
    """scale · clamp(round(x / scale)), with LSQ's gradients: straight through inside the grid, and for the scale by its own error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        rounded = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, scale, rounded)  # the next layer keeps `rounded` anyway
        ctx.low, ctx.high = low, high
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        x, scale, rounded = ctx.saved_tensors
        through = torch.ops.aten.hardtanh_backward(gradient, x / scale, ctx.low, ctx.high)
        # d/ds of s·clamp(round(x/s)), times s: round(x/s) - x/s inside the grid, the grid's end outside
        slope = (gradient * rounded).addcmul_(x, through, value=-1)
        shared = [d for d in range(x.ndim) if scale.ndim == 0 or scale.shape[d] == 1]
        by_scale = slope.sum(shared, keepdim=scale.ndim > 0, dtype=torch.float32) / scale
        return through, by_scale.to(scale.dtype), None, None


def round_to_grid(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Round `x` to the grid scale · q, q in low..high, with gradients for both.

    `scale`: float32, > 0, a scalar or of the shape of `x` with ones on shared axes. Computed in the dtype of `x`. Costs four passes
    over `x` forward and five backward. Source: LSQ (Esser et al., 1902.08153, section 2.1); the scale's gradient is divided by √(values
    that share it · the largest |q|), section 2.2.
    """
    factor = (scale.numel() / (x.numel() * max(high, -low - 1))) ** 0.5
    damped = scale.detach() + (scale - scale.detach()) * factor  # equals `scale` to the last bit
    rounded: Tensor = _RoundToGrid.apply(x, damped.to(x.dtype), low, high)  # type: ignore[no-untyped-call]
    return rounded


def weight_scale(weight: Tensor, axis: int, bits: int, scales: Scales = "mse") -> Tensor:
    """The scale `(O,)` of each channel along `axis`.

    "mse": at 8 bits by its peak, below by least squared error among 60 clipping ranges; "minmax": by its peak; "percentile": by
    `WEIGHT_PERCENTILE` of its magnitudes.
    A channel of zeros gets scale 1. Raises `ValueError` for a weight that is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity")
    limit = weight_limit(bits)
    rows_ON = weight.detach().to(torch.float32).movedim(axis, 0).flatten(1)
    magnitudes_ON = rows_ON.abs()
    nth = math.ceil(WEIGHT_PERCENTILE * rows_ON.shape[1])
    peak_O = magnitudes_ON.kthvalue(nth, 1).values if scales == "percentile" else magnitudes_ON.amax(1)
    peak_O = torch.where(peak_O > 0, peak_O, torch.full_like(peak_O, limit)).clamp_min(limit * torch.finfo(torch.float32).tiny)
    best_O = peak_O / limit
    if bits >= 8 or scales != "mse":
        return best_O
    least_O = torch.full_like(peak_O, float("inf"))
    for k in range(SHRINKS):
        scale_O = peak_O * (1 - 0.8 * k / SHRINKS) / limit
        error_O = (rows_ON - torch.round(rows_ON / scale_O[:, None]).clamp(-limit, limit) * scale_O[:, None]).square().sum(1)
        best_O = torch.where(error_O < least_O, scale_O, best_O)
        least_O = torch.minimum(error_O, least_O)
    return best_O


def weight_limit(bits: int) -> int:
    """Largest level of a symmetric weight: 127 for 8 bits, 7 for 4."""
    return int(2 ** (bits - 1) - 1)


def along(scale: Tensor, ndim: int, axis: int) -> Tensor:
    """A scale `(O,)` reshaped to lie along `axis` of a weight."""
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


def quantize_weight(weight: Tensor, axis: int, bits: int = 8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric per-channel quantisation: `(q int8 of the weight's shape, scale float32 (O,))`.

    weight ≈ q · scale, q in ±`weight_limit(bits)`. `scale`: by default from `weight_scale`.
    """
    scale = weight_scale(weight, axis, bits) if scale is None else scale.detach().to(torch.float32)
    limit = weight_limit(bits)
    q = torch.round(weight.detach().to(torch.float32) / along(scale, weight.ndim, axis)).clamp_(-limit, limit)
    return q.to(torch.int8), scale


@torch.no_grad()
def round_to_half(layer: nn.Module) -> None:
    """Round a layer's weights, in place, to the FP16 in which they are stored. A weight outside of its range is unchanged."""
    for weight in layer.parameters(recurse=False):
        rounded = weight.to(torch.float16).to(weight.dtype)
        if weight.ndim > 1 and sqnr_db(weight, rounded) > HALF_DB:
            weight.copy_(rounded)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal over quantisation noise in decibels; infinite if both are equal."""
    noise = (reference - approximation).double().square().sum()
    signal = reference.double().square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")
