"""Trials of groups on copies of a model: is a model without some channels equal to one in which nothing reads them?"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from muntin.compression.channels.groups import ChannelGroup, cut, mask
from muntin.compression.channels.heads import head_groups
from muntin.compression.channels.ranking import magnitudes
from muntin.compression.rewrite import failing
from muntin.models.eager import ModelInputs, call, tensors_of

FAULTS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""Errors of a model whose layers do not fit together."""
TOLERANCE = 1e-5
"""Difference of two answers by rounding alone, as a share of the largest distance of the values from their mean."""


class Trials:
    """Trials of the groups of a model; each builds on the groups that earlier ones have accepted."""

    def __init__(self, model: nn.Module, groups: dict[str, ChannelGroup], row: ModelInputs) -> None:
        self.groups, self.row = groups, row
        self.trial = _randomised(model, row)
        self.accepted: dict[str, list[int]] = {}

    def refused(self, names: Sequence[str]) -> list[str]:
        """The groups without half of whose channels a copy of the model answers otherwise than one that does not read them."""
        cuttable = [name for name in names if self.groups[name].channels > 1]
        alike = sorted(cuttable, key=lambda name: re.sub(r"\d+", "", name))  # layers of one role fail together
        return failing(alike, self._works)

    def heads(self, pending: Sequence[str], obstacle: Callable[[ChannelGroup], str], *, single: bool) -> None:
        """Add groups of heads among the outputs of the layers `pending` that are accepted, in the place of the groups of these layers.

        `obstacle`: returns a reason against a group. `single`: try groups of channels first.
        """
        forms = head_groups(copy.deepcopy(self.trial), self.row, pending, single=single)
        left = {name: some for name, some in forms.items() if not obstacle(some[0])}
        while left:
            before = dict(self.groups)
            self.groups |= {name: some[0] for name, some in left.items()}
            failed = self.refused(list(left))
            for name in left:
                if name in failed:
                    self.groups.pop(name)
                    self.groups |= {name: before[name]} if name in before else {}
                else:
                    self._replace(self.groups[name])
            left = {name: left[name][1:] for name in failed if left[name][1:]}

    def _replace(self, heads: ChannelGroup) -> None:
        """Remove the other groups that have an output of this one."""
        for name in [name for name, group in self.groups.items() if name != heads.name and set(group.givers) & set(heads.givers)]:
            del self.groups[name]

    def _works(self, names: Sequence[str]) -> bool:
        """Cut groups beside those that are accepted. Returns True, and accepts them, if the answer is as expected."""
        cuts = self.accepted | {name: self._half(name) for name in names}
        small, masked = copy.deepcopy(self.trial), copy.deepcopy(self.trial)
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
        self.accepted = cuts
        return True

    def _half(self, name: str) -> list[int]:
        channels = self.groups[name].channels
        return magnitudes(self.trial, self.groups[name]).argsort(stable=True).tolist()[: max(1, channels // 2)]


@torch.no_grad()
def _randomised(model: nn.Module, row: ModelInputs) -> nn.Module:
    """A copy with random weights, in which every channel has an effect: trained ones may be hidden by a scale or a gate near 0.

    In float64, unless the model does not run in it or its answer is then not finite.
    """
    for double in (True, False):
        trial = copy.deepcopy(model).requires_grad_(False)
        _fill(trial.double() if double else trial)
        try:
            answer = tensors_of(call(trial, row))
        except FAULTS:
            continue
        if all(torch.isfinite(part).all() for part in answer):
            return trial
    return copy.deepcopy(model).requires_grad_(False)


def _fill(trial: nn.Module) -> None:
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


def _equal(expected: Tensor, answer: Tensor) -> bool:
    if expected.shape != answer.shape:
        return False
    expected, answer = expected.double(), answer.double()
    spread = float((expected - expected.mean()).abs().max()) if expected.numel() > 1 else float(expected.abs().max())
    return float((expected - answer).abs().max()) <= TOLERANCE * spread
