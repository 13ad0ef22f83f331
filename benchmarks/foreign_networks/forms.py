"""The forms in which `foreign.py` compares a network: each pass alone, their baselines, and the passes together.

    FP32 module -> passes, with distillation on inputs without labels where a form is trained -> module that muntin.export takes

A form that narrows layers is quantised to INT8 in the end, so that its time compares with INT8's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import muntin
from foreign_networks.peers import low_rank_by_energy, pruned_by_torch_pruning
from foreign_networks.subjects import Batch, Subject

MULTIPLE = 8
"""Widths and ranks are multiples of it."""
AVERAGE = 4.4
"""Average bits of a weight where widths are mixed."""
RATE = 3e-4
"""Learning rate of distillation, for every form."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a form may use: inputs without labels, and how long it may train."""

    subject: Subject
    batches: Sequence[Batch]
    """For distillation."""
    calibration: Sequence[Batch]
    steps: int
    seed: int

    def distil(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        muntin.distil(student, teacher, self.batches, steps=self.steps, loss=self.subject.distance, learning_rate=RATE, seed=self.seed)
        return student


Form = Callable[[nn.Module, Material], nn.Module]
"""From a module, which it may change, to the compressed one."""


def _int8(model: nn.Module, material: Material) -> nn.Module:
    muntin.quantize(model, material.calibration)
    return model


def _narrow(model: nn.Module, material: Material, *, bits: float) -> nn.Module:
    muntin.quantize(model, material.calibration, bits=bits, **embeddings(model))
    return model


def _w4a8_nearest(model: nn.Module, material: Material) -> nn.Module:
    """Scales of least squared error for each output channel, nearest rounding, and nothing else."""
    parts: dict[str, Any] = {"rounding": "nearest", "equalize": False, "correct_bias": False, "min_sqnr_db": 0}
    muntin.quantize(model, material.calibration, bits=4, **parts, **embeddings(model))
    return model


def embeddings(model: nn.Module) -> dict[str, Any]:
    """Options of quantize for a model with embeddings."""
    return {"embedding_bits": 4} if any(isinstance(layer, nn.Embedding) for layer in model.modules()) else {}


def _low_rank(model: nn.Module, material: Material) -> nn.Module:
    subject = material.subject
    muntin.low_rank(model, material.calibration, parameters=subject.parameters, multiple=MULTIPLE, keep=subject.keep)
    return _int8(model, material)


def _svd_by_energy(model: nn.Module, material: Material) -> nn.Module:
    return _int8(low_rank_by_energy(model, parameters=material.subject.parameters, keep=material.subject.keep), material)


def _pruned(model: nn.Module, material: Material) -> nn.Module:
    muntin.prune(model, material.calibration, macs=material.subject.macs, multiple=MULTIPLE, keep=material.subject.keep)
    return model


def _prune(model: nn.Module, material: Material) -> nn.Module:
    teacher = copy.deepcopy(model)
    return _int8(material.distil(_pruned(model, material), teacher), material)


def _torch_pruning(model: nn.Module, material: Material) -> nn.Module:
    images = [batch for batch in material.calibration if isinstance(batch, Tensor)]
    return _int8(material.distil(pruned_by_torch_pruning(model, images, macs=material.subject.macs), model), material)


def _together(model: nn.Module, material: Material) -> nn.Module:
    """Channels, ranks, distillation, mixed bits."""
    teacher, subject = copy.deepcopy(model), material.subject
    _pruned(model, material)
    muntin.low_rank(model, material.calibration, parameters=subject.parameters, multiple=MULTIPLE, keep=subject.keep)
    return _narrow(material.distil(model, teacher), material, bits=AVERAGE)


FORMS: dict[str, Form] = {
    "int8": _int8,
    "w4a8 nearest": _w4a8_nearest,
    "w4a8": partial(_narrow, bits=4),
    "w4.4a8": partial(_narrow, bits=AVERAGE),
    "w5.9a8": partial(_narrow, bits=5.9),
    "low rank": _low_rank,
    "svd by energy": _svd_by_energy,
    "prune": _prune,
    "torch-pruning": _torch_pruning,
    "together": _together,
}


def parameters_of(model: nn.Module) -> int:
    """Number of values of weights, in whatever form: parameters, and integer weights in buffers."""
    integers = (buffer for buffer in model.buffers() if buffer.dtype in (torch.int8, torch.uint8) and buffer.ndim > 1)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(buffer.numel() for buffer in integers)
