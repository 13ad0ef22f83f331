"""ChannelGate: one learned weight a channel, trained to close, then cut away.

Axes: ... any leading axes, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelGate(nn.Module):
    """Weighs each channel by a learned gate in [0, 1]: `(..., C) -> (..., C)`, one multiplication an element.

    The gate is a parameter and not a function of the input: a gate that is exactly 0 stays 0 for every image, so its channel can be
    removed and the saving is real, where input-dependent masks compute what they then hide. At export a gate after
    ReLU folds into the layer before it (see `muntin.compression.fold`) and costs nothing. `cost()` is the mean openness, to be
    added to a loss; `open_channels()` tells which channels still count.
    Source: the scaling factors of Network Slimming (Liu et al., 1708.06519, section 3), bounded to [0, 1] so that they
    close at exactly 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim}: a gate needs at least 1 channel")
        self.dim = dim
        self.logit = nn.Parameter(torch.ones(dim))

    def openness(self) -> Tensor:
        """The gates `(C,)`, each in [0, 1]. The clamp passes gradients outside, too, so that a closed gate can open again."""
        # Value of the clamp, gradient of the identity. Written so that the second term is exactly 0: a closed gate is exactly closed.
        return self.logit.detach().clamp(0, 1) + (self.logit - self.logit.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.openness().to(x.dtype)

    def cost(self) -> Tensor:
        """Mean openness, a scalar in [0, 1]."""
        return self.openness().mean()

    def open_channels(self) -> Tensor:
        """Boolean `(C,)`: False where the gate is closed."""
        return self.logit.detach() > 0
