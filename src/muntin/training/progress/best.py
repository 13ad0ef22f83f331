"""The averaged weights of the best validation, which are the result of a run of `muntin fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muntin.training.checkpoint import Checkpoint
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.distributed.ranks import local
from muntin.training.distributed.stored_tensors import BEST


def best_point(validation: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The validation with the highest score, of equal ones the first; None if there is none."""
    return max(validation, key=lambda point: float(point["score"]), default=None)


def out_of_patience(patience: int | None, validation: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the last `patience` validations brought no better score; False if it is None."""
    best = best_point(validation)
    return patience is not None and best is not None and sum(point["step"] > best["step"] for point in validation) >= patience


class BestWeights:
    """A copy of the averaged weights at the best validation. `kept`: False takes no copy, and the result is the last step.

    Memory: the size of the weights, of sharded ones this process's part. `averaged_at`: step of the averaged weights, once they are those
    of an earlier validation.
    """

    def __init__(self, average: WeightAverage, *, kept: bool) -> None:
        self.kept = kept
        self.averaged_at: int | None = None
        self._average = average
        self._step: int | None = None  # of the copy; None before the first validation
        self._copy: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Size of the copy, of this process's part of it."""
        return sum(local(tensor).numel() * tensor.element_size() for tensor in self._copy.values())

    def judge(self, validation: Sequence[Mapping[str, Any]]) -> None:
        """Copy the averaged weights if the last validation is the best one."""
        if self.kept and best_point(validation) is validation[-1]:
            self._take_copy(validation[-1]["step"])

    def _take_copy(self, step: int) -> None:
        self._copy = {name: tensor.detach().clone() for name, tensor in self._average.tensors().items()}
        self._step = step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the copy of a checkpoint, whose averaged weights the average has already."""
        state, best = checkpoint.state, best_point(checkpoint.state.validation)
        self._step, self._copy, self.averaged_at = None, {}, state.averaged_at
        if not self.kept or best is None:
            return
        if BEST in checkpoint.tensors:
            self._copy = {name: torch.empty_like(tensor) for name, tensor in self._average.tensors().items()}
            checkpoint.tensors.read_into(BEST, self._copy)
            self._step = int(best["step"])
        elif best["step"] in (state.step, state.averaged_at):
            self._take_copy(int(best["step"]))

    @torch.no_grad()
    def take(self, step: int, *, ended: bool) -> None:
        """Make the copy the averaged weights if the run has ended. `step`: the last one."""
        if not ended or self._step in (None, step, self.averaged_at):
            return
        for name, tensor in self._average.tensors().items():
            if name in self._copy and self._copy[name].shape == tensor.shape:  # a foreign model may make buffers during a call
                tensor.copy_(self._copy[name])
        self.averaged_at = self._step

    def unsaved(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Tensors that a checkpoint of a step has to hold beside the averaged weights: the copy, or none if these are it."""
        return {} if self._step in (None, step, self.averaged_at) else {BEST: self._copy}

    def result(self, validation: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The validation of the averaged weights, or the last one; None if there is none."""
        of_step = [point for point in validation if point["step"] == self.averaged_at]
        return next(iter(of_step or validation[-1:]), None)
