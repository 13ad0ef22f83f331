"""Factories for `ablation.py` that change a preset where its configuration has no option. A recipe names them as its model.

Each creates the preset, keeps the same random numbers in all other layers, and changes one thing. A recipe passes no options to a factory,
so there is one of each kind for each preset: `without_position_hybrid_s`, `with_gelu_hybrid_xs`, ... (`factory_name`).

Axes: B images, C channels, H W map, S windows, T tokens a window.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn

from muntin.artifact.manifest import Task
from muntin.layers import ConvUnit, Grid, ParallelBlock, Perceptron, PixelHead, ProgressiveUpsampler, PyramidFusion, Sum, TokenNorm
from muntin.models import HybridNet, create_model
from muntin.models.hybridnet import GAIN, AttentionStage


class LayerNorm(nn.Module):
    """Normalises each token over its channels: statistics of the image itself, so nothing folds away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, t_STC: Tensor, grid: Grid) -> Tensor:
        out: Tensor = self.norm(t_STC)
        return out


class GeluPerceptron(Perceptron):
    """GELU for ReLU. A kind of its own, since the gate behind it does not fold into the layer before: GELU is not linear in a scale."""

    def __init__(self, like: Perceptron) -> None:
        nn.Module.__init__(self)
        self.expand, self.gate, self.reduce = like.expand, like.gate, like.reduce
        self.activation = cast(nn.ReLU, nn.GELU())


class ConvolutionBlock(nn.Module):
    """x + conv(conv(x)), 3 x 3, `hidden` channels in between, then ReLU: `(B, C, H, W)` to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = ConvUnit(channels, hidden)
        self.second = ConvUnit(hidden, channels, activation=False)
        self.sum = Sum()
        self.activation = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.sum(x_BCHW, self.second(self.first(x_BCHW))))
        return out


def _hybrid(preset: str, task: Task, classes: int, channels: int) -> HybridNet:
    return cast(HybridNet, create_model(preset, task=task, classes=classes, channels=channels))


def _blocks(model: HybridNet) -> list[ParallelBlock]:
    return [module for module in model.modules() if isinstance(module, ParallelBlock)]


def without_position(preset: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """No depthwise convolution before the blocks: nothing tells tokens where they stand."""
    model = _hybrid(preset, task, classes, channels)
    for stage in model.stages:
        stage.position = nn.Identity()
    return model


def with_convolutions(preset: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """No attention: each block is two 3 x 3 convolutions of as many multiply-adds; they know positions, so no `PositionUnit` either."""
    model = _hybrid(preset, task, classes, channels)
    for number, stage in enumerate(cast("list[AttentionStage]", list(model.stages))):
        dim, config = model.config.dims[number], model.config
        local = dim - dim // config.head_dim // 2 * config.head_dim
        global_heads = (dim - local) // config.head_dim
        projections = dim * (3 * local + (dim - local) + 2 * global_heads * config.latents) + dim**2
        products = 2 * config.window**2 * local + 2 * config.latents * (dim - local)
        hidden = round((projections + products + 2 * config.mlp_ratio * dim**2) / (18 * dim) / 16) * 16
        blocks = (ConvolutionBlock(dim, hidden) for _ in stage.blocks)
        model.stages[number] = nn.Sequential(stage.reduce, *blocks)
    return model


def with_layer_norm(preset: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """LayerNorm in the blocks; the convolutions keep their norms."""
    model = _hybrid(preset, task, classes, channels)
    for block in _blocks(model):
        block.norm = cast(TokenNorm, LayerNorm(block.norm.dim))
    return model


def with_gelu(preset: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """GELU in the blocks' perceptrons; the convolutions keep ReLU."""
    model = _hybrid(preset, task, classes, channels)
    for block in _blocks(model):
        block.mlp = GeluPerceptron(block.mlp)
    return model


def with_uper_decoder(preset: str, *, task: Task, classes: int, channels: int) -> nn.Module:
    """A head like UPerNet's, half as wide, which has about as many multiply-adds; the last step to the pixel stays."""
    model = _hybrid(preset, task, classes, channels)
    config = model.config
    maps = [lateral.conv.in_channels for lateral in cast("list[ConvUnit]", list(model.decoder.lateral))]
    model.decoder = cast(ProgressiveUpsampler, PyramidFusion(maps, config.decoder // 2))
    model.head = PixelHead(config.decoder // 2, config.outputs, config.finest * config.scale, GAIN)
    return model


BASES = ("hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m")
"""Presets that can be taken apart."""
KINDS = (without_position, with_convolutions, with_layer_norm, with_gelu, with_uper_decoder)


def factory_name(kind: str, preset: str) -> str:
    return f"{kind}_{preset.replace('-', '_')}"


for _kind in KINDS:
    for _preset in BASES:
        globals()[factory_name(_kind.__name__, _preset)] = partial(_kind, _preset)
