"""Gate pruning: close channel gates during training until the cost of their channels is a given share.

Axes: B images, C channels that a gate weighs, H W image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from muntin.errors import RecipeError
from muntin.layers import ChannelGate, Gated
from muntin.layers.gate import BLOCK
from muntin.models.eager import watch_inputs

FIRST, LAST = 0.1, 0.6
"""Begin and end of closing, as shares of the run: gradients are noisy before, and open channels adapt afterwards."""


class GateClosing:
    """Closes gates of a model in training, beginning with the channels of least importance for their cost.

    `keep`: share of the multiply-adds of gated channels that is open from `LAST` of the run on; before, the share falls as a cube (Zhu &
    Gupta, 1710.01878, section 3). `average`: the model's averaged copy, whose gates are closed too. `image_BCHW`: one image of the training
    size. Raises `RecipeError` for a model without gates, and for a share below one block of each gate.

    A channel's importance is the change of the loss without it, to first order: gate · ∂loss/∂gate (Molchanov et al., 1906.10771, section
    3.1), over its multiply-adds; all gates are ranked together. Deviations: the gradient is the root of Adam's second moment, which
    checkpoints hold; channels close in blocks of `BLOCK`; a closed channel stays closed, with a logit of exactly 0. Costs a forward pass at
    the start, and a sort of the gates for each step in which some close.
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
        """Share of the multiply-adds of gated channels that may be open at the share `done` of the run."""
        way = min(1.0, max(0.0, (done - FIRST) / (LAST - FIRST)))
        return self.keep + (1 - self.keep) * (1 - way) ** 3

    @torch.no_grad()
    def update(self, done: float, optimizer: torch.optim.Optimizer) -> bool:
        """Close gates down to the budget at `done`, also those that the optimiser moved. Returns True if the budget demanded any."""
        open_cost = sum(self.costs[gate] * int((~closed_C).sum()) for gate, closed_C in self.closed.items())
        over = open_cost - self.share(done) * self.total
        closes = over > 0 and all(float(optimizer.state[gate.logit].get("step", 0)) for gate in self.costs)  # FP16 skips steps
        if closes:
            self._close(over, optimizer)
        for gate, closed_C in self.closed.items():
            gate.close(closed_C)
            self.averaged[gate].close(closed_C)
        return closes

    def _close(self, over: float, optimizer: torch.optim.Optimizer) -> None:
        """Close blocks, the least important one first, until the cost of open channels is reduced by `over`."""
        blocks: list[tuple[ChannelGate, Tensor]] = []
        values: list[Tensor] = []
        for gate, closed_C in self.closed.items():
            importance_C = gate.openness() * optimizer.state[gate.logit]["exp_avg_sq"].sqrt() / self.costs[gate]
            open_C = (~closed_C).nonzero().squeeze(1)
            order = open_C[importance_C[open_C].argsort(descending=True, stable=True)]
            for channels in torch.split(order, BLOCK)[1:]:
                blocks.append((gate, channels))
                values.append(importance_C[channels].mean())
        ranked = sorted(zip(torch.stack(values).tolist(), range(len(blocks)), strict=True))
        for _, number in ranked:
            if over <= 0:
                break
            gate, channels = blocks[number]
            self.closed[gate][channels] = True
            over -= self.costs[gate] * len(channels)


def _gated(model: nn.Module) -> dict[ChannelGate, Gated]:
    """The gates of a model, each with its unit."""
    return {module.gate: module for module in model.modules() if isinstance(module, Gated) and isinstance(module.gate, ChannelGate)}


def _weights(unit: Gated) -> int:
    """Weights of one channel in the layer that gives it and the layer that reads it."""
    before, behind = (end.get_parameter("weight") for end in unit.ends)
    return before[0].numel() + behind[:, 0].numel()


def _positions(model: nn.Module, gates: list[ChannelGate], image_BCHW: Tensor) -> dict[ChannelGate, int]:
    """Number of positions, or tokens, of an image at each gate."""
    positions: dict[ChannelGate, int] = {}

    def note(name: str, gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(gate, ChannelGate)
        positions[gate] = inputs[0].numel() // gate.dim

    training = model.training
    watch_inputs(model.eval(), {str(number): gate for number, gate in enumerate(gates)}, [image_BCHW], note)
    model.train(training)
    return positions
