"""Cutting channels that a gate has closed: the layers before and after it become narrower.

    Perceptron     expand (I -> hidden), ReLU, gate, reduce (hidden -> O)
    ResidualPair   convolution, norm, ReLU, gate, convolution

A closed gate is 0 for every image, so the result is the same in exact arithmetic.

Axes: C hidden channels, which the gate weighs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from muntin.compression.equivalent.fold import first_part, last_part
from muntin.compression.rewrite import named, tied
from muntin.errors import MuntinError
from muntin.layers import ChannelGate, Gated, MapNorm, Perceptron, ResidualPair
from muntin.layers.gate import BLOCK
from muntin.models.compression_record import Change


@torch.no_grad()
def remove_closed_channels(model: nn.Module) -> list[Change]:
    """Cut the channels that gates have closed, in place, before norms and gates are folded.

    Some closed channels of a unit stay, so that its width is a multiple of `BLOCK`. Layers may be factored already. A unit whose layers are
    used elsewhere is kept. Returns a `Change` for each gate with closed channels.
    """
    changes = []
    units = dict(_units(model))
    reasons = tied(model, units)
    for name, unit in units.items():
        gate = unit.gate
        if not isinstance(gate, ChannelGate) or gate.open_channels().all():
            continue
        kept, closed = _kept(gate), int((~gate.open_channels()).sum())
        if isinstance(unit, ResidualPair) and not isinstance(unit.first.norm, MapNorm | nn.Identity):
            done, reason = "kept", f"a {type(unit.first.norm).__name__} before the gate cannot be cut"
        elif name in reasons:
            done, reason = "kept", reasons[name]
        elif len(kept) == gate.dim:
            done, reason = "kept", f"{closed} of {gate.dim} channels are closed: the open ones need as many blocks of {BLOCK}"
        else:
            done, reason = f"{len(kept)} of {gate.dim} channels", f"{closed} are closed"
            _cut(unit, kept)
        changes.append(Change(layer=name, pass_="slim", done=done, reason=reason))
    return changes


def widths_of(model: nn.Module) -> dict[str, int]:
    """The hidden channels of each gated unit, by dotted name, for a checkpoint's record."""
    return {name: _width(unit) for name, unit in _units(model)}


def apply_widths(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Make units as narrow as `widths` says, in place; load the weights of a checkpoint next.

    Raises `MuntinError` for a name that is no such unit of the model, or a larger width than the unit has.
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
    """The channels that stay, in order: the open ones, and closed ones that fill a block."""
    count = int(gate.open_channels().sum())
    filled = min(gate.dim, max(1, -(-count // BLOCK)) * BLOCK)
    return gate.logit.topk(filled).indices.sort().values


def _width(unit: Gated) -> int:
    weight = last_part(unit.ends[0]).weight  # also of a quantised form
    assert isinstance(weight, Tensor)
    return len(weight)


def _ends(unit: Gated) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """The layer that gives the hidden channels and the layer that reads them."""
    before, behind = last_part(unit.ends[0]), first_part(unit.ends[1])
    assert isinstance(before, nn.Linear | nn.Conv2d) and isinstance(behind, nn.Linear | nn.Conv2d)
    return before, behind


def _cut(unit: Gated, kept_C: Tensor) -> None:
    before, behind = _ends(unit)
    kept_C = kept_C.to(before.weight.device)
    before.weight = _part(before.weight, kept_C)
    if before.bias is not None:
        before.bias = _part(before.bias, kept_C)
    behind.weight = _part(behind.weight, kept_C, axis=1)
    setattr(before, "out_features" if isinstance(before, nn.Linear) else "out_channels", len(kept_C))
    setattr(behind, "in_features" if isinstance(behind, nn.Linear) else "in_channels", len(kept_C))
    if isinstance(unit, ResidualPair) and isinstance(norm := unit.first.norm, MapNorm):
        norm.dim = len(kept_C)
        norm.weight, norm.bias = _part(norm.weight, kept_C), _part(norm.bias, kept_C)
        norm.running_mean, norm.running_var = norm.running_mean[kept_C], norm.running_var[kept_C]
    if isinstance(unit.gate, ChannelGate):
        unit.gate.dim = len(kept_C)
        unit.gate.logit = _part(unit.gate.logit, kept_C)


def _part(parameter: Tensor, kept: Tensor, *, axis: int = 0) -> nn.Parameter:
    """The kept channels of a parameter, frozen if it was."""
    return nn.Parameter(parameter.index_select(axis, kept), requires_grad=parameter.requires_grad)
