"""Closing channel gates while a model trains, until what their channels cost is a share of what it was.

Axes: B images, C channels that a gate weighs, H W image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from muntin.errors import RecipeError
from muntin.layers import ChannelGate, Gated
from muntin.layers.gate import BLOCK

FIRST, LAST = 0.1, 0.6
"""Where closing begins and ends, as shares of the run: gradients tell little before; what stays open learns to do alone after it."""


class GateClosing:
    """Closes gates of a model in training, those first whose channels the answer needs least for what they cost.

    `keep`: share of the multiply-adds of gated channels that may be left from `LAST` of the run on; until then it falls as the cube
    of the way that is left (Zhu & Gupta, 1710.01878, section 3). `average`: the model's averaged copy, which closes alike. `image_BCHW`:
    one image of the size that is trained on. Raises `RecipeError` for a model without gates, and for less than what stays: one block of
    each gate.

    A channel's importance is the change of the loss without it, to first order: gate · ∂loss/∂gate (Molchanov et al., 1906.10771, section
    3.1), over its multiply-adds; all gates are ranked together. Deviations: the gate of now times the root of the second moment that Adam
    keeps of its gradient, which is a mean over the run so far, so that a run that is gone on with knows it, too; channels close in blocks
    of `BLOCK`, the least important ones of a gate together; what is closed stays closed, its logit exactly 0. Costs a forward pass at the
    start; while gates close, a sort of them a step.
    """

    def __init__(self, model: nn.Module, average: nn.Module, image_BCHW: Tensor, *, keep: float) -> None:
        self.keep = keep
        units = {gate: unit for gate, unit in _gated(model).items() if gate.logit.requires_grad}
        self.costs = {gate: _weights(units[gate]) * n for gate, n in _positions(model, list(units), image_BCHW).items()}
        self.averaged = dict(zip(_gated(model), _gated(average), strict=True))
        self.closed = {gate: gate.logit.detach() == 0 for gate in self.costs}
        self.total = sum(cost * gate.dim for gate, cost in self.costs.items())
        floor = sum(cost * min(BLOCK, gate.dim) for gate, cost in self.costs.items())
        if not self.costs:
            raise RecipeError(f"training.gate_budget {keep:g}: this model has no channel gates to close; leave it at 1")
        if keep * self.total < floor:
            least = math.ceil(1000 * floor / self.total) / 1000
            raise RecipeError(
                f"training.gate_budget {keep:g}: one block of {BLOCK} channels of each gate stays open, which is {least:g} "
                "of the multiply-adds behind gates: give at least that"
            )

    def share(self, done: float) -> float:
        """Of the multiply-adds of gated channels, what may be open where `done` of the run is behind."""
        way = min(1.0, max(0.0, (done - FIRST) / (LAST - FIRST)))
        return self.keep + (1 - self.keep) * (1 - way) ** 3

    @torch.no_grad()
    def update(self, done: float, optimizer: torch.optim.Optimizer) -> bool:
        """Close what has to be closed by now, and again what the optimiser has moved since; in the averaged model as well. Whether
        something had to be."""
        still = sum(self.costs[gate] * int((~closed_C).sum()) for gate, closed_C in self.closed.items())
        over = still - self.share(done) * self.total
        closes = over > 0 and all(float(optimizer.state[gate.logit].get("step", 0)) for gate in self.costs)  # FP16 leaves some
        if closes:
            self._close(over, optimizer)
        for gate, closed_C in self.closed.items():
            gate.close(closed_C)
            self.averaged[gate].close(closed_C)
        return closes

    def _close(self, over: float, optimizer: torch.optim.Optimizer) -> None:
        """Close blocks, the least important one first, until what is open costs `over` less."""
        found: list[tuple[ChannelGate, Tensor]] = []
        values: list[Tensor] = []
        for gate, closed_C in self.closed.items():
            importance_C = gate.openness() * optimizer.state[gate.logit]["exp_avg_sq"].sqrt() / self.costs[gate]
            open_C = (~closed_C).nonzero().squeeze(1)
            order = open_C[importance_C[open_C].argsort(descending=True, stable=True)]
            for channels in torch.split(order, BLOCK)[1:]:
                found.append((gate, channels))
                values.append(importance_C[channels].mean())
        ranked = sorted(zip(torch.stack(values).tolist(), range(len(found)), strict=True))
        for _, number in ranked:
            if over <= 0:
                break
            gate, channels = found[number]
            self.closed[gate][channels] = True
            over -= self.costs[gate] * len(channels)


def _gated(model: nn.Module) -> dict[ChannelGate, Gated]:
    """The gates of a model and the units that they are in."""
    return {module.gate: module for module in model.modules() if isinstance(module, Gated) and isinstance(module.gate, ChannelGate)}


def _weights(unit: Gated) -> int:
    """That one channel has, in the layer that gives it and in the one that reads it."""
    before, behind = (end.get_parameter("weight") for end in unit.ends)
    return before[0].numel() + behind[:, 0].numel()


@torch.no_grad()
def _positions(model: nn.Module, gates: list[ChannelGate], image_BCHW: Tensor) -> dict[ChannelGate, int]:
    """How many positions, or tokens, of an image each gate weighs the channels of."""
    found: dict[ChannelGate, int] = {}

    def note(gate: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(gate, ChannelGate)
        found[gate] = inputs[0].numel() // gate.dim

    hooks = [gate.register_forward_pre_hook(note) for gate in gates]
    training = model.training
    try:
        model.eval()(image_BCHW)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found
