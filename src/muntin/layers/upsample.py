"""ProgressiveUpsampler: the decoder that restores resolution stage by stage, and the last step to the pixel.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers.convolution import ConvUnit
from muntin.layers.ops import Gain, Sum


def upsample_to(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Twice the size by repeating pixels, cut to the size of `like`: its odd last row or column has no pair."""
    doubled = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
    return doubled[:, :, : like_BCHW.shape[2], : like_BCHW.shape[3]]


class ProgressiveUpsampler(nn.Module):
    """Goes from the coarsest of several feature maps to the finest, doubling the size at each stage and adding a skip.

    `channels`: of the feature maps, coarse to fine, each twice the height and width of the one before (rounded up).
    Input: those maps `(B, C_i, H_i, W_i)` in that order; output `(B, dim, H, W)` of the finest. Each stage: repeat pixels, add
    the 1x1-projected skip, smooth with a 3x3 convolution. Source: the top-down path of feature pyramids (Lin et al.,
    1612.03144, section 3), with the smoothing inside the path, so that each stage corrects what the doubling blurred.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels is empty: give the channels of at least one feature map, coarse to fine")
        self.lateral = nn.ModuleList(ConvUnit(c, dim, kernel=1, activation=False) for c in channels)
        self.smooth = nn.ModuleList(ConvUnit(dim, dim) for _ in channels[1:])
        self.sum = nn.ModuleList(Sum() for _ in channels[1:])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) != len(self.lateral):
            raise ValueError(f"{len(maps)} feature maps came, {len(self.lateral)} are expected, coarse to fine")
        x_BCHW: Tensor = self.lateral[0](maps[0])
        for skip, lateral, smooth, add in zip(maps[1:], self.lateral[1:], self.smooth, self.sum, strict=True):
            x_BCHW = smooth(add(lateral(skip), upsample_to(x_BCHW, skip)))
        return x_BCHW


class PixelHead(nn.Module):
    """K scores for each pixel from a map at 1/`factor` of the size: one 1x1 convolution, its channels spread over the pixels.

    `(B, C, h, w) -> (B, K, factor·h, factor·w)`, to be cut to the picture's size. C·K·factor² multiply-adds a position at low
    resolution: nothing heavy runs at full resolution. Source: sub-pixel convolution (Shi et al., 1609.05158, section 3.2),
    started at repetition (ICNR, Aitken et al., 1707.02937), so that training begins without a checkerboard.

    `gain`: a factor of the scores, with weights that start as many times smaller, so that the untrained layer is the same. An optimiser
    moves every weight by about the learning rate, so scores grow with the number of channels that they are a sum over: those of a narrow
    decoder lag behind, and the loss with them. A gain lets them keep up; it is folded into the weights for deployment. The idea of learning
    rates by width is Yang & Hu's (2011.14522); the number was found by trial, with Adam (docs/log.md).
    """

    def __init__(self, channels: int, outputs: int, factor: int, gain: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs * factor**2, 1)
        self.factor = factor
        self.gain: nn.Module = nn.Identity() if gain == 1 else Gain(gain)
        self.shuffle: nn.Module = nn.PixelShuffle(factor) if factor > 1 else nn.Identity()
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[:outputs].repeat_interleave(factor**2, dim=0) / gain)
            self.conv.get_parameter("bias").zero_()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.shuffle(self.gain(self.conv(x_BCHW)))
        return out
