"""HybridNet: convolutions where resolution is high, hybrid attention where it is low, a decoder back to the pixel.

    image, 0-255 -> normalise -> convolutions at strides 2, 4, 8 -> blocks at stride 16 -> blocks at stride 32 -> ...
                                              |                         |                       |
                                              +--- skips -----------------> decoder <-----------+ -> PixelHead -> scores

A stem of two stages ends at stride 4, and blocks begin at 8. Every size H, W >= 1 works: strided convolutions round up, the decoder cuts to
its skips. An encoder of timm may take the place of all convolutions before the blocks:

    image, 0-255 -> Encoder -> maps at strides 2, 4, ... 32, the coarsest of them through blocks -> decoder -> PixelHead

Axes: B images, C channels, H W map, K scores, S windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from muntin.errors import RecipeError
from muntin.layers import (
    Attention,
    ConvUnit,
    DenseAttention,
    GlobalAttention,
    HybridAttention,
    LocalAttention,
    OneStepUpsampler,
    ParallelBlock,
    PixelHead,
    PositionUnit,
    ProgressiveUpsampler,
    PyramidFusion,
    ResidualPair,
    SerialBlock,
    Sum,
    merge,
    partition,
)
from muntin.models.config import ModelConfig
from muntin.models.encoder import Encoder

FUSIONS: dict[str, Callable[[list[int], int], nn.Module]] = {
    "progressive": ProgressiveUpsampler, "one-step": OneStepUpsampler, "upernet": PyramidFusion,
}  # fmt: skip
"""Decoders by `ModelConfig.fusion`."""
GAIN = 32.0
"""Gain of the class scores; see `PixelHead`."""


def build_attention(config: ModelConfig, dim: int) -> Attention:
    """Create the attention layer of a configuration."""
    heads = dim // config.head_dim
    if config.attention == "local":
        return LocalAttention(dim, heads=heads, window=config.window)
    if config.attention == "global":
        return GlobalAttention(dim, heads=heads, latents=config.latents)
    if config.attention == "dense":
        return DenseAttention(dim, heads=heads)
    return HybridAttention(dim, heads=heads, window=config.window, latents=config.latents, latent_heads=config.latent_heads(dim))


class Normalize(nn.Module):
    """Raw pixels 0-255 to about -2..2: (x - 127.5) / 64. The numbers are fixed, for all data sets."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 / 64) - 127.5 / 64


class AttentionStage(nn.Module):
    """Halves the map by a convolution, marks positions, then runs its blocks in windowed form.

    `(B, C, H, W) -> (B, dim, ceil(H / 2), ceil(W / 2))`; with `stride` 1 a 1x1 convolution leaves height and width as they are.
    """

    def __init__(self, config: ModelConfig, channels: int, dim: int, depth: int, *, stride: int = 2) -> None:
        super().__init__()
        block = ParallelBlock if config.block == "parallel" else SerialBlock
        self.reduce = ConvUnit(channels, dim, kernel=3 if stride > 1 else 1, stride=stride, activation=False)
        self.position = PositionUnit(dim)
        self.blocks = nn.ModuleList(
            block(dim, attention=build_attention(config, dim), mlp_ratio=config.mlp_ratio, gate=config.gate) for _ in range(depth)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.position(self.reduce(x_BCHW)).permute(0, 2, 3, 1)
        blocks = cast("list[ParallelBlock | SerialBlock]", list(self.blocks))
        t_STC, grid = partition(x_BHWC, blocks[0].window)
        for block in blocks:
            t_STC = block.attend(t_STC, grid)
        return merge(t_STC, grid).permute(0, 3, 1, 2)


class HybridNet(nn.Module):
    """A vision model for segmentation, classification or restoration.

    Input: raw pixels, float 0-255, `(B, channels, H, W)`, any H, W >= 1. Output: scores `(B, K, H, W)` (segment), `(B, K)` (classify),
    or an image 0-255 `(B, channels, scale·H, scale·W)` (restore). Time and memory are O(H·W); with `attention="dense"` time is O((H·W)²).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        attended = len(config.dims)
        if config.encoder is None:
            c2, c4, *c8 = config.stem
            self.normalize = Normalize()
            self.stem = nn.Sequential(ConvUnit(config.channels, c2, stride=2), ConvUnit(c2, c4, stride=2))
            self.stage4 = nn.Sequential(*(ResidualPair(c4, gate=config.gate) for _ in range(config.pairs[0])))
            if c8:
                self.stage8 = nn.Sequential(
                    ConvUnit(c4, c8[0], stride=2), *(ResidualPair(c8[0], gate=config.gate) for _ in range(config.pairs[1]))
                )
            channels = [*config.stem, *config.dims]
            strides = [2 * 2**level for level in range(len(channels))]
            inputs, stride = channels[-attended - 1 : -1], 2  # a stage reads the one before
        else:
            self.encoder = Encoder(config.encoder, config.channels)
            _check_encoder(self.encoder, config)
            strides, inputs, stride = list(self.encoder.strides), list(self.encoder.channels[-attended:]), 1
            channels = [*self.encoder.channels[:-attended], *config.dims]
        self.stages = nn.ModuleList(
            AttentionStage(config, c, dim, depth, stride=stride) for c, dim, depth in zip(inputs, config.dims, config.depths, strict=True)
        )
        self.levels = sum(stride >= config.finest for stride in strides)  # maps that the decoder reads, from the coarsest
        if config.answer.one:
            self.head: nn.Module = nn.Linear(config.dims[-1], config.outputs)
        else:
            self.decoder = FUSIONS[config.fusion](channels[::-1][: self.levels], config.decoder)
            gain = 1.0 if config.answer.picture else GAIN
            self.head = PixelHead(config.decoder, config.outputs, config.finest * config.scale, gain)
        if config.answer.picture:
            self.enlarge = nn.Upsample(scale_factor=config.scale, mode="bilinear") if config.scale > 1 else nn.Identity()
            self.sum = Sum()
            nn.init.zeros_(self.head.conv.weight)  # type: ignore[arg-type, union-attr]  # so that training starts with the image itself

    def forward(self, image_BCHW: Tensor) -> Tensor:
        height, width = image_BCHW.shape[2:]
        maps = self._maps(image_BCHW)
        if self.config.answer.one:
            scores_BK: Tensor = self.head(maps[-1].mean((2, 3)))
            return scores_BK
        scale = self.config.scale
        scores: Tensor = self.head(self.decoder(maps[::-1][: self.levels]))[:, :, : scale * height, : scale * width]
        if self.config.answer.picture:
            scores = self.sum(self.enlarge(image_BCHW), scores * 64)  # the head's unit is the normalised one
        return scores

    def _maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """The feature maps, from fine to coarse; the last ones come from the attention stages."""
        if self.config.encoder is not None:
            maps: list[Tensor] = self.encoder(image_BCHW)
            first = len(maps) - len(self.stages)
            return [*maps[:first], *(stage(map_) for stage, map_ in zip(self.stages, maps[first:], strict=True))]
        maps = [self.stem[0](self.normalize(image_BCHW))]
        maps.append(self.stage4(self.stem[1](maps[0])))
        for stage in (*([self.stage8] if len(self.config.stem) > 2 else []), *self.stages):
            maps.append(stage(maps[-1]))
        return maps


def _check_encoder(encoder: Encoder, config: ModelConfig) -> None:
    """Raise `RecipeError` if an encoder has too few maps for a configuration."""
    strides = ", ".join(map(str, encoder.strides))
    if len(config.dims) > len(encoder.strides):
        raise RecipeError(
            f"encoder '{encoder.name}' has maps at strides {strides}, too few for {len(config.dims)} attention stages: give shorter "
            "options dims and depths"
        )
    if not config.answer.one and config.finest not in encoder.strides:
        ends = [str(stride) for stride in (2, 4, 8) if stride in encoder.strides]
        advice = f"set the option finest to {' or '.join(ends)}" if ends else "take an encoder that has stride 2, 4 or 8"
        raise RecipeError(
            f"encoder '{encoder.name}' has maps at strides {strides}, and the decoder ends at stride {config.finest}: {advice}"
        )
