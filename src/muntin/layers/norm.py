"""Batch normalisation over fixed groups of samples, for maps and for tokens.

y = weight · (x - mean) / √(variance + eps) + bias, with the statistics of a group while training and running averages afterwards.

A batch is cut, in its order, into groups of `group` samples, by default `GROUP` (the last may be smaller), so the network does not depend
on `training.batch_size`, and any split at a border of groups gives the same numbers. After training the norm is an affine map with constant
coefficients, which folds into a neighbouring layer. A group with a single value a channel (one image on a map of 1x1) has no variance: it
raises MuntinError while training.

Source: Ghost Batch Normalization (Hoffer et al., 1705.08741, section 4).
Axes: B images, C channels, H W map, S windows, T tokens in a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.errors import MuntinError
from muntin.layers.windows import Grid, cut, merge

GROUP = 8
"""Number of samples that share statistics while training, by default."""


class _GroupedNorm(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.momentum = momentum
        self.group = GROUP
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def affine(self) -> tuple[Tensor, Tensor]:
        """The coefficients `a` and `b`, each `(C,)`, of the layer after training: y = a·x + b."""
        a_C = self.weight / torch.sqrt(self.running_var + self.eps)
        return a_C, self.bias - self.running_mean * a_C

    def _normalise(self, x_BCHW: Tensor) -> Tensor:
        if self.training and x_BCHW.numel() <= self.dim:
            raise MuntinError(
                "a group of samples has a single value a channel (one image on a map of 1x1), so it has no variance: "
                f"train on larger crops, or with a batch_size that is a multiple of {self.group}"
            )
        return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)

    def _normalise_groups(self, x_BCHW: Tensor, group: int) -> Tensor:
        if not self.training or x_BCHW.shape[0] <= group:
            return self._normalise(x_BCHW)
        return torch.cat([self._normalise(part) for part in torch.split(x_BCHW, group)])


class MapNorm(_GroupedNorm):
    """Normalise `(B, C, H, W)` by channel, in groups of `group` images while training."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._normalise_groups(x_BCHW, self.group)


class TokenNorm(_GroupedNorm):
    """Normalise `(S, T, C)` by channel, in groups of the windows of `group` images while training. Padding does not count."""

    def forward(self, t_STC: Tensor, grid: Grid) -> Tensor:
        if not self.training:
            a_C, b_C = self.affine()
            return t_STC * a_C.to(t_STC.dtype) + b_C.to(t_STC.dtype)
        if grid.window is not None and (grid.height % grid.window or grid.width % grid.window):
            x_BCHW = merge(t_STC, grid).permute(0, 3, 1, 2)
            return cut(self._normalise_groups(x_BCHW, self.group).permute(0, 2, 3, 1).to(t_STC.dtype), grid)
        x_SCT1 = t_STC.transpose(1, 2).unsqueeze(-1)  # a view in channels-last order: PyTorch's fast path
        return self._normalise_groups(x_SCT1, self.group * grid.rows * grid.columns).squeeze(-1).transpose(1, 2)
