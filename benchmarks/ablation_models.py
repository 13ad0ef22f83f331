"""What `ablation.py` replaces in hybrid-s where its configuration has no option: factories that a recipe names as its model.

Each takes hybrid-s as it is made, the same random numbers in every layer that stays, and changes one thing.

Axes: B images, C channels, H W map, S windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers import ConvUnit, Grid, ParallelBlock, ProgressiveUpsampler, Sum, TokenNorm
from muntin.layers.block import Perceptron
from muntin.models import HybridNet, Task, create_model


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


class OneStepUpsampler(nn.Module):
    """Every map to the size of the finest by one bilinear step, summed, then smoothed once: a decoder without stages.

    `(B, C_i, H_i, W_i)` coarse to fine -> `(B, dim, H, W)` of the finest; the projections are those of `ProgressiveUpsampler`.
    """

    def __init__(self, lateral: nn.ModuleList, dim: int) -> None:
        super().__init__()
        self.lateral = lateral
        self.sum = Sum()
        self.smooth = ConvUnit(dim, dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        projected = [lateral(x_BCHW) for lateral, x_BCHW in zip(self.lateral, maps, strict=True)]
        size = projected[-1].shape[2:]
        coarse = [F.interpolate(x_BCHW, size, mode="bilinear") for x_BCHW in projected[:-1]]
        out: Tensor = self.smooth(self.sum(projected[-1], *coarse))
        return out


def _hybrid(task: Task, classes: int, channels: int) -> HybridNet:
    return cast(HybridNet, create_model("hybrid-s", task=task, classes=classes, channels=channels))


def _blocks(model: HybridNet) -> list[ParallelBlock]:
    return [module for module in model.modules() if isinstance(module, ParallelBlock)]


def without_position(*, task: Task, classes: int, channels: int) -> nn.Module:
    """No depthwise convolution before the blocks: nothing tells tokens where they stand."""
    model = _hybrid(task, classes, channels)
    for stage in model.stages:
        stage.position = nn.Identity()
    return model


def with_layer_norm(*, task: Task, classes: int, channels: int) -> nn.Module:
    """LayerNorm in the blocks; the convolutions keep their norms."""
    model = _hybrid(task, classes, channels)
    for block in _blocks(model):
        block.norm = cast(TokenNorm, LayerNorm(block.norm.dim))
    return model


def with_gelu(*, task: Task, classes: int, channels: int) -> nn.Module:
    """GELU in the blocks' perceptrons; the convolutions keep ReLU."""
    model = _hybrid(task, classes, channels)
    for block in _blocks(model):
        block.mlp = GeluPerceptron(block.mlp)
    return model


def with_one_step_decoder(*, task: Task, classes: int, channels: int) -> nn.Module:
    """A decoder without stages; the last step to the pixel stays."""
    model = _hybrid(task, classes, channels)
    model.decoder = cast(ProgressiveUpsampler, OneStepUpsampler(model.decoder.lateral, model.config.decoder))
    return model
