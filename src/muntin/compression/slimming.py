"""Removing channels that a gate has closed: the layer before and the layer behind become narrower, and compute less.

    Perceptron     expand (I -> hidden), ReLU, gate, reduce (hidden -> O)
    ResidualPair   convolution, norm, ReLU, gate, convolution

A gate that is closed is 0 for every image, so nothing changes in exact arithmetic.

Axes: C hidden channels, those that the gate weighs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from muntin.compression.factored import FactoredConv2d, FactoredLinear
from muntin.compression.rewrite import named, tied
from muntin.errors import MuntinError
from muntin.layers import ChannelGate, Gated, MapNorm, Perceptron, ResidualPair
from muntin.layers.gate import BLOCK
from muntin.models.compression_record import Change


@torch.no_grad()
def remove_closed_channels(model: nn.Module) -> list[Change]:
    """Cut the channels that gates have closed out of `model`, in place, before norms and gates are folded.

    `training.gate_budget` makes training close them. Of a unit's closed channels as many stay as make its width a multiple of `BLOCK`;
    layers may be factored already. A unit whose layers another one holds, too, is not cut. Gives one `Change` a gate that is not all open.
    Costs a copy of the weights that stay.
    """
    changes = []
    units = dict(_units(model))
    reasons = tied(model, units)
    for name, unit in units.items():
        gate = unit.gate
        if not isinstance(gate, ChannelGate) or gate.open_channels().all():
            continue
        kept = _kept(gate)
        shut = int((~gate.open_channels()).sum())
        if isinstance(unit, ResidualPair) and not isinstance(unit.first.norm, MapNorm | nn.Identity):
            reason = f"a {type(unit.first.norm).__name__} stands before the gate: it cannot be cut"
            changes.append(Change(layer=name, pass_="slim", done="kept", reason=reason))
            continue
        if name in reasons:
            changes.append(Change(layer=name, pass_="slim", done="kept", reason=reasons[name]))
            continue
        if len(kept) == gate.dim:
            reason = f"{shut} of {gate.dim} channels are closed: the rest fills as many blocks of {BLOCK}"
            changes.append(Change(layer=name, pass_="slim", done="kept", reason=reason))
            continue
        changes.append(Change(layer=name, pass_="slim", done=f"{len(kept)} of {gate.dim} channels", reason=f"{shut} are closed"))
        _cut(unit, kept)
    return changes


def widths_of(model: nn.Module) -> dict[str, int]:
    """The hidden channels of each unit that has them, by dotted name: what a checkpoint has to say beside its weights."""
    return {name: _width(unit) for name, unit in _units(model)}


def apply_widths(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Make units as narrow as `widths` says, whatever is cut: load the weights of a checkpoint next.

    Raises `MuntinError` for a name that is no such unit of the model, or a width that it does not have.
    """
    units = dict(_units(model))
    for name, width in widths.items():
        unit = units.get(name)
        if unit is None or not 0 < width <= _width(unit):
            what = "is not in the model" if unit is None else f"has {_width(unit)} hidden channels, not {width}"
            raise MuntinError(f"widths: '{name}' {what}: build the model that the checkpoint was made of")
    for name, width in widths.items():
        if width < _width(units[name]):
            _cut(units[name], torch.arange(width))


def _units(model: nn.Module) -> Iterator[tuple[str, Gated]]:
    return named(model, Perceptron, ResidualPair)


def _kept(gate: ChannelGate) -> Tensor:
    """The channels that stay, in their order: the open ones, and as many closed ones as fill a block."""
    still = int(gate.open_channels().sum())
    wanted = min(gate.dim, max(1, -(-still // BLOCK)) * BLOCK)
    return gate.logit.topk(wanted).indices.sort().values


def _width(unit: Gated) -> int:
    before, _ = _ends(unit)
    return before.weight.shape[0]


def _ends(unit: Gated) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """The layer that gives the hidden channels and the one that reads them."""
    before, behind = unit.ends
    before = before.last if isinstance(before, FactoredLinear | FactoredConv2d) else before
    behind = behind.first if isinstance(behind, FactoredLinear | FactoredConv2d) else behind
    assert isinstance(before, nn.Linear | nn.Conv2d) and isinstance(behind, nn.Linear | nn.Conv2d)
    return before, behind


def _cut(unit: Gated, kept_C: Tensor) -> None:
    before, behind = _ends(unit)
    kept_C = kept_C.to(before.weight.device)
    before.weight = _part(before.weight, kept_C)
    if before.bias is not None:
        before.bias = _part(before.bias, kept_C)
    behind.weight = _part(behind.weight, kept_C, axis=1)
    _narrow(before, len(kept_C), output=True)
    _narrow(behind, len(kept_C), output=False)
    if isinstance(unit, ResidualPair) and isinstance(norm := unit.first.norm, MapNorm):
        norm.dim = len(kept_C)
        norm.weight, norm.bias = _part(norm.weight, kept_C), _part(norm.bias, kept_C)
        norm.running_mean, norm.running_var = norm.running_mean[kept_C], norm.running_var[kept_C]
    if isinstance(unit.gate, ChannelGate):
        unit.gate.dim = len(kept_C)
        unit.gate.logit = _part(unit.gate.logit, kept_C)


def _part(parameter: Tensor, kept: Tensor, *, axis: int = 0) -> nn.Parameter:
    """Those channels of a parameter; frozen where it was."""
    return nn.Parameter(parameter.index_select(axis, kept), requires_grad=parameter.requires_grad)


def _narrow(layer: nn.Linear | nn.Conv2d, width: int, *, output: bool) -> None:
    if isinstance(layer, nn.Linear):
        setattr(layer, "out_features" if output else "in_features", width)
    else:
        setattr(layer, "out_channels" if output else "in_channels", width)
