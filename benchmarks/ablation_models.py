"""Factories for `ablation.py` that change a preset where its configuration has no option. A recipe names them as its model.

Each creates the preset, keeps the same random numbers in all other layers, and changes one thing. A recipe passes no options to a factory,
so there is one of each kind for each preset: `without_position_hybrid_s`, `with_gelu_hybrid_xs`, ... (`factory_name`).

Axes: B images, C channels, H W map, S windows, T tokens a window.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from muntin.layers import ConvUnit, Grid, ParallelBlock, Perceptron, PixelHead, ProgressiveUpsampler, PyramidFusion, Sum, TokenNorm
from muntin.models import HybridNet, create_model
from muntin.models.hybridnet import GAIN, AttentionStage


class LayerNorm(nn.Module):
    """Normalises each token over its channels: the statistics depend on the image, so nothing folds away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, t_STC: Tensor, grid: Grid) -> Tensor:
        out: Tensor = self.norm(t_STC)
        return out


class GeluPerceptron(Perceptron):
    """GELU for ReLU. The gate behind it does not fold into the layer before, because GELU is not linear in a scale."""

    def __init__(self, like: Perceptron) -> None:
        nn.Module.__init__(self)
        self.expand, self.gate, self.reduce = like.expand, like.gate, like.reduce
        self.activation = cast(nn.ReLU, nn.GELU())


class ConvolutionBlock(nn.Module):
    """x + conv(conv(x)), 3 x 3, `hidden` channels in between, then ReLU: `(B, C, H, W)` to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = ConvUnit(channels, hidden), ConvUnit(hidden, channels, activation=False)
        self.sum, self.activation = Sum(), nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.sum(x_BCHW, self.second(self.first(x_BCHW))))
        return out


def _blocks(model: HybridNet) -> list[ParallelBlock]:
    return [module for module in model.modules() if isinstance(module, ParallelBlock)]


def without_position(model: HybridNet) -> None:
    """No depthwise convolution before the blocks: tokens do not know their positions."""
    for stage in model.stages:
        stage.position = nn.Identity()


def with_convolutions(model: HybridNet) -> None:
    """No attention: each block is two 3 x 3 convolutions of as many multiply-adds; they know positions, so no `PositionUnit` either."""
    config = model.config
    for number, stage in enumerate(cast("list[AttentionStage]", list(model.stages))):
        dim = config.dims[number]
        local = dim - dim // config.head_dim // 2 * config.head_dim
        global_heads = (dim - local) // config.head_dim
        projections = dim * (3 * local + (dim - local) + 2 * global_heads * config.latents) + dim**2
        products = 2 * config.window**2 * local + 2 * config.latents * (dim - local)
        hidden = round((projections + products + 2 * config.mlp_ratio * dim**2) / (18 * dim) / 16) * 16
        model.stages[number] = nn.Sequential(stage.reduce, *(ConvolutionBlock(dim, hidden) for _ in stage.blocks))


def with_layer_norm(model: HybridNet) -> None:
    """LayerNorm in the blocks; the convolutions keep their norms."""
    for block in _blocks(model):
        block.norm = cast(TokenNorm, LayerNorm(block.norm.dim))


def with_gelu(model: HybridNet) -> None:
    """GELU in the blocks' MLPs; the convolutions keep ReLU."""
    for block in _blocks(model):
        block.mlp = GeluPerceptron(block.mlp)


def with_uper_decoder(model: HybridNet) -> None:
    """A head like UPerNet's, half as wide, which has about as many multiply-adds; the last step to the pixel stays."""
    config = model.config
    maps = [lateral.conv.in_channels for lateral in cast("list[ConvUnit]", list(model.decoder.lateral))]
    model.decoder = cast(ProgressiveUpsampler, PyramidFusion(maps, config.decoder // 2))
    model.head = PixelHead(config.decoder // 2, config.outputs, config.finest * config.scale, GAIN)


BASES = ("hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m")
"""Presets that can be taken apart."""


def factory_name(kind: str, preset: str) -> str:
    return f"{kind}_{preset.replace('-', '_')}"


def _changed(preset: str, change: Any, **arguments: Any) -> nn.Module:
    model = cast(HybridNet, create_model(preset, **arguments))
    change(model)
    return model


for _change in (without_position, with_convolutions, with_layer_norm, with_gelu, with_uper_decoder):
    for _preset in BASES:
        globals()[factory_name(_change.__name__, _preset)] = partial(_changed, _preset, _change)
