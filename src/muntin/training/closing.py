"""Closing channel gates while a model trains, until what their channels cost is a share of what it was.

Axes: B images, C channels that a gate weighs, H W image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muntin.layers import ChannelGate, Perceptron, ResidualPair
from muntin.layers.gate import BLOCK

FIRST, LAST = 0.1, 0.6
"""Where closing begins and ends, as shares of the steps: gradients tell little before; what stays open learns to do alone after it."""
Gated = Perceptron | ResidualPair


class GateClosing:
    """Closes gates of a model in training, those first whose channels the answer needs least for what they cost.

    `keep`: share of the multiply-adds of gated channels that may be left from `LAST` of the `steps` on; until then it falls as the cube
    of the way that is left (Zhu & Gupta, 1710.01878, section 3). `image_BCHW`: one image of the size that is trained on.

    A channel's importance is the change of the loss without it, to first order: the root mean square of gate · ∂loss/∂gate (Molchanov et
    al., 1906.10771, section 3.1), over its multiply-adds; all gates are ranked together. Deviations: the mean square is the second moment
    that Adam keeps, so that a run that is gone on with knows it, too; channels close in blocks of `BLOCK`, the least important ones of a
    gate together. One block of each gate stays open, and what is closed stays closed. Costs a forward pass at the start and a sort of the
    gates a step.
    """

    def __init__(self, model: nn.Module, image_BCHW: Tensor, *, keep: float, steps: int) -> None:
        self.keep, self.first, self.last = keep, FIRST * steps, LAST * steps
        units = _gated(model)
        self.costs = {gate: _weights(units[gate]) * n for gate, n in _positions(model, list(units), image_BCHW).items()}
        self.closed = {gate: ~gate.open_channels() for gate in units}

    def share(self, step: int) -> float:
        """Of the multiply-adds of gated channels, what may be open after `step` (from 0)."""
        if step < self.first:
            return 1.0
        way = min(1.0, (step + 1 - self.first) / max(1.0, self.last - self.first))
        return self.keep + (1 - self.keep) * (1 - way) ** 3

    @torch.no_grad()
    def update(self, step: int, optimizer: torch.optim.Optimizer, *, average: nn.Module) -> None:
        """Close what has to be closed after `step`, and again what the optimiser has moved since; in the averaged model as well."""
        if any("exp_avg_sq" not in optimizer.state[gate.logit] for gate in self.costs):
            return  # FP16: a scaler that still looks for its scale has left out all steps so far
        left = self.share(step) * sum(cost * gate.dim for gate, cost in self.costs.items())
        blocks: list[tuple[float, ChannelGate, Tensor]] = []
        for gate, cost in self.costs.items():
            self.closed[gate] |= ~gate.open_channels()
            importance_C = gate.openness() * optimizer.state[gate.logit]["exp_avg_sq"].sqrt() / cost
            first, *others = importance_C.masked_fill(self.closed[gate], -1.0).argsort(descending=True, stable=True).split(BLOCK)
            left -= cost * len(first)
            blocks += [(float(importance_C[channels].mean()), gate, channels) for channels in others]
        for _, gate, channels in sorted(blocks, key=lambda block: block[0], reverse=True):
            left -= self.costs[gate] * len(channels)
            if left < 0:
                self.closed[gate][channels] = True
        for (gate, closed_C), averaged in zip(self.closed.items(), _gated(average), strict=True):
            gate.close(closed_C)
            averaged.close(closed_C)


def _gated(model: nn.Module) -> dict[ChannelGate, Gated]:
    """The gates of a model and the units that they are in."""
    return {module.gate: module for module in model.modules() if isinstance(module, Gated) and isinstance(module.gate, ChannelGate)}


def _weights(unit: Gated) -> int:
    """That one channel has, in the layer that gives it and in the one that reads it."""
    before, behind = (unit.expand, unit.reduce) if isinstance(unit, Perceptron) else (unit.first.conv, unit.second.conv)
    return before.weight[0].numel() + behind.weight[:, 0].numel()


@torch.no_grad()
def _positions(model: nn.Module, gates: list[ChannelGate], image_BCHW: Tensor) -> dict[ChannelGate, int]:
    """How many positions, or tokens, of an image each gate weighs the channels of."""
    found: dict[ChannelGate, int] = {}

    def note(gate: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(gate, ChannelGate)
        found[gate] = inputs[0].numel() // gate.dim

    hooks = [gate.register_forward_pre_hook(note) for gate in gates]
    training = model.training
    model.eval()(image_BCHW)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return found
