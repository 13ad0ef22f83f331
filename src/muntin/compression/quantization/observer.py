"""The range of an activation on calibration images, and the 8-bit grid with the least error, symmetric or with a zero point.

Two passes over the calibration images: the first finds the extremes, the second fills a histogram of constant size between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muntin.compression.quantization.fake_quantization import SHRINKS

BINS = 2048
ROUNDS = 2
"""How often the search for a grid with a zero point goes over each of its ends."""


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """An 8-bit grid: value = scale · (q - zero_point); q is 0-255 if `unsigned`, else -128-127.

    Only an unsigned grid has a `zero_point` other than 0. It is even: engines that add it before they round then round halves as others do.
    """

    scale: float
    unsigned: bool
    zero_point: int = 0

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the greatest value, in steps of `scale`."""
        return (-self.zero_point, 255 - self.zero_point) if self.unsigned else (-128, 127)


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

    def grid(self, percentile: float | None = None, *, asymmetric: bool = False) -> ActivationGrid:
        """The grid with the least mean squared error over the histogram, or one that ends at a percentile (of 100) of the magnitudes.

        A tensor that is never negative gets an unsigned grid from 0, any other a signed symmetric one, so zero padding is exact.
        `asymmetric`: an unsigned grid with a zero point instead: the best one, or the symmetric one as unsigned integers. ONNX Runtime
        multiplies signed integers that several Linears read in floats, and unsigned ones in integers.
        """
        unsigned = self.low >= 0
        levels = 255 if unsigned else 127
        peak = max(abs(self.low), abs(self.high))
        if self.high <= self.low or peak == 0:
            scale = peak / levels if peak > 0 else 1.0
            return ActivationGrid(scale=usable(scale), unsigned=unsigned)
        centres = self._centres()
        if percentile is not None:
            order = centres.abs().argsort()
            reached = self.histogram[order].cumsum(0) >= self.histogram.sum() * percentile / 100
            peak = float(centres.abs()[order][reached][0]) if reached.any() else peak
        shrinks = _SHRUNK if percentile is None else _SHRUNK[:1]
        scales = peak * shrinks / levels
        errors = self._errors(scales, torch.full_like(scales, 0.0 if unsigned else -128.0), torch.full_like(scales, levels))
        best = int(errors.argmin())
        symmetric = ActivationGrid(scale=usable(float(scales[best])), unsigned=unsigned)
        if unsigned or not asymmetric or peak <= 0:
            return symmetric
        other, error = self._with_zero_point(max(self.low, -peak), max(0.0, min(self.high, peak)), shrinks)
        return other if error < float(errors[best]) else replace(symmetric, unsigned=True, zero_point=128)

    def _with_zero_point(self, low: float, high: float, shrinks: Tensor) -> tuple[ActivationGrid, float]:
        """The best grid with a zero point between shares of two ends around 0, and its error: both ends shrink, then one at a time."""
        best, least = (low, high), float("inf")
        ones = torch.ones_like(shrinks)
        for low_shares, high_shares in ((shrinks, shrinks), *((ones, shrinks), (shrinks, ones)) * ROUNDS):
            lows = (best[0] if low_shares is ones else low) * low_shares
            highs = (best[1] if high_shares is ones else high) * high_shares
            scales, zeros = _steps(lows, highs)
            errors = self._errors(scales, -zeros, 255 - zeros)
            index = int(errors.argmin())
            if float(errors[index]) < least:
                best, least = (float(lows[index]), float(highs[index])), float(errors[index])
        scale, zero = _steps(torch.tensor(best[0], dtype=torch.float64), torch.tensor(best[1], dtype=torch.float64))
        return ActivationGrid(scale=usable(float(scale)), unsigned=True, zero_point=int(zero)), least

    def _centres(self) -> Tensor:
        step = (self.high - self.low) / BINS
        return self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * step

    def _errors(self, scales: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Sums of squared errors over the histogram, of grids `(N,)` with these ends in steps."""
        centres, steps = self._centres(), scales[:, None]
        rounded = torch.round(centres / steps).clamp_(lowest[:, None], highest[:, None]).mul_(steps)
        return (centres - rounded).square_() @ self.histogram


_SHRUNK = 1 - 0.8 * torch.arange(SHRINKS, dtype=torch.float64) / SHRINKS
"""Candidate shares of a range."""


def _steps(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the even zero points of grids from `lows` <= 0 to `highs` >= 0."""
    scales = (highs - lows) / 255
    return scales, (2 * torch.round(-lows / scales / 2)).clamp_(0, 254)


def usable(scale: float) -> float:
    """The scale in float32, never 0 and never exactly 1.

    On bytes, a quantiser of scale 1 and zero point 0 changes nothing: OpenVINO removes it, and the next layer runs in float.
    """
    info = torch.finfo(torch.float32)
    rounded = max(float(torch.tensor(scale, dtype=torch.float32)), info.tiny)
    return 1 + info.eps if rounded == 1 else rounded
