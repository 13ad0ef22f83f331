"""The forms in which `foreign.py` compares a network: each pass alone, their baselines, and the passes together.

    FP32 module -> passes, with distillation on inputs without labels where a form is trained -> module that muntin.export takes

A form that narrows layers is quantised to INT8 in the end, so that its time compares with INT8's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import muntin
from foreign_networks.subjects import Batch, Subject

MULTIPLE = 8
"""Widths and ranks are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a form may use: inputs without labels, and how long it may train."""

    subject: Subject
    batches: Sequence[Batch]
    """For distillation."""
    calibration: Sequence[Batch]
    steps: int
    seed: int

    def distil(self, student: nn.Module, teacher: nn.Module, *, rate: float = 5e-4) -> None:
        muntin.distil(student, teacher, self.batches, steps=self.steps, loss=self.subject.distance, learning_rate=rate, seed=self.seed)


Form = Callable[[nn.Module, Material], None]
"""Changes a module in place."""


def _int8(model: nn.Module, material: Material) -> None:
    muntin.quantize(model, material.calibration)


def _w4a8(model: nn.Module, material: Material) -> None:
    muntin.quantize(model, material.calibration, bits=4, **_embeddings(model))


def _w4a8_nearest(model: nn.Module, material: Material) -> None:
    """Scales of least squared error for each output channel, nearest rounding, and nothing else."""
    muntin.prepare_qat(model, material.calibration, bits=4)
    muntin.freeze(model)


def _embeddings(model: nn.Module) -> dict[str, Any]:
    return {"embedding_bits": 4} if any(isinstance(layer, nn.Embedding) for layer in model.modules()) else {}


def _low_rank(model: nn.Module, material: Material) -> None:
    subject = material.subject
    muntin.low_rank(model, material.calibration, parameters=subject.left, multiple=MULTIPLE, keep=subject.keep)
    _int8(model, material)


def _svd_by_energy(model: nn.Module, material: Material) -> None:
    """The same share of each weight's energy, by plain singular values."""
    subject = material.subject
    muntin.low_rank(model, material.calibration, criterion="energy", parameters=subject.left, multiple=MULTIPLE, keep=subject.keep)
    _int8(model, material)


def _prune(model: nn.Module, material: Material) -> None:
    teacher = copy.deepcopy(model)
    muntin.prune(model, material.calibration, parameters=material.subject.left, multiple=MULTIPLE, keep=material.subject.keep)
    material.distil(model, teacher)
    _int8(model, material)


def _torch_pruning(model: nn.Module, material: Material) -> None:
    from foreign_networks.peers import prune_by_torch_pruning

    teacher = copy.deepcopy(model)
    prune_by_torch_pruning(model, material.batches[0], parameters=material.subject.left, multiple=MULTIPLE, keep=material.subject.keep)
    material.distil(model, teacher)
    _int8(model, material)


def _together(model: nn.Module, material: Material) -> None:
    """Channels, ranks, distillation, four bits."""
    teacher, subject = copy.deepcopy(model), material.subject
    muntin.prune(model, material.calibration, parameters=subject.left, multiple=MULTIPLE, keep=subject.keep)
    muntin.low_rank(model, material.calibration, parameters=subject.left**2, multiple=MULTIPLE, keep=subject.keep)
    material.distil(model, teacher)
    muntin.quantize(model, material.calibration, bits=4, **_embeddings(model))


FORMS: dict[str, Form] = {
    "int8": _int8,
    "w4a8 nearest": _w4a8_nearest,
    "w4a8": _w4a8,
    "low rank": _low_rank,
    "svd by energy": _svd_by_energy,
    "prune": _prune,
    "torch-pruning": _torch_pruning,
    "together": _together,
}
TRAINED = ("prune", "torch-pruning", "together")


def parameters_of(model: nn.Module) -> int:
    """Number of values of weights, in whatever form: parameters, and integer weights in buffers."""
    integers = (buffer for buffer in model.buffers() if buffer.dtype in (torch.int8, torch.uint8) and buffer.ndim > 1)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(buffer.numel() for buffer in integers)
