"""The 8-bit grid of an activation with the least squared error, and the integers of a weight (numpy; the arithmetic of the trained form).

Axes: O output channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from muntin.graph.onnx_graph import Array

BINS, SHRINKS = 2048, 60
SAMPLES = 1 << 16
"""Values of one tensor of one batch that its histogram counts, at equal distances."""


@dataclass(frozen=True, kw_only=True)
class ByteGrid:
    """An 8-bit grid: value = scale · (q - offset); q is 0-255 if `unsigned`, else -128-127. Only an unsigned one has an `offset`."""

    scale: float
    unsigned: bool
    offset: int = 0

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest value."""
        lowest, highest = (-self.offset, 255 - self.offset) if self.unsigned else (-128, 127)
        return lowest * self.scale, highest * self.scale

    def zero_point(self) -> Array:
        """The offset, whose type is the range of q."""
        return np.array(self.offset, np.uint8 if self.unsigned else np.int8)


SHARES = ByteGrid(scale=1 / 255, unsigned=True)
"""The grid of exp(s - max), which is in 0..1 for all logits."""


@dataclass
class RangeObserver:
    """The extremes of a tensor over many batches, then a histogram between them."""

    low: float = float("inf")
    high: float = float("-inf")
    histogram: Array | None = None

    def see_range(self, low: float, high: float) -> None:
        """Add the extremes of one batch. Raises `ValueError` on NaN or infinity."""
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError("the activation holds NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def see_values(self, x: Array) -> None:
        """Add one batch of the second pass."""
        flat = x.reshape(-1)
        step = -(-flat.size // SAMPLES)
        while math.gcd(step, flat.size) > 1:  # a step that divides the channels would see some of them only
            step += 1
        flat = flat[::step]
        bins = ((flat - self.low) * (BINS / max(self.high - self.low, 1e-30))).astype(np.int64).clip(0, BINS - 1)
        counts = np.bincount(bins, minlength=BINS).astype(np.float64)
        self.histogram = counts if self.histogram is None else self.histogram + counts

    def grid(self) -> ByteGrid:
        """Return the grid with the least mean squared error; unsigned from 0 for a tensor that is never negative, so zeros are exact."""
        unsigned = self.low >= 0
        levels, lowest = (255, 0) if unsigned else (127, -127)
        peak = max(abs(self.low), abs(self.high))
        if self.histogram is None or self.high <= self.low or peak == 0:
            return ByteGrid(scale=usable(peak / levels if peak > 0 else 1.0), unsigned=unsigned)
        centres = self.low + (np.arange(BINS) + 0.5) * ((self.high - self.low) / BINS)
        scales = peak * (1 - 0.8 * np.arange(SHRINKS) / SHRINKS) / levels
        rounded = np.round(centres / scales[:, None]).clip(lowest, levels) * scales[:, None]
        errors = np.square(centres - rounded) @ self.histogram
        return ByteGrid(scale=usable(float(scales[int(errors.argmin())])), unsigned=unsigned)


def usable(scale: float) -> float:
    """Return the scale in float32, never 0 and never exactly 1: OpenVINO removes a quantiser of scale 1 on bytes."""
    info = np.finfo(np.float32)
    rounded = max(float(np.float32(scale)), float(info.tiny))
    return 1 + float(info.eps) if rounded == 1 else rounded


def weight_scale(weight: Array, axis: int, bits: int = 8) -> Array:
    """Return the scale `(O,)` of each channel along `axis`, by its peak. A channel of zeros gets 1."""
    limit = weight_limit(bits)
    peak_O = np.abs(weight).max(axis=tuple(d for d in range(weight.ndim) if d != axis)).astype(np.float32)
    return np.where(peak_O > 0, np.maximum(peak_O, limit * np.finfo(np.float32).tiny), limit).astype(np.float32) / np.float32(limit)


def weight_limit(bits: int) -> int:
    """Return the largest level of a symmetric weight: 127 for 8 bits, 63 for 7."""
    return int(2 ** (bits - 1)) - 1


def quantize_weight(weight: Array, axis: int, scale_O: Array, bits: int) -> Array:
    """Return the weight as symmetric integers along `axis`, int8."""
    limit = weight_limit(bits)
    shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
    return np.round(weight.astype(np.float32) / scale_O.reshape(shape)).clip(-limit, limit).astype(np.int8)
