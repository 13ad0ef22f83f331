"""ChannelGate: one learned weight a channel, by which channels are chosen for removal.

Axes: B images, C channels, H W map; ... any leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 16
"""Number of channels that engines compute together: a part of a block costs as much as the whole."""


class ChannelGate(nn.Module):
    """x · clamp(logit, 0, 1) by channel, `(..., C) -> (..., C)`; one multiplication an element.

    `axis`: the axis of the channels, counted from the end: -1, or -3 for maps `(B, C, H, W)`.

    The gate is a parameter, not a function of the input: a gate of exactly 0 is 0 for every image, so its channel can be removed
    (`muntin.compression.remove_closed_channels`). An open gate after ReLU is folded into the layer before it at export. Source: the scaling
    factors of Network Slimming (Liu et al., 1708.06519, section 3). Deviations: the factors are bounded to [0, 1], so that they close at
    exactly 0; instead of an L1 cost, `muntin.training.gate_pruning` closes the gates that the loss needs least.
    """

    def __init__(self, dim: int, *, axis: int = -1) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: a gate needs at least 1 channel")
        if axis >= 0:
            raise ValueError(f"axis={axis}: count it from the end: -1 for the last axis, -3 for the channels of (B, C, H, W)")
        self.dim = dim
        self.axis = axis
        self.logit = nn.Parameter(torch.ones(dim))

    def openness(self) -> Tensor:
        """clamp(logit, 0, 1), `(C,)`, with the gradient of the identity, so that a closed gate can open again."""
        # The second term has the value 0 exactly, and passes the gradient.
        return self.logit.detach().clamp(0, 1) + (self.logit - self.logit.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.openness().reshape(-1, *(1,) * (-self.axis - 1)).to(x.dtype)

    @torch.no_grad()
    def close(self, channels_C: Tensor) -> None:
        """Close the channels for which the boolean `channels_C` is true."""
        self.logit.masked_fill_(channels_C, 0.0)

    def open_channels(self) -> Tensor:
        """Boolean `(C,)`: True where the gate is above 0."""
        return self.logit.detach() > 0
