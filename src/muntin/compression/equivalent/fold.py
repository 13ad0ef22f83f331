"""Folding muntin's own affine operations: norms into convolutions and projections, gates into the layer before.

The result is the same in exact arithmetic. Folding comes before quantisation, which then sees the weights that will run.

Axes: O output and I input channels of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from muntin.compression.history import remember
from muntin.compression.low_rank.factored_layers import FactoredConv2d, FactoredLinear
from muntin.compression.rewrite import named, tied
from muntin.layers import ChannelGate, ConvUnit, Gain, MapNorm, PixelHead, ResidualPair, TokenNorm
from muntin.layers.block import ParallelBlock, Perceptron, SerialBlock
from muntin.layers.windows import Grid
from muntin.models.compression_record import Change


class Folded(nn.Module):
    """The identity in the place of a folded `TokenNorm`."""

    def forward(self, t_STC: Tensor, grid: Grid) -> Tensor:
        return t_STC


def first_part(layer: nn.Module) -> nn.Module:
    """The part of a layer that reads its input: the layer itself unless it is factored."""
    return layer.reduce if isinstance(layer, FactoredLinear | FactoredConv2d) else layer


def last_part(layer: nn.Module) -> nn.Module:
    """The part of a layer that gives its output."""
    return layer.expand if isinstance(layer, FactoredLinear | FactoredConv2d) else layer


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    if layer.bias is None:
        zeros = torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return layer.bias


def fold_after(layer: nn.Module, norm: MapNorm) -> None:
    """norm(conv(x)) becomes conv(x): the norm's affine map goes into the weight's rows and the bias."""
    conv = last_part(layer)
    assert isinstance(conv, nn.Conv2d)
    a_O, b_O = norm.affine()
    bias_O = _bias(conv)
    conv.weight.mul_(a_O.reshape(-1, 1, 1, 1))
    bias_O.mul_(a_O).add_(b_O)


def fold_before(norm: TokenNorm, layer: nn.Module) -> None:
    """linear(norm(x)) becomes linear(x): the norm's affine map goes into the weight's columns and the bias."""
    linear = first_part(layer)
    assert isinstance(linear, nn.Linear)
    a_I, b_I = norm.affine()
    _bias(linear).add_(linear.weight @ b_I)
    linear.weight.mul_(a_I)


def fold_gate(layer: nn.Module, gate: ChannelGate) -> None:
    """gate(relu(layer(x))) becomes relu(layer(x)), since gates are not negative. `layer` may be a norm."""
    last = last_part(layer)
    assert isinstance(last, nn.Linear | nn.Conv2d | MapNorm)
    g_O = gate.openness()
    last.weight.mul_(g_O.reshape(-1, *(1,) * (last.weight.ndim - 1)))
    (last.bias if isinstance(last, MapNorm) else _bias(last)).mul_(g_O)


def _fold_unit(unit: ConvUnit) -> str | None:
    if not isinstance(unit.norm, MapNorm) or not isinstance(unit.conv, nn.Conv2d | FactoredConv2d):
        return None
    fold_after(unit.conv, unit.norm)
    unit.norm = nn.Identity()
    return "norm folded into the convolution before it"


def _linear(*layers: nn.Module) -> bool:
    return all(isinstance(layer, nn.Linear | FactoredLinear) for layer in layers)


def _fold_block(block: ParallelBlock | SerialBlock) -> str | None:
    entrances, expand = block.attention.entrances, block.mlp.expand
    if isinstance(block, ParallelBlock):
        readers: dict[str, tuple[nn.Module, ...]] = {"norm": (*entrances, expand)}
    else:
        readers = {"norm_attention": entrances, "norm_mlp": (expand,)}
    norms = {name: block.get_submodule(name) for name in readers}
    if not all(isinstance(norm, TokenNorm) for norm in norms.values()) or not _linear(*entrances, expand):
        return None
    for name, norm in norms.items():
        for layer in readers[name]:
            fold_before(cast(TokenNorm, norm), layer)
        setattr(block, name, Folded())
    return "norms folded into the projections that read them"


def _fold_perceptron(mlp: Perceptron) -> str | None:
    if not isinstance(mlp.gate, ChannelGate) or not _linear(mlp.expand) or not isinstance(mlp.activation, nn.ReLU):
        return None
    fold_gate(mlp.expand, mlp.gate)
    mlp.gate = nn.Identity()
    return "gate folded into the projection before it"


def _fold_pair(pair: ResidualPair) -> str | None:
    unit = pair.first
    before = unit.conv if isinstance(unit.norm, nn.Identity) else unit.norm
    if not isinstance(pair.gate, ChannelGate) or not isinstance(before, MapNorm | nn.Conv2d | FactoredConv2d):
        return None
    if not isinstance(unit.activation, nn.ReLU):
        return None
    fold_gate(before, pair.gate)
    pair.gate = nn.Identity()
    return "gate folded into the convolution before it"


def _fold_head(head: PixelHead) -> str | None:
    conv = last_part(head.conv)
    if not isinstance(head.gain, Gain) or not isinstance(conv, nn.Conv2d):
        return None
    conv.weight.mul_(head.gain.factor)
    if conv.bias is not None:
        conv.bias.mul_(head.gain.factor)
    head.gain = nn.Identity()
    return "gain folded into the convolution before it"


RULES: dict[type[nn.Module], Callable[..., str | None]] = {
    ConvUnit: _fold_unit,
    ParallelBlock: _fold_block,
    SerialBlock: _fold_block,
    Perceptron: _fold_perceptron,
    ResidualPair: _fold_pair,
    PixelHead: _fold_head,
}
"""How to fold each kind of unit. A rule returns what it did, or None if there is nothing to fold."""


@torch.no_grad()
def fold(model: nn.Module) -> list[Change]:
    """Fold every norm, gate and gain of muntin's layers, in place; the model must be in `eval` mode. Idempotent.

    A unit whose layers or weights are also used elsewhere is kept. Layers of other libraries are left to `fold_batch_norms`.
    """
    if model.training:
        raise ValueError("fold needs the statistics of a trained model: call model.eval() first")
    changes = []
    units = {name: unit for name, unit in named(model, *RULES) if type(unit) in RULES}  # a subclass may compute something else
    reasons = tied(model, units)
    for name, unit in units.items():
        if name in reasons:
            if any(isinstance(part, MapNorm | TokenNorm | ChannelGate | Gain) for part in unit.children()):
                changes.append(Change(layer=name, pass_="fold", done="kept", reason=reasons[name]))
        elif (done := RULES[type(unit)](unit)) is not None:
            changes.append(Change(layer=name, pass_="fold", done=done))
    return remember(model, changes)
