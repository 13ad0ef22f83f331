"""The average of a model's weights over time, whole in every process or sharded like the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from muntin.training.distributed.ranks import is_sharded, local

STATISTICS = ("running_mean", "running_var")
"""Buffers that are averaged. Other buffers (masks, counters, vectors of a spectral norm) are copied."""


class WeightAverage:
    """An exponential moving average of a model's parameters and of the statistics of its norms; other buffers are copied.

    The decay warms up as (1 + step) / (10 + step), so that the first steps count little. Source: Polyak & Juditsky (1992); the warm-up is
    that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def parameters(self) -> list[Tensor]:
        """The averaged parameters, in the model's order."""
        return list(self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights and buffers by name."""
        return dict(self.model.state_dict())

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The averaged model, to call it in the block."""
        yield self.model

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the model after `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        pairs = [(local(average), local(new.detach())) for average, new in zip(self.parameters(), model.parameters(), strict=True)]
        averaged = [(average, new) for average, new in pairs if average.is_floating_point() or average.is_complex()]
        if averaged:
            torch._foreach_lerp_([average for average, _ in averaged], [new for _, new in averaged], share)
        for average, new in pairs:
            if not (average.is_floating_point() or average.is_complex()):  # indices have no mean
                average.copy_(new)
        buffers = dict(self.model.named_buffers())
        for name, new in model.named_buffers():
            owner, _, last = name.rpartition(".")
            if name not in buffers or buffers[name].shape != new.shape or buffers[name].is_inference():  # created or resized during a call
                temporary = last in model.get_submodule(owner)._non_persistent_buffers_set
                self.model.get_submodule(owner).register_buffer(last, new.clone(), persistent=not temporary)
            elif last in STATISTICS:
                buffers[name].lerp_(new, share)
            else:
                buffers[name].copy_(new)


class ShardedAverage(WeightAverage):
    """The same of a sharded model: each process holds its rows of the average. `model` has its weights inside `whole()` only.

    `whole()` takes the memory of the whole weights in every process, and gathers each of them.
    """

    def __init__(self, shell: nn.Module, decay: float, sharded: nn.Module) -> None:
        """`shell`: a copy of the model before it was sharded."""
        self.decay = decay
        self.model = shell.eval().requires_grad_(False)
        parameters = list(sharded.parameters())
        self._shards: list[Any] = [parameter.detach().clone() for parameter in parameters]
        self._free()

    def parameters(self) -> list[Tensor]:
        return self._shards

    def tensors(self) -> dict[str, Tensor]:
        shards = dict(zip(self.model.parameters(), self._shards, strict=True))
        return {name: shards.get(tensor, tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        for parameter, shard in zip(self.model.parameters(), self._shards, strict=True):
            parameter.data = shard.full_tensor() if is_sharded(shard) else shard
        try:
            yield self.model
        finally:
            self._free()

    def _free(self) -> None:
        """Leave each parameter its shape, with one number."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
