"""The pruning pass: the least important channels leave, and the model becomes one of narrower dense layers.

    model -> groups of channels -> try each group on copies -> choose the channels -> cut

A group is cut only if a model without some of its channels answers as one in which nothing reads them. So attention heads, norms over
channels and everything else that uses a channel in a way of its own stay as they are, by measurement and not by a list of names. The layers
need training afterwards (`distil`).

A model with channel gates has chosen its channels in training: those that the gates have closed are cut, and nothing else.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muntin.compression.batch_norm import varied
from muntin.compression.channels.groups import Costs, channel_groups, costs, counted_macs, cut, importance, mask
from muntin.compression.channels.sizes import prunable
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.history import last_changes, pruned_from, remember, remember_pruning
from muntin.compression.low_rank.factored_layers import factored_layers, update_ranks
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.quantization.quantized_layers import check_float
from muntin.compression.rewrite import (
    EVERY,
    PARTS,
    call_every_layer,
    computed_weight,
    failing,
    left_out,
    named,
    out_of_reach,
    parameter_users,
)
from muntin.errors import MuntinError
from muntin.layers import ChannelGate
from muntin.models.compression_record import Change, PruningRecord
from muntin.models.eager import ModelInputs, call, check_eager, first_row, tensors_of

USED = "the model uses its channels in another way too (heads of an attention, a norm over channels): the answer without them differs"
"""Reason to keep a group that a trial has refused."""
FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""Errors of a model whose layers do not fit together."""
TOLERANCE = 1e-5
"""Difference of two answers by rounding alone, as a share of the largest distance of the values from their mean."""


def prune(
    model: nn.Module,
    example: ModelInputs | None = None,
    *,
    ratio: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    multiple: int = 8,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
) -> list[Change]:
    """Remove channels of Linears and convolutions, in place; see the head of this file.

    Give one of `ratio`, the share of its channels that each group loses, and `parameters` or `macs`, the share of the model's parameters
    or of its layers' multiply-adds to keep, for which the least such ratio is taken. `example`: a batch of inputs in the form that
    `low_rank` takes; one row is used. Widths become multiples of `multiple`. `only`, `keep`: names or patterns of the layers whose outputs
    may be cut, and that keep them. Channels leave by their importance (`groups`). Shares count from the model before its first pruning, so
    a second run changes nothing; for `macs` with an example of the same size.

    Costs a forward pass with its graph, and two copies and passes for each of about 2·log2(groups) trials a group that is kept. Parameters
    are new objects: make the optimiser afterwards. The model is left in `eval` mode. Raises `MuntinError` if the budget is out of reach,
    for a quantised model, and for shares of a model with channel gates, for which `prune(model)` is the whole call.
    """
    check_eager(model)
    check_frozen(model)
    check_float(model, "prune")
    shares = {name: share for name, share in (("ratio", ratio), ("parameters", parameters), ("macs", macs)) if share is not None}
    gates = dict(named(model, ChannelGate))
    if gates:
        return _slim(model, gates, shares)
    if len(shares) != 1 or example is None:
        raise MuntinError(
            f"prune got {', '.join(shares) or 'no share'} and {'no' if example is None else 'an'} example: give an example of the inputs, "
            "and one of ratio, parameters and macs"
        )
    ((kind, share),) = shares.items()
    if not 0 < share < 1 or multiple < 1:
        raise MuntinError(f"{kind}={share!r}, multiple={multiple!r}: give a share between 0 and 1, and a multiple from 1")
    return remember(model, _Pruning(model, example, multiple).run(kind, share, only, keep))


def _slim(model: nn.Module, gates: Mapping[str, nn.Module], shares: Mapping[str, float]) -> list[Change]:
    if shares:
        raise MuntinError(
            f"{', '.join(shares)}: the model has {len(gates)} channel gates, which choose its channels while it trains "
            "(training.gate_budget): call prune(model), which cuts those that are closed"
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
    example: ModelInputs
    multiple: int

    def run(self, kind: str, share: float, only: Sequence[str], keep: Sequence[str]) -> list[Change]:
        model = self.model.eval()
        call_every_layer(model)
        layers = {name: layer for name, layer in model.named_modules() if prunable(type(layer))}
        unnamed = left_out({**layers, **factored_layers(model)}, only, keep)
        row = first_row(self.example)
        self.row: ModelInputs = varied(row) if isinstance(row, Tensor) else row
        self.groups = channel_groups(model, self.row)
        with torch.no_grad(), counted_macs(model) as positions:
            call(model, self.row)
        self.positions = positions
        now = costs(model, self.groups, {}, positions)
        record = pruned_from(model) or PruningRecord(
            parameters=now.parameters, macs=now.macs, channels={name: _outputs(layer) for name, layer in layers.items()}
        )
        self.record = record
        reasons = self._obstacles(unnamed)
        free = [name for name in self.groups if name not in reasons]
        self.order = {name: importance(model, self.groups[name]).argsort(stable=True).tolist() for name in free}
        if self._met(kind, share, now):
            reasons |= dict.fromkeys(free, f"the model keeps {self._share(kind, now):.1%} of its {kind}, within the budget")
            return self._changes(layers, {}, reasons)
        earlier = last_changes(model, "prune")
        refused = [name for name in free if name in earlier and earlier[name].reason == USED]
        free = [name for name in free if name not in refused]
        refused += self._refused([name for name in free if kind != "ratio" or name in self._cuts([name], share)])
        free = [name for name in free if name not in refused]
        reasons |= dict.fromkeys(refused, USED)
        cuts = self._cuts(free, share) if kind == "ratio" else self._within(free, kind, share)
        cut(model, self.groups, cuts)
        if cuts:
            remember_pruning(model, record)
        for layer in factored_layers(model).values():
            update_ranks(layer)
        return self._changes(layers, cuts, reasons)

    def _obstacles(self, unnamed: Mapping[str, str]) -> dict[str, str]:
        """Reasons to keep groups, known without a trial."""
        users = parameter_users(self.model)
        since = {f"{name}.{part}" for name in factored_layers(self.model) for part in PARTS[:-1]}.difference(self.record.channels)
        reasons = {}
        for name, group in self.groups.items():
            tensors = {member.layer: self.model.get_submodule(member.layer) for member in group.members}
            computed = next((f"{one}: {why}" for one, layer in tensors.items() if (why := _computed(layer)) is not None), "")
            shared = next((one for one, layer in tensors.items() if any(len(users[id(p)]) > 1 for p in layer.parameters())), "")
            reason = (
                group.obstacle or computed or (f"{shared} shares its weights" if shared else "")
                or next((unnamed[giver] for giver in group.givers if giver in unnamed), "")
                or ("factored after the first pruning: low_rank chose its rank" if since.intersection(group.givers) else "")
                or ("" if any(member.side == "in" for member in group.members) else "no layer reads its channels: they are the answer's")
            )  # fmt: skip
            if reason:
                reasons[name] = reason
        return reasons

    def _refused(self, names: Sequence[str]) -> list[str]:
        """The groups without half of whose channels a copy of the model answers otherwise than one that does not read them."""
        accepted: dict[str, list[int]] = {}
        trial = self._randomised()

        def works(some: Sequence[str]) -> bool:
            cuts = accepted | {name: self.order[name][: max(1, self.groups[name].channels // 2)] for name in some}
            small, masked = copy.deepcopy(trial), copy.deepcopy(trial)
            mask(masked, self.groups, cuts)
            with torch.no_grad():
                expected = tensors_of(call(masked, self.row))
                try:
                    cut(small, self.groups, cuts)
                    answer = tensors_of(call(small, self.row))
                except FAULTS:  # sizes that no longer fit
                    return False
            if len(expected) != len(answer) or not all(map(_equal, expected, answer)):
                return False
            accepted.update(cuts)
            return True

        cuttable = [name for name in names if self.groups[name].channels > 1]
        alike = sorted(cuttable, key=lambda name: re.sub(r"\d+", "", name))  # layers of one role fail together
        return failing(alike, works)

    @torch.no_grad()
    def _randomised(self) -> nn.Module:
        """A copy with random weights, in which every channel has an effect: trained ones may be hidden by a scale or a gate near 0.

        In float64, unless the model does not run in it or its answer is then not finite.
        """
        for double in (True, False):
            trial = copy.deepcopy(self.model)
            self._fill(trial.double() if double else trial)
            try:
                answer = tensors_of(call(trial, self.row))
            except FAULTS:
                continue
            if all(torch.isfinite(part).all() for part in answer):
                return trial
        return copy.deepcopy(self.model)

    def _fill(self, trial: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for module in trial.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    matrix = parameter.ndim > 1
                    noise = noise / parameter[0].numel() ** 0.5 if matrix else 1 + 0.3 * noise if name == "weight" else 0.3 * noise
                    parameter.copy_(noise)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.zero_()
                module.running_var.fill_(1)

    def _cuts(self, names: Sequence[str], ratio: float) -> dict[str, list[int]]:
        """The channels that leave the groups at a ratio; groups that lose none are absent."""
        cuts = {}
        for name in names:
            channels = self.groups[name].channels
            width = max(1, math.ceil((1 - ratio) * self._original(name) / self.multiple - 1e-9)) * self.multiple
            if width < channels:
                cuts[name] = sorted(self.order[name][: channels - width])
        return cuts

    def _within(self, names: Sequence[str], kind: str, share: float) -> dict[str, list[int]]:
        """The cuts of the least ratio that meets a budget, to within 1e-6."""

        def left(ratio: float) -> Costs:
            return costs(self.model, self.groups, self._cuts(names, ratio), self.positions)

        low, high = 0.0, 1 - 1e-9
        if not self._met(kind, share, left(high)):
            least = math.ceil(1e4 * self._share(kind, left(high))) / 1e4
            raise MuntinError(
                f"{kind}={share}: out of reach: with the least channels {least:.4f} are left; allow that, or a smaller multiple"
            )
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if self._met(kind, share, left(middle)) else (middle, high)
        return self._cuts(names, high)

    def _share(self, kind: str, now: Costs) -> float:
        return now.macs / max(1, self.record.macs) if kind == "macs" else now.parameters / max(1, self.record.parameters)

    def _met(self, kind: str, share: float, now: Costs) -> bool:
        return kind != "ratio" and self._share(kind, now) <= share

    def _original(self, name: str) -> int:
        """Channels of a group before the first pruning; its layer may have been factored since."""
        whole, channels = self.groups[name].channels, self.record.channels
        return max(whole, channels.get(name, channels.get(name.rpartition(".")[0], whole)))

    def _changes(self, layers: Mapping[str, nn.Module], cuts: Mapping[str, Sequence[int]], reasons: Mapping[str, str]) -> list[Change]:
        of_layer = {giver: name for name, group in self.groups.items() for giver in (group.name, *group.givers)}
        changes = []
        for layer in layers:
            group = of_layer.get(layer)
            if group is None:
                depthwise = any(member.layer == layer and member.side == "both" for one in self.groups.values() for member in one.members)
                reason = "its channels are those of its input" if depthwise else "no output that depends on it was reached"
            else:
                whole, original = self.groups[group].channels, self._original(group)
                reason = reasons.get(group, "")
                if group in cuts:
                    width = whole - len(cuts[group])
                    changes.append(Change(layer=layer, pass_="prune", done=f"{width} of {original} channels"))
                    continue
                before = f" of {original}" if original > whole else ""
                reason = reason or f"{whole}{before} channels: the share in multiples of {self.multiple} is no less"
            changes.append(Change(layer=layer, pass_="prune", done="kept", reason=reason))
        others = out_of_reach(self.model, "prune", "narrower form here")
        return changes + [change for change in others if change.layer not in layers]  # transposed convolutions and others are in both


def _equal(expected: Tensor, answer: Tensor) -> bool:
    if expected.shape != answer.shape:
        return False
    expected, answer = expected.double(), answer.double()
    spread = float((expected - expected.mean()).abs().max()) if expected.numel() > 1 else float(expected.abs().max())
    return float((expected - answer).abs().max()) <= TOLERANCE * spread


def _outputs(layer: nn.Module) -> int:
    return int(vars(layer)["out_features" if isinstance(layer, nn.Linear) else "out_channels"])


def _computed(layer: nn.Module) -> str | None:
    return computed_weight(layer) if prunable(type(layer)) else None
