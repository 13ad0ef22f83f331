"""The range of an activation on calibration images, and the 8-bit grid with the least error.

Two passes over the calibration images: the first finds the extremes, the second fills a histogram of constant size between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muntin.compression.quantization.fake_quantization import SHRINKS

BINS = 2048


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """An 8-bit grid: value = scale · q; q is 0-255 if `unsigned`, else -128-127."""

    scale: float
    unsigned: bool


class Observer:
    """Collects the extremes, then a histogram, of one tensor over many calls."""

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    def see_range(self, x: Tensor) -> None:
        """Add a tensor of the first pass. Raises `ValueError` on NaN or infinity."""
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x.detach().float()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # also catches NaN
            raise ValueError("the activation holds NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)

    def see_values(self, x: Tensor) -> None:
        """Add a tensor of the second pass, over the same tensors."""
        if self.high > self.low:
            counts = torch.histc(x.detach().float(), BINS, self.low, self.high)
            self.histogram += counts.to("cpu", torch.float64)

    @property
    def seen(self) -> bool:
        """False if no calibration image reached the layer."""
        return self.high >= self.low

    def grid(self, percentile: float | None = None) -> ActivationGrid:
        """The grid with the least mean squared error over the histogram, or one that ends at a percentile (of 100) of the magnitudes.

        A tensor that is never negative gets an unsigned grid from 0, any other a signed symmetric one, so zero padding is exact.
        """
        unsigned = self.low >= 0
        levels = 255 if unsigned else 127
        peak = max(abs(self.low), abs(self.high))
        if self.high <= self.low or peak == 0:
            scale = peak / levels if peak > 0 else 1.0
            return ActivationGrid(scale=usable(scale), unsigned=unsigned)
        step = (self.high - self.low) / BINS
        centres = self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * step
        best_error, best_scale = float("inf"), peak / levels
        lowest = 0 if unsigned else -127
        if percentile is not None:
            order = centres.abs().argsort()
            reached = self.histogram[order].cumsum(0) >= self.histogram.sum() * percentile / 100
            best_scale = float(centres.abs()[order][reached][0]) / levels if reached.any() else best_scale
        for k in range(0 if percentile is not None else SHRINKS):
            scale = peak * (1 - 0.8 * k / SHRINKS) / levels
            error = centres - torch.round(centres / scale).clamp(lowest, levels) * scale
            mean_error = float((self.histogram * error.square()).sum())
            if mean_error < best_error:
                best_error, best_scale = mean_error, scale
        return ActivationGrid(scale=usable(best_scale), unsigned=unsigned)


def usable(scale: float) -> float:
    """The scale in float32, never 0 and never exactly 1.

    On bytes, a quantiser of scale 1 and zero point 0 changes nothing: OpenVINO removes it, and the next layer runs in float.
    """
    info = torch.finfo(torch.float32)
    rounded = max(float(torch.tensor(scale, dtype=torch.float32)), info.tiny)
    return 1 + info.eps if rounded == 1 else rounded
