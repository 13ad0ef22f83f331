"""Zeros in one layer's weight, and other values for the weights that stay, so that its outputs change least on calibration inputs.

Source: SparseGPT (Frantar and Alistarh, 2301.00774, sections 3.2 to 3.4): the places of a group are chosen when its columns are reached, by
w² / [H⁻¹]ᵢᵢ, and the error of each column is made up for by those that follow. Deviations: float64; convolutions by patches, tap by tap;
the moment is about the mean where a bias takes over the mean error.

Axes: O outputs, I inputs and T taps (one after the other as columns), N rows (tokens, positions of a map).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from muntin.compression.quantization.rounding import layer_rows
from muntin.compression.sparsity.pattern import Pattern, taps_first, taps_last

DAMPING = 0.01
"""Added to the diagonal of a second moment, a share of its mean (SparseGPT's)."""
FEW = 0.1
"""Added to `DAMPING`, times inputs over rows: few rows do not determine a moment."""
COLUMNS = 64
"""Columns after which their errors are passed on to all others; a multiple of the groups."""


@dataclass
class InputMoments:
    """Sums over the rows of a layer's inputs x, patches of a convolution tap by tap: `x` (T·I,), `xx` (T·I, T·I), float64."""

    count: int
    x: Tensor
    xx: Tensor

    @classmethod
    def empty(cls, layer: nn.Linear | nn.Conv2d) -> Self:
        width, device = layer.weight[0].numel(), layer.weight.device
        return cls(0, torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(width, width, dtype=torch.float64, device=device))

    def add(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        """Add an input of an ungrouped layer."""
        (rows_NI,) = layer_rows(layer, x.detach().float())
        taps = layer.weight[0].numel() // layer.weight.shape[1]
        rows_NI = rows_NI.unflatten(1, (-1, taps)).transpose(1, 2).flatten(1)
        self.count += len(rows_NI)
        self.x += rows_NI.sum(0, dtype=torch.float64)
        self.xx += (rows_NI.T @ rows_NI).double()


@torch.no_grad()
def sparsify_weight(layer: nn.Linear | nn.Conv2d, pattern: Pattern, moments: InputMoments) -> tuple[float, float]:
    """Give a layer's weight the pattern, in place; its bias takes over the mean error.

    Returns the squared error of the outputs as a share of their power, and as a share of the error that zeros by magnitude alone leave. The
    better of both is kept. Costs a Cholesky decomposition of (T·I)³ and T·I steps of O·T·I multiply-adds.
    """
    before_OTI = taps_first(layer.weight).double()
    flat_OI = before_OTI.flatten(1)
    mean_I, xx_II = moments.x / moments.count, moments.xx / moments.count
    if layer.bias is not None:
        xx_II = xx_II - torch.outer(mean_I, mean_I)
    level = float(xx_II.diagonal().mean()) or 1.0
    damping = (DAMPING + FEW * len(xx_II) / moments.count) * level
    damped_II = xx_II + damping * torch.eye(len(xx_II), dtype=xx_II.dtype, device=xx_II.device)
    sparse_OI = sparse_columns(flat_OI, damped_II, pattern)
    plain_OI = torch.where(pattern.mask(before_OTI.square()).flatten(1), flat_OI, 0.0)
    error, plain_error = (_power(form_OI - flat_OI, xx_II) for form_OI in (sparse_OI, plain_OI))
    if not error <= plain_error:
        sparse_OI, error = plain_OI, plain_error
    layer.weight.copy_(taps_last(sparse_OI.reshape(before_OTI.shape), layer.weight))
    if layer.bias is not None:
        layer.bias += ((flat_OI - sparse_OI) @ mean_I).to(layer.bias.dtype)
    power = _power(flat_OI, xx_II)
    return error / power if power else 0.0, error / plain_error if plain_error else 1.0


def sparse_columns(weight_OI: Tensor, moment_II: Tensor, pattern: Pattern) -> Tensor:
    """The weight with the pattern whose outputs are near those of `weight` for inputs of a (damped) second moment. Columns: tap by tap."""
    upper_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment_II)), upper=True)
    scale_I = upper_II.diagonal()
    left_OI, width = weight_OI.clone(), weight_OI.shape[1]
    stay_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    step = COLUMNS // pattern.group * pattern.group
    for start in range(0, width, step):
        end = min(start + step, width)
        errors = []
        for i in range(start, end):
            if i % pattern.group == 0:
                group = slice(i, i + pattern.group)
                stay_OI[:, group] = pattern.mask((left_OI[:, group] / scale_I[group]).square()[:, None])[:, 0]
            error_O1 = torch.where(stay_OI[:, i], 0.0, left_OI[:, i] / scale_I[i])[:, None]
            left_OI[:, i + 1 : end] -= error_O1 * upper_II[i, i + 1 : end]
            errors.append(error_O1)
        left_OI[:, end:] -= torch.cat(errors, 1) @ upper_II[start:end, end:]
    return torch.where(stay_OI, left_OI, 0.0)


def _power(weight_OI: Tensor, moment_II: Tensor) -> float:
    return float(((weight_OI @ moment_II) * weight_OI).sum())
