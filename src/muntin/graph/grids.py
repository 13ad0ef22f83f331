"""The 8-bit grid of an activation with the least squared error, and the integers of a weight (numpy; the arithmetic of the trained form).

Axes: O output channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from muntin.graph.onnx_graph import Array

BINS, SHRINKS = 2048, 60
ROUNDS = 2
"""How often the search for a grid with a zero point goes over each of its ends."""
WORTH = 0.8
"""Largest squared error with a zero point, as a share of that without, with which a grid gets one."""
SAMPLES = 1 << 16
"""Values of one tensor of one batch that its histogram counts, at equal distances."""


@dataclass(frozen=True, kw_only=True)
class ByteGrid:
    """An 8-bit grid: value = scale · (q - zero_point); q is 0-255 if `unsigned`, else -128-127.

    Only an unsigned one has a `zero_point` other than 0. It is even: engines that add it before they round then round halves as others do.
    """

    scale: float
    unsigned: bool
    zero_point: int = 0

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the greatest value, in steps of `scale`."""
        return (-self.zero_point, 255 - self.zero_point) if self.unsigned else (-128, 127)

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest value."""
        lowest, highest = self.levels
        return lowest * self.scale, highest * self.scale

    def typed_zero_point(self) -> Array:
        """The zero point, whose type is the range of q."""
        return np.array(self.zero_point, np.uint8 if self.unsigned else np.int8)


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

    @property
    def seen(self) -> bool:
        """False if no batch reached the tensor."""
        return self.high >= self.low

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

    def grid(self, *, symmetric: bool = False) -> ByteGrid:
        """Return the grid with the least mean squared error, on which zeros are exact.

        A tensor that is never negative has an unsigned grid from 0. Another one has a symmetric grid, or one with a zero point if that is
        `WORTH` it, unless `symmetric`: of products of two activations, which OpenVINO computes in floats if one has a zero point.
        """
        unsigned = self.low >= 0
        levels = 255 if unsigned else 127
        peak = max(abs(self.low), abs(self.high))
        if self.histogram is None or self.high <= self.low or peak == 0:
            return ByteGrid(scale=usable(peak / levels if peak > 0 else 1.0), unsigned=unsigned)
        scales = peak * _SHRUNK / levels
        errors = self._errors(scales, np.full_like(scales, 0 if unsigned else -127), np.full_like(scales, levels))
        best = int(errors.argmin())
        plain = ByteGrid(scale=usable(float(scales[best])), unsigned=unsigned)
        if unsigned or symmetric:
            return plain
        other, error = self._with_zero_point()
        return other if error < WORTH * float(errors[best]) else plain

    def _with_zero_point(self) -> tuple[ByteGrid, float]:
        """Return the best grid between shares of both extremes, and its error: both ends shrink, then one at a time."""
        best, least = (self.low, max(self.high, 0.0)), float("inf")
        ones = np.ones_like(_SHRUNK)
        for low_shares, high_shares in ((_SHRUNK, _SHRUNK), *((ones, _SHRUNK), (_SHRUNK, ones)) * ROUNDS):
            lows, highs = best[0] * low_shares, best[1] * high_shares
            scales, zeros = _steps(lows, highs)
            errors = self._errors(scales, -zeros, 255 - zeros)
            index = int(errors.argmin())
            if float(errors[index]) < least:
                best, least = (float(lows[index]), float(highs[index])), float(errors[index])
        scale, zero = _steps(*np.array(best)[:, None])
        return ByteGrid(scale=usable(float(scale[0])), unsigned=True, zero_point=int(zero[0])), least

    def _errors(self, scales: Array, lowest: Array, highest: Array) -> Array:
        """Return the sums of squared errors over the histogram, `(N,)`, of grids with these ends in steps of their `scales` `(N,)`."""
        centres, steps = self.low + (np.arange(BINS) + 0.5) * ((self.high - self.low) / BINS), scales[:, None]
        rounded = np.round(centres / steps).clip(lowest[:, None], highest[:, None]) * steps
        errors: Array = np.square(centres - rounded) @ self.histogram
        return errors


_SHRUNK = 1 - 0.8 * np.arange(SHRINKS) / SHRINKS
"""Candidate shares of a range."""


def _steps(lows: Array, highs: Array) -> tuple[Array, Array]:
    """Return the scales and the even zero points of grids from `lows` <= 0 to `highs` >= 0."""
    scales = (highs - lows) / 255
    return scales, (2 * np.round(-lows / scales / 2)).clip(0, 254)


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
