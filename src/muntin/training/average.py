"""Averaging weights over time: the model that is kept is steadier than the one that is trained."""

from __future__ import annotations

import copy

import torch
from torch import nn

STATISTICS = ("running_mean", "running_var")
"""Buffers that are averaged; others (masks of -inf, counters, vectors of a spectral norm) mean nothing but as they are."""


class WeightAverage:
    """An exponential moving average of a model's parameters and of its norms' statistics; other buffers are the model's own of that step.

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
        pairs = [(mine, other.detach()) for mine, other in zip(self.model.parameters(), model.parameters(), strict=True)]
        averaged = [(mine, other) for mine, other in pairs if mine.is_floating_point() or mine.is_complex()]
        if averaged:
            torch._foreach_lerp_([mine for mine, _ in averaged], [other for _, other in averaged], share)
        for mine, other in pairs:
            if not (mine.is_floating_point() or mine.is_complex()):  # indices, of which there is no mean
                mine.copy_(other)
        own = dict(self.model.named_buffers())
        for name, other in model.named_buffers():
            owner, _, last = name.rpartition(".")
            if name not in own or own[name].shape != other.shape or own[name].is_inference():  # made on the way, for a size or a validation
                passing = last in model.get_submodule(owner)._non_persistent_buffers_set
                self.model.get_submodule(owner).register_buffer(last, other.clone(), persistent=not passing)
            elif last in STATISTICS:
                own[name].lerp_(other, share)
            else:
                own[name].copy_(other)
