"""The parts of a network whose time is measured once: the stem, a convolutional stage, an attention stage's beginning, a block, a level of
the decoder, the last layer.

Two networks with the same part at the same map have the same key for it. Classifiers end without a part: their last layer is small.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers import ConvUnit, PixelHead, ResidualPair, Sum
from muntin.layers.upsample import enlarged
from muntin.models import ModelConfig
from muntin.models.hybridnet import GAIN, AttentionStage, Normalize
from muntin.searching.slices import strides
from muntin.searching.space import Architecture

BLOCK = ".blocks.0."
"""In names of kernels of an attention stage: those of its block."""


@dataclass(frozen=True, kw_only=True)
class PartProbe:
    """A module that is measured for one or two parts. It takes maps of `channels` and `side` and gives `outputs` channels, 0: an answer.

    `keys`: the part, or for an attention stage its beginning and its block. `pixels`: True if it takes a picture.
    """

    keys: tuple[str, ...]
    build: Callable[[], nn.Module]
    channels: int
    side: int
    outputs: int
    rank_share: float = 1.0
    low: int = 0
    """Channels of a second map of half the size, which a level of the decoder takes, too."""
    pixels: bool = False


class DecoderLevel(nn.Module):
    """One level of a `ProgressiveUpsampler`: smooth(lateral(skip) + upsample(x)), `(B, D, H/2, W/2), (B, C, H, W) -> (B, D, H, W)`."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.lateral = ConvUnit(channels, dim, kernel=1, activation=False)
        self.smooth = ConvUnit(dim, dim)
        self.sum = Sum()

    def forward(self, x_BDHW: Tensor, skip_BCHW: Tensor) -> Tensor:
        doubled = F.interpolate(x_BDHW, scale_factor=2.0, mode="nearest")
        out: Tensor = self.smooth(self.sum(self.lateral(skip_BCHW), doubled[:, :, : skip_BCHW.shape[2], : skip_BCHW.shape[3]]))
        return out


class PyramidLevel(nn.Module):
    """One level of a `PyramidFusion`, enlarged `factor` times: `(B, D, H/2, W/2), (B, C, H, W) -> (B, D, factor·H, factor·W)`.

    The first one takes no level before it, and has the context.
    """

    def __init__(self, channels: int, dim: int, factor: int, *, first: bool) -> None:
        super().__init__()
        self.factor = factor
        self.lateral = ConvUnit(channels, dim, kernel=1)
        self.context: nn.Module | None = nn.Conv2d(dim, dim, 1) if first else None
        self.smooth = ConvUnit(dim, dim)
        self.sum = Sum()

    def forward(self, *maps: Tensor) -> Tensor:
        x_BDHW: Tensor = self.lateral(maps[-1])
        if self.context is None:
            x_BDHW = self.sum(x_BDHW, enlarged(maps[0], 2, x_BDHW))
        else:
            x_BDHW = self.sum(x_BDHW, self.context(x_BDHW.mean((2, 3), keepdim=True)))
        x_BDHW = self.smooth(x_BDHW)
        return x_BDHW if self.factor == 1 else F.interpolate(x_BDHW, scale_factor=float(self.factor), mode="bilinear")


def parts_of(architecture: Architecture, side: int) -> list[tuple[str, int, PartProbe]]:
    """The parts of an architecture for a picture of `side` pixels a side: key, number of times, and what measures it."""
    config, share = architecture.config, architecture.rank_share
    side = max(1, round(architecture.resolution * side))
    ranks = "" if share == 1 else f", rank share {share:g}"
    sides = {stride: ceil(side / stride) for stride in (1, *strides(config))}
    found: list[tuple[str, int, PartProbe]] = []

    def add(key: str, build: Callable[[], nn.Module], **probe: Any) -> None:
        found.append((key + ranks, 1, PartProbe(keys=(key + ranks,), build=build, rank_share=share, **probe)))

    c2, c4, *c8 = config.stem
    add(
        f"stem, {config.channels} to {c2} to {c4} channels, {config.pairs[0]} pairs, {side}x{side}", lambda: _stem(config),
        channels=config.channels, side=side, outputs=c4, pixels=True,
    )  # fmt: skip
    if c8:
        add(
            f"convolutional stage, {c4} to {c8[0]} channels, {config.pairs[1]} pairs, {sides[4]}x{sides[4]}",
            lambda: nn.Sequential(ConvUnit(c4, c8[0], stride=2), *(ResidualPair(c8[0], gate=False) for _ in range(config.pairs[1]))),
            channels=c4, side=sides[4], outputs=c8[0],
        )  # fmt: skip
    before = 8 if c8 else 4
    channels = config.stem[-1]
    for dim, depth in zip(config.dims, config.depths, strict=True):
        found += _stage(config, channels, dim, depth, sides[before], share, ranks)
        channels, before = dim, 2 * before
    if not config.answer.one:
        for key, build, probe in _decoder(config, sides):
            add(key, build, **probe)
    return found


def _stem(config: ModelConfig) -> nn.Module:
    c2, c4 = config.stem[:2]
    pairs = [ResidualPair(c4, gate=False) for _ in range(config.pairs[0])]
    return nn.Sequential(Normalize(), ConvUnit(config.channels, c2, stride=2), ConvUnit(c2, c4, stride=2), *pairs)


def _stage(
    config: ModelConfig, channels: int, dim: int, depth: int, side: int, share: float, ranks: str
) -> list[tuple[str, int, PartProbe]]:  # fmt: skip
    """Beginning and blocks of an attention stage, which one probe measures."""
    windows = f"window {config.window}, " if config.attention in ("hybrid", "local") else ""
    latents = f"latents {config.latents}, " if config.attention in ("hybrid", "global") else ""
    latents += f"in {config.latent_heads(dim)} heads, " if config.attention == "hybrid" else ""
    cut = config.window if windows else 0
    map_ = f"{ceil(side / 2)}x{ceil(side / 2)}"
    begin = f"beginning of an attention stage, {channels} to {dim} channels, windows {cut}, {map_}{ranks}"
    block = (
        f"{config.block} block, {config.attention}, {dim} channels, heads of {config.head_dim}, {windows}{latents}"
        f"mlp {config.mlp_ratio:g}, {map_}{ranks}"
    )
    plain = config.model_copy(update={"gate": False})
    probe = PartProbe(
        keys=(begin, block), build=lambda: AttentionStage(plain, channels, dim, 1), channels=channels, side=side, outputs=dim,
        rank_share=share,
    )  # fmt: skip
    return [(begin, 1, probe), (block, depth, probe)]


def _decoder(config: ModelConfig, sides: dict[int, int]) -> list[tuple[str, Callable[[], nn.Module], dict[str, Any]]]:
    """Key, module and sizes of each level of the decoder, from the coarsest, of what joins them, and of the last layer."""
    dim, finest, fusion = config.decoder, config.finest, config.fusion
    maps = list(zip(strides(config), (*config.stem, *config.dims), strict=True))
    levels = [(stride, channels) for stride, channels in maps if stride >= finest][::-1]
    parts: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = []
    for index, (stride, channels) in enumerate(levels):
        side, sizes = sides[stride], {"channels": channels, "side": sides[stride], "outputs": dim}
        what, factor = f"{channels} to {dim} channels, {side}x{side}", stride // finest
        if fusion == "one-step":
            parts.append((f"map of a one-step decoder, {what} by {factor}", partial(_enlarged, channels, dim, factor), sizes))
        elif fusion == "upernet":
            first, two = index == 0, {} if index == 0 else {"low": dim}
            key = f"{'coarsest' if first else 'next'} level of a pyramid, {what} by {factor}"
            parts.append((key, partial(PyramidLevel, channels, dim, factor, first=first), {**sizes, **two}))
        elif index == 0:
            parts.append((f"coarsest map of the decoder, {what}", partial(_lateral, channels, dim), sizes))
        else:
            parts.append((f"level of the decoder, {what}", partial(DecoderLevel, channels, dim), {**sizes, "low": dim}))
    if fusion != "progressive":
        joined = dim if fusion == "one-step" else dim * len(levels)
        sizes = {"channels": joined, "side": sides[finest], "outputs": dim}
        parts.append(
            (f"end of the decoder, {joined} to {dim} channels, {sides[finest]}x{sides[finest]}", partial(ConvUnit, joined, dim), sizes)
        )
    gain = GAIN if config.answer.has_classes else 1.0
    factor = finest * config.scale
    key = f"last layer, {dim} channels to {config.outputs} of {factor}x{factor}, {sides[finest]}x{sides[finest]}"
    parts.append((key, lambda: PixelHead(dim, config.outputs, factor, gain), {"channels": dim, "side": sides[finest], "outputs": 0}))
    return parts


def _lateral(channels: int, dim: int) -> nn.Module:
    return ConvUnit(channels, dim, kernel=1, activation=False)


def _enlarged(channels: int, dim: int, factor: int) -> nn.Module:
    """One map of a `OneStepUpsampler`, without the sum."""
    lateral = _lateral(channels, dim)
    return lateral if factor == 1 else nn.Sequential(lateral, nn.Upsample(scale_factor=float(factor), mode="bilinear"))
