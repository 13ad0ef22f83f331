"""Decoders, which join feature maps at the size of the finest: ProgressiveUpsampler, OneStepUpsampler, PyramidFusion. PixelHead: scores.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers.convolution import ConvUnit
from muntin.layers.ops import Gain, Sum


class ProgressiveUpsampler(nn.Module):
    """x_i = smooth_i(lateral_i(map_i) + upsample(x_(i-1))), from the coarsest feature map to the finest.

    `channels`: those of the feature maps, coarse to fine; each map has half the height and width of the next, rounded up. Input: these
    maps `(B, C_i, H_i, W_i)` in that order; output `(B, dim, H, W)`, the size of the finest. `lateral` is a 1x1 convolution, `smooth` a
    3x3 convolution. Source: feature pyramids (Lin et al., 1612.03144, section 3). Deviation: the smoothing is part of the path.
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
            raise ValueError(f"got {len(maps)} feature maps: give {len(self.lateral)}, coarse to fine")
        x_BCHW: Tensor = self.lateral[0](maps[0])
        for skip, lateral, smooth, add in zip(maps[1:], self.lateral[1:], self.smooth, self.sum, strict=True):
            doubled = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
            x_BCHW = smooth(add(lateral(skip), doubled[:, :, : skip.shape[2], : skip.shape[3]]))  # the size of a skip may be odd
        return x_BCHW


def enlarged(x_BCHW: Tensor, factor: int, like: Tensor) -> Tensor:
    """Enlarge a map bilinearly by a factor and crop it to the height and width of another one, which is up to that much larger.

    The factor is the same for all sizes, odd ones too, so that a tile is enlarged as the whole is.
    """
    return F.interpolate(x_BCHW, scale_factor=float(factor), mode="bilinear")[:, :, : like.shape[2], : like.shape[3]]


class OneStepUpsampler(nn.Module):
    """fuse(sum_i upsample(lateral_i(map_i))): each feature map is enlarged to the size of the finest by one bilinear step.

    `channels`, input and output as of `ProgressiveUpsampler`. `lateral` is a 1x1 convolution, `fuse` a 3x3 convolution of the sum. Source:
    semantic FPNs (Kirillov et al., 1901.02446, section 3). Deviation: no convolutions before the enlargement.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvUnit(c, dim, kernel=1, activation=False) for c in channels)
        self.sum = nn.ModuleList(Sum() for _ in channels[1:])
        self.fuse = ConvUnit(dim, dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x_BCHW: Tensor = self.lateral[-1](maps[-1])
        for level, (map_, lateral, add) in enumerate(zip(maps[:-1], self.lateral[:-1], self.sum, strict=True)):
            x_BCHW = add(x_BCHW, enlarged(lateral(map_), 2 ** (len(maps) - 1 - level), maps[-1]))
        out: Tensor = self.fuse(x_BCHW)
        return out


class PyramidFusion(nn.Module):
    """fuse(concat_i upsample(smooth_i(p_i))), p_i = lateral_i(map_i) + upsample(p_(i-1)), with a global mean added to the coarsest p_0.

    `channels`, input and output as of `ProgressiveUpsampler`. All enlargements are bilinear. Source: UPerNet (Xiao et al., 1807.10221,
    section 3.1). Deviation: of the pyramid pooling only the global mean, since pooling to a fixed number of bins does not export with free
    sizes. With it, a tile depends on the whole picture.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvUnit(c, dim, kernel=1) for c in channels)
        self.context = nn.Conv2d(dim, dim, 1)
        self.smooth = nn.ModuleList(ConvUnit(dim, dim) for _ in channels)
        self.sum = nn.ModuleList(Sum() for _ in channels)
        self.fuse = ConvUnit(len(channels) * dim, dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x_BCHW = self.lateral[0](maps[0])
        x_BCHW = self.sum[0](x_BCHW, self.context(x_BCHW.mean((2, 3), keepdim=True)))
        levels = [self.smooth[0](x_BCHW)]
        for skip, lateral, smooth, add in zip(maps[1:], self.lateral[1:], self.smooth[1:], self.sum[1:], strict=True):
            x_BCHW = add(lateral(skip), enlarged(x_BCHW, 2, skip))
            levels.append(smooth(x_BCHW))
        coarse = [enlarged(map_, 2 ** (len(levels) - 1 - level), levels[-1]) for level, map_ in enumerate(levels[:-1])]
        out: Tensor = self.fuse(torch.cat([*coarse, levels[-1]], dim=1))
        return out


class PixelHead(nn.Module):
    """shuffle(gain · conv(x)): K scores for each pixel from a map at 1/`factor` of the size, with one 1x1 convolution.

    `(B, C, h, w) -> (B, K, factor·h, factor·w)`, which the caller crops to the picture's size. C·K·factor² multiply-adds a position at low
    resolution; no product runs at full resolution. Source: sub-pixel convolution (Shi et al., 1609.05158, section 3.2), initialised to
    repeat pixels (ICNR, Aitken et al., 1707.02937), so that training begins without a checkerboard pattern.

    `gain`: a factor of the scores, folded into the weights for deployment. The initial weights are divided by it, so the untrained layer
    does not depend on it. It speeds up the scores of a decoder with few channels. Source: learning rates by width (Yang & Hu, 2011.14522).
    Deviation: the factor was found by experiments (docs/log.md).
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
