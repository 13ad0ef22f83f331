"""The pruning pass: the least useful channels and heads leave, and the model becomes one of narrower dense layers.

    model -> groups of channels -> try each group on copies, and heads where channels fail -> rank by the harm to the answer
          -> choose widths -> refit the layers that read the channels -> cut

A group is cut only if a model without some of its channels answers as one in which nothing reads them. So norms over channels and all else
that uses a channel in a way of its own stay as they are, by measurement and not by a list of names. Training (`distil`) improves the result
further.

A model with channel gates has chosen its channels in training: those that the gates have closed are cut, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muntin.compression.activation_moments import answer_sensitivity, input_moments
from muntin.compression.calibration import calibration_list
from muntin.compression.channels.groups import ChannelGroup, Costs, channel_groups, costs, counted_macs, cut
from muntin.compression.channels.ranking import rank, readers, refit
from muntin.compression.channels.sizes import prunable
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.channels.split_attention import FIRST, split_attentions
from muntin.compression.channels.trials import FAULTS, Trials
from muntin.compression.equivalent.batch_norm import varied
from muntin.compression.history import last_changes, pruned_from, remember, remember_pruning
from muntin.compression.low_rank.factored_layers import factored_layers, update_ranks
from muntin.compression.quantization.dequantization import quantized_layers, through_floats
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.rewrite import (
    EVERY,
    PARTS,
    call_every_layer,
    computed_weight,
    left_out,
    named,
    out_of_reach,
    parameter_users,
    replace,
)
from muntin.compression.sparsity.sparsification import sparse_again
from muntin.errors import MuntinError
from muntin.layers import ChannelGate
from muntin.models.compression_record import Change, PruningRecord
from muntin.models.eager import ModelInputs, call, check_eager, first_row

USED = "the model uses its channels in another way too (heads of an attention, a norm over channels): the answer without them differs"
"""Reason to keep a group that a trial has refused."""


def prune(
    model: nn.Module,
    calibration: Iterable[ModelInputs] | None = None,
    *,
    ratio: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    multiple: int = 8,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
) -> list[Change]:
    """Remove channels of Linears and convolutions, and heads of attention, in place; see the head of this file.

    Give one of `ratio`, the share of its channels that each group loses, and `parameters` or `macs`, the share of the model's parameters
    or of its layers' multiply-adds to keep. Under a budget the groups lose different shares: those for which the estimated harm to the
    answer is least (`ranking`); of a model with layers for which it cannot be estimated, the least ratio. `calibration`: batches of inputs
    as `low_rank` takes them, or one batch, a tensor or a dictionary. Widths become multiples of `multiple`. `only`, `keep`: names or
    patterns of the layers whose outputs may be cut, and that keep them. Shares count from the model before its first pruning, so a second
    run changes nothing; for `macs` with inputs of the same size.

    Costs two forward passes and a backward pass over the batches, O(I³) for each layer that reads pruned channels, and two copies and
    passes of one row for each of about 2·log2(groups) trials a group that is kept. Parameters are new objects: make the optimiser
    afterwards. An `nn.MultiheadAttention` that loses heads becomes a `SplitAttention`. Quantised layers that are cut keep their bits,
    sparse ones their pattern. The model is left in `eval` mode. Raises `MuntinError` if the budget is out of reach, and for shares of a
    model with channel gates, for which `prune(model)` is the whole call.
    """
    check_eager(model)
    check_frozen(model)
    shares = {name: share for name, share in (("ratio", ratio), ("parameters", parameters), ("macs", macs)) if share is not None}
    gates = dict(named(model, ChannelGate))
    if gates:
        return _slim(model, gates, shares)
    if len(shares) != 1 or calibration is None:
        raise MuntinError(
            f"prune got {', '.join(shares) or 'no share'} and {'no' if calibration is None else 'a'} calibration: give batches of inputs, "
            "and one of ratio, parameters and macs"
        )
    ((kind, share),) = shares.items()
    if not 0 < share < 1 or multiple < 1:
        raise MuntinError(f"{kind}={share!r}, multiple={multiple!r}: give a share between 0 and 1, and a multiple from 1")
    batches = calibration_list([calibration] if isinstance(calibration, Tensor | Mapping) else calibration, model)

    def run() -> list[Change]:
        return remember(model, _Pruning(model, batches, multiple).run(kind, share, only, keep))

    return sparse_again(model, batches, lambda: through_floats(model, batches, run) if quantized_layers(model) else run())


def _slim(model: nn.Module, gates: Mapping[str, nn.Module], shares: Mapping[str, float]) -> list[Change]:
    if shares:
        raise MuntinError(
            f"channels of a model with channel gates ({len(gates)} here) are chosen while it trains (training.gate_budget): call "
            f"prune(model) without {' and '.join(shares)}, which cuts those that are closed"
        )
    changes = remove_closed_channels(model.eval())
    done = {change.layer for change in changes}
    quiet = [name for name in gates if name.rpartition(".")[0] not in done]
    return remember(
        model, [*changes, *(Change(layer=name, pass_="slim", done="kept", reason="none of its channels is closed") for name in quiet)]
    )


@dataclass
class _Pruning:
    """One run of `prune` on a model without gates."""

    model: nn.Module
    batches: list[ModelInputs]
    multiple: int

    def run(self, kind: str, share: float, only: Sequence[str], keep: Sequence[str]) -> list[Change]:
        call_every_layer(self.model.eval())
        whole = split_attentions(self.model)
        cuts: dict[str, list[int]] = {}
        try:
            reasons = self._examine(only, keep)
            now = costs(self.model, self.groups, {}, self.positions)
            if self._met(kind, share, now):
                within = f"the model keeps {self._share(kind, now):.1%} of its {kind}, within the budget"
                reasons = dict.fromkeys(self.groups, within) | reasons
            else:
                reasons = self._try(reasons, kind, share)
                cuts = self._cut(kind, share, [name for name in self.groups if name not in reasons])
        finally:
            cut_layers = {member.layer for name in cuts for member in self.groups[name].members}
            split = [name for name in whole if f"{name}.{FIRST}" in cut_layers]
            for name in whole:
                if name not in split:
                    replace(self.model, name, whole[name])
        if cuts:
            heads: dict[str, dict[str, int]] = {}
            for attribute in (one for name in cuts for one in self.groups[name].attributes):
                value = vars(self.model.get_submodule(attribute.module))[attribute.name]
                heads.setdefault(attribute.module, {})[attribute.name] = value
            remember_pruning(self.model, self.record.with_heads(heads, split))
        for layer in factored_layers(self.model).values():
            update_ranks(layer)
        self.whole = [name for name in whole if name not in split]
        return self._changes(self.layers, cuts, reasons)

    def _examine(self, only: Sequence[str], keep: Sequence[str]) -> dict[str, str]:
        """Read the groups and the costs; return reasons to keep groups that are known without a trial."""
        model = self.model
        self.layers = {name: layer for name, layer in model.named_modules() if prunable(type(layer))}
        self.unnamed = left_out({**self.layers, **factored_layers(model)}, only, keep)
        row = first_row(self.batches[0])
        self.row: ModelInputs = varied(row) if isinstance(row, Tensor) else row
        self.groups, self.fault = {}, None
        try:
            self.groups = channel_groups(model, self.row)
        except MuntinError as error:
            self.fault = error
        try:
            with torch.no_grad(), counted_macs(model) as positions:
                call(model, self.row)
        except FAULTS as error:
            raise self.fault or error from error
        self.positions = positions
        now = costs(model, self.groups, {}, positions)
        self.record = pruned_from(model) or PruningRecord(
            parameters=now.parameters, macs=now.macs, channels={name: _outputs(layer) for name, layer in self.layers.items()}
        )
        self.users = parameter_users(model)
        self.factored_since = {f"{name}.{part}" for name in factored_layers(model) for part in PARTS[:-1]}.difference(self.record.channels)
        return {name: reason for name, group in self.groups.items() if (reason := self._obstacle(group))}

    def _try(self, reasons: Mapping[str, str], kind: str, share: float) -> dict[str, str]:
        """Try the groups without a reason to be kept, and heads in the place of all others; return the reasons to keep groups."""
        earlier = last_changes(self.model, "prune")
        free = [name for name in self.groups if name not in reasons]
        refused = [name for name in free if name in earlier and earlier[name].reason == USED]
        narrower = [name for name in free if kind != "ratio" or self._width(name, share) < self.groups[name].channels]
        trials = Trials(self.model, self.groups, self.row)
        failed = trials.refused([name for name in narrower if name not in refused])
        settled = {giver for name in free if name not in failed for giver in self.groups[name].givers}
        trials.heads([layer for layer in self.layers if layer not in settled], self._obstacle, single=self.fault is not None)
        if self.fault is not None and not self.groups:
            raise self.fault
        kept = {**reasons, **dict.fromkeys((*refused, *failed), USED)}
        return {name: reason for name, reason in kept.items() if name in self.groups and self.groups[name].unit == "channels"}

    def _cut(self, kind: str, share: float, free: Sequence[str]) -> dict[str, list[int]]:
        readable = {name: layer for group in free for name, layer in readers(self.model, self.groups[group]).items()}
        moments = input_moments(self.model, self.batches, readable)
        sensitivity = answer_sensitivity(self.model, self.batches, readable)
        self.rankings = {name: rank(self.model, self.groups[name], moments, sensitivity) for name in free}
        cuts = self._cuts(free, share) if kind == "ratio" else self._within(free, kind, share)
        refit(self.model, self.groups, cuts, moments)
        cut(self.model, self.groups, cuts)
        return cuts

    def _obstacle(self, group: ChannelGroup) -> str:
        """Why a group is kept without a trial; empty if it need not be."""
        layers = {member.layer: self.model.get_submodule(member.layer) for member in group.members}
        computed = next((f"{name}: {why}" for name, layer in layers.items() if (why := _computed(layer)) is not None), "")
        shared = next((name for name, layer in layers.items() if any(len(self.users[id(p)]) > 1 for p in layer.parameters())), "")
        return (
            group.obstacle or computed or (f"{shared} shares its weights" if shared else "")
            or next((self.unnamed[giver] for giver in group.givers if giver in self.unnamed), "")
            or ("factored after the first pruning: low_rank chose its rank" if self.factored_since.intersection(group.givers) else "")
            or ("" if any(member.side == "in" for member in group.members) else "no layer reads its channels: they are the answer's")
        )  # fmt: skip

    def _cuts(self, names: Sequence[str], ratio: float) -> dict[str, list[int]]:
        """The channels that leave the groups at a ratio; groups that lose none are absent."""
        return self._leaving({name: self._width(name, ratio) for name in names})

    def _leaving(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """The channels that leave groups of these widths; groups that lose none are absent."""
        counts = {name: self.groups[name].channels - width for name, width in widths.items()}
        return {name: sorted(self.rankings[name].order[:count]) for name, count in counts.items() if count > 0}

    def _width(self, name: str, ratio: float) -> int:
        """The width of a group at a ratio, in multiples; it may be above what the group has."""
        step = self._step(name)
        return max(1, math.ceil((1 - ratio) * self._original(name) / step - 1e-9)) * step

    def _step(self, name: str) -> int:
        """The least change of a group's width: of heads, what makes their channels multiples."""
        group = self.groups[name]
        return self.multiple if group.unit == "channels" else self.multiple // math.gcd(self.multiple, group.places_each)

    def _within(self, names: Sequence[str], kind: str, share: float) -> dict[str, list[int]]:
        """The cuts that meet a budget with the least estimated harm, or of the least ratio where the harm is not known."""
        if all(self.rankings[name].harm for name in names):
            saving = {name: self._saving(name, kind) for name in names}
            return self._least(lambda price: self._cuts_at(10 ** (40 * price - 30), saving), kind, share)
        return self._least(lambda ratio: self._cuts(names, ratio), kind, share)

    def _saving(self, name: str, kind: str) -> float:
        """The saving of the removal of a channel, as a share of the model's costs."""
        whole, less = (costs(self.model, self.groups, cuts, self.positions) for cuts in ({}, {name: [0]}))
        return self._share(kind, whole) - self._share(kind, less)

    def _cuts_at(self, price: float, saving: Mapping[str, float]) -> dict[str, list[int]]:
        """The cuts with the least harm less the price of what they save."""
        widths = {}
        for name, each in saving.items():
            channels, step, harm = self.groups[name].channels, self._step(name), self.rankings[name].harm
            options = [channels, *(width for width in range(step, channels, step))]
            widths[name] = min(options, key=lambda width: harm[channels - width] + price * each * width)
        return self._leaving(widths)

    def _least(self, cuts_at: Callable[[float], dict[str, list[int]]], kind: str, share: float) -> dict[str, list[int]]:
        """The cuts of the least level, from 0 to 1, that meet a budget, to within 1e-6."""

        def left(level: float) -> Costs:
            return costs(self.model, self.groups, cuts_at(level), self.positions)

        low, high = 0.0, 1 - 1e-9
        if not self._met(kind, share, left(high)):
            least = math.ceil(1e4 * self._share(kind, left(high))) / 1e4
            raise MuntinError(
                f"{kind}={share}: out of reach: with the least channels {least:.4f} are left; allow that, or a smaller multiple"
            )
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if self._met(kind, share, left(middle)) else (middle, high)
        return cuts_at(high)

    def _share(self, kind: str, now: Costs) -> float:
        return now.macs / max(1, self.record.macs) if kind == "macs" else now.parameters / max(1, self.record.parameters)

    def _met(self, kind: str, share: float, now: Costs) -> bool:
        return kind != "ratio" and self._share(kind, now) <= share

    def _original(self, name: str) -> int:
        """Channels of a group before the first pruning; its layer may have been factored since."""
        group, channels = self.groups[name], self.record.channels
        layer = name if name in channels else name.rpartition(".")[0]
        each = next((len(one.positions) // group.channels for one in group.members if one.layer == name and one.side == "out"), 1)
        return max(group.channels, channels.get(layer, 0) // each)

    def _changes(self, layers: Mapping[str, nn.Module], cuts: Mapping[str, Sequence[int]], reasons: Mapping[str, str]) -> list[Change]:
        of_layer = {giver: name for name, group in self.groups.items() for giver in (group.name, *group.givers)}
        changes = []
        for layer in layers:
            group = of_layer.get(layer)
            if group is None:
                depthwise = any(member.layer == layer and member.side == "both" for one in self.groups.values() for member in one.members)
                reason = str(self.fault or "no output that depends on it was reached")
                reason = "its channels are those of its input" if depthwise else reason
            else:
                whole, original = self.groups[group].channels, self._original(group)
                reason = reasons.get(group, "")
                if group in cuts:
                    width = whole - len(cuts[group])
                    changes.append(Change(layer=layer, pass_="prune", done=f"{width} of {original} {self.groups[group].unit}"))
                    continue
                before = f" of {original}" if original > whole else ""
                reason = reason or f"{whole}{before} {self.groups[group].unit}: the share in multiples of {self._step(group)} is no less"
            if (name := layer.rpartition(".")[0]) in self.whole:  # a layer of an attention that is whole again
                if layer != f"{name}.{FIRST}":
                    continue
                layer = name
            changes.append(Change(layer=layer, pass_="prune", done="kept", reason=reason))
        done = {change.layer for change in changes}
        others = [change for change in out_of_reach(self.model, "prune", "narrower form here") if change.layer not in done]
        return changes + others


def _outputs(layer: nn.Module) -> int:
    return int(vars(layer)["out_features" if isinstance(layer, nn.Linear) else "out_channels"])


def _computed(layer: nn.Module) -> str | None:
    return computed_weight(layer) if prunable(type(layer)) else None
