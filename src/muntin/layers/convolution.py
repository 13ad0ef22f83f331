"""Convolutional units: convolution, norm and activation; a residual pair of them; a positional convolution.

Axes: B images, C channels, O output channels, H W map.
"""

from __future__ import annotations

from torch import Tensor, nn

from muntin.layers.gate import ChannelGate
from muntin.layers.norm import MapNorm
from muntin.layers.ops import Sum


class ConvUnit(nn.Module):
    """ReLU(norm(conv(x))), or norm(conv(x)), `(B, C, H, W) -> (B, O, ceil(H / stride), ceil(W / stride))`."""

    def __init__(self, channels: int, out: int, *, kernel: int = 3, stride: int = 1, groups: int = 1, activation: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm: nn.Module = MapNorm(out)
        self.activation: nn.Module = nn.ReLU() if activation else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(self.conv(x_BCHW)))
        return out


class ResidualPair(nn.Module):
    """ReLU(x + second(gate(first(x)))), `(B, C, H, W)` to the same shape; 18·C² multiply-adds a position.

    Source: the basic block of ResNet (He et al., 1512.03385, section 3.2). Deviation: the gate.
    """

    def __init__(self, channels: int, *, gate: bool = True) -> None:
        super().__init__()
        self.first = ConvUnit(channels, channels)
        self.gate = ChannelGate(channels, axis=-3) if gate else nn.Identity()
        self.second = ConvUnit(channels, channels, activation=False)
        self.sum = Sum()
        self.activation = nn.ReLU()

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The layer that writes the gated channels and the layer that reads them."""
        return self.first.conv, self.second.conv

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.sum(x_BCHW, self.second(self.gate(self.first(x_BCHW)))))
        return out


class PositionUnit(nn.Module):
    """x + depthwise 3x3 convolution of x, `(B, C, H, W)` to the same shape; 9·C multiply-adds a position. The zero padding marks positions.

    Source: conditional positional encodings (Chu et al., 2102.10882, section 3).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.sum = Sum()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.sum(x_BCHW, self.conv(x_BCHW))
        return out
