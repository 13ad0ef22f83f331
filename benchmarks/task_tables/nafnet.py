"""A small NAFNet, a peer of restoration: a U-Net of blocks without activation functions, with a residual to the input.

Source: Chen et al., "Simple Baselines for Image Restoration" (2204.04676, sections 3 and 4). Deviation: one block a level, three levels;
pixels are 0-255; for a larger answer the last layer shuffles to it, and the residual is the input enlarged bilinearly.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

LEVELS = 3
DIVISOR = 1 << LEVELS
"""Sides are multiples of it (`model.size_divisor`)."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class GatedBlock(nn.Module):
    """Depth-wise convolution, product of halves, channel attention; then a perceptron with a product of halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.depthwise(self.expand(self.norm1(x_BCHW))).chunk(2, 1)
        gated = first * second
        gated = gated * self.attention(gated.mean((2, 3), keepdim=True))
        x_BCHW = x_BCHW + self.beta * self.project(gated)
        first, second = self.widen(self.norm2(x_BCHW)).chunk(2, 1)
        return x_BCHW + self.gamma * self.narrow(first * second)


class NAFNet(nn.Module):
    """Raw pixels `(B, C, H, W)`, sides divisible by `DIVISOR`, to a picture of `scale` times the sides."""

    def __init__(self, width: int, *, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        widths = [width << level for level in range(LEVELS)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.encoders = nn.ModuleList(GatedBlock(c) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths)
        self.middle = GatedBlock(2 * widths[-1])
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2)) for c in widths[::-1])
        self.decoders = nn.ModuleList(GatedBlock(c) for c in widths[::-1])
        self.last = nn.Conv2d(width, channels * scale**2, 3, padding=1)
        self.shuffle: nn.Module = nn.PixelShuffle(scale) if scale > 1 else nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.first(image_BCHW / 64 - 127.5 / 64)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x_BCHW = encoder(x_BCHW)
            skips.append(x_BCHW)
            x_BCHW = down(x_BCHW)
        x_BCHW = self.middle(x_BCHW)
        for up, decoder, skip in zip(self.ups, self.decoders, skips[::-1], strict=True):
            x_BCHW = decoder(up(x_BCHW) + skip)
        residual = 64 * self.shuffle(self.last(x_BCHW))
        given = image_BCHW if self.scale == 1 else F.interpolate(image_BCHW, scale_factor=float(self.scale), mode="bilinear")
        return given + residual


def width_16(*, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    """Create the one of 16 channels."""
    return NAFNet(16, channels=channels, scale=scale)


def width_32(*, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    """Create the one of 32 channels."""
    return NAFNet(32, channels=channels, scale=scale)
