"""Averaging weights over time: the model that is kept is steadier than the one that is trained."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """An exponential moving average of a model's parameters and of its norms' statistics.

    The decay warms up as (1 + step) / (10 + step), so that the first steps do not weigh on the result. Costs a copy of the model and one
    pass over its parameters a step. Source: Polyak & Juditsky (1992); the warm-up is TensorFlow's ExponentialMovingAverage's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model after `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], share)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(other, share)
            else:
                mine.copy_(other)
