"""Choosing layers that need more bits: each measured alone on calibration images, then all chosen under one budget.

model in W4A8 -> for each layer and each wider form: distance of the answer to the FP32 model's -> allocation
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from muntin.artifact.answers import Task
from muntin.compression.allocation import Choice, allocate
from muntin.compression.quantization.fake_quantization import weight_scale
from muntin.compression.quantization.qat import FLOAT, QATConv2d, QATLinear
from muntin.compression.rewrite import named, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Sensitivity
from muntin.tasks.learning import LEARNING

LEAST = 1e-3
"""Least gain of a key layer, as a share of the distance: smaller ones are within the measurement's noise."""
BETTER = 1.25
"""Least ratio of the gains of 16-bit floats and 8 bits: floats cost twice the bytes, and a conversion from and to integers."""
WIDER = (8, FLOAT)
"""Widths for a key layer: 8-bit weights, or 16-bit floats for weights and inputs."""
STORED = {FLOAT: 16}
"""Bits of a stored weight, if they differ from the width."""


def measure_sensitivity(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], *, task: Task, widths: Sequence[int] = WIDER
) -> dict[str, Sensitivity]:
    """Measure each layer of a model after `prepare_qat` with each wider form in its place alone; the model is restored.

    `batches`: `(B, C, H, W)` raw pixels of training images. Costs a pass over them for each layer and width.
    """
    model.eval()
    teacher.eval()
    with torch.no_grad():
        images = [batch.to(torch.float32) for batch in batches]
        teacher_scores = [teacher(batch) for batch in images]

        def distance() -> float:
            return sum(float(LEARNING[task].mean_distance(model(x), y)) for x, y in zip(images, teacher_scores, strict=True)) / len(images)

        before = distance()
        measured = {}
        layers: list[tuple[str, QATLinear | QATConv2d]] = list(named(model, QATLinear, QATConv2d))
        for name, layer in layers:
            gains = {}
            for width in widths:
                if STORED.get(width, width) > layer.bits:
                    replace(model, name, _wider(layer, width))
                    gains[width] = 1 - distance() / before if before else 0.0
                    replace(model, name, layer)
            measured[name] = Sensitivity(bits=layer.bits, weights=layer.weight.numel(), gains=gains)
    return measured


def _wider(layer: QATLinear | QATConv2d, width: int) -> nn.Module:
    if width == FLOAT:
        return layer.plain()
    wider = copy.deepcopy(layer)
    wider.bits = width
    wider.log_scale.copy_(weight_scale(layer.weight, 0, width).log())
    return wider


def assign_bits(sensitivity: Mapping[str, Sensitivity], average_bits: float, *, floats: int = 0) -> dict[str, int]:
    """Bits of each layer with the largest total gain at `average_bits` a weight on average.

    A width with a gain below `LEAST`, and floats with a gain below `BETTER` times that of 8 bits, are never chosen. `FLOAT` counts as
    16 bits. `floats`: weights of other layers, which stay floats and count too; if they use up the budget, no layer gets more bits.
    Raises `MuntinError` if the layers already have more than `average_bits`.
    """
    menus: dict[str, list[Choice]] = {}
    for name, layer in sensitivity.items():
        key = {width: gain for width, gain in layer.gains.items() if gain >= LEAST}
        if FLOAT in key and key[FLOAT] < BETTER * key.get(8, 0.0):
            del key[FLOAT]
        largest = max([0.0, *key.values()])
        menus[name] = [Choice(ranks=(layer.bits,), parameters=layer.bits * layer.weights, loss=largest)]
        menus[name] += [
            Choice(ranks=(width,), parameters=STORED.get(width, width) * layer.weights, loss=largest - gain) for width, gain in key.items()
        ]
    weights = sum(layer.weights for layer in sensitivity.values())
    least = sum(layer.bits * layer.weights for layer in sensitivity.values())
    if least > average_bits * weights:
        raise MuntinError(
            f"average_bits {average_bits:g} is out of reach: the layers have {least / weights:.3g} already; give at least as many"
        )
    fixed = STORED[FLOAT] * floats
    budget = max(least + fixed, int(average_bits * (weights + floats)))
    return {name: choice.ranks[0] for name, choice in allocate(menus, budget, fixed=fixed).items()}
