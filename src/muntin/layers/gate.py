"""ChannelGate: one learned weight a channel, trained to close, then cut away.

Axes: B images, C channels, H W map; ... any leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 16
"""Channels that engines compute together: part of a block costs as much as all of it."""


class ChannelGate(nn.Module):
    """Weighs each channel by a learned gate in [0, 1], one multiplication an element: `(..., C) -> (..., C)`.

    `axis`: where the channels are, counted from the end: -1, or -3 for maps `(B, C, H, W)`.

    The gate is a parameter and not a function of the input: a gate that is exactly 0 stays 0 for every image, so its channel can be
    removed and the saving is real (`muntin.compression.remove_closed_channels`), where input-dependent masks compute what they then
    hide. At export a gate after ReLU folds into the layer before it (see `muntin.compression.fold`) and costs nothing.
    `open_channels()` tells which channels still count. Source: the scaling factors of Network Slimming (Liu et al., 1708.06519,
    section 3), bounded to [0, 1] so that they close at exactly 0. Deviation: no L1 cost, which shrinks all gates alike while the
    weights behind them grow; `muntin.training.closing` closes those that the loss needs least.
    """

    def __init__(self, dim: int, *, axis: int = -1) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: a gate needs at least 1 channel")
        if axis >= 0:
            raise ValueError(f"axis={axis}: it counts from the end: -1 for the last, -3 for the channels of (B, C, H, W)")
        self.dim = dim
        self.axis = axis
        self.logit = nn.Parameter(torch.ones(dim))

    def openness(self) -> Tensor:
        """The gates `(C,)`, each in [0, 1]. The clamp passes gradients outside, too, so that a closed gate can open again."""
        # Value of the clamp, gradient of the identity. Written so that the second term is exactly 0: a closed gate is exactly closed.
        return self.logit.detach().clamp(0, 1) + (self.logit - self.logit.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.openness().reshape(-1, *(1,) * (-self.axis - 1)).to(x.dtype)

    @torch.no_grad()
    def close(self, channels_C: Tensor) -> None:
        """Close the channels for which the boolean `channels_C` is true."""
        self.logit.masked_fill_(channels_C, 0.0)

    def open_channels(self) -> Tensor:
        """Boolean `(C,)`: False where the gate is closed."""
        return self.logit.detach() > 0
