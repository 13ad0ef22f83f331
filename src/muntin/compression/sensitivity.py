"""Which layers need more bits: measured one by one on calibration images, then chosen together under one budget.

model in W4A8 -> for each layer, for each wider form: distance of the answer to the FP32 model's -> fewest losses for so many bits
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from muntin.compression.fake_quantization import weight_scale
from muntin.compression.qat import FLOAT, QATConv2d, QATLinear
from muntin.compression.ranks import Choice, allocate
from muntin.compression.rewrite import named, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Sensitivity
from muntin.training.loss import distillation_loss

LEAST = 1e-3
"""A layer whose gain is a smaller share of the whole distance is not key: that is what measuring again would change."""
BETTER = 1.25
"""How many times the gain of 8 bits 16-bit floats must have: they cost twice the bytes, and a pass in and out of integers."""
WIDER = (8, FLOAT)
"""What a key layer can get: 8-bit weights, or 16-bit floats for weights and inputs."""
STORED = {FLOAT: 16}
"""Bits that a weight takes in the artefact, where they are not the width itself."""


def measure_sensitivity(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], *, task: str, widths: Sequence[int] = WIDER
) -> dict[str, Sensitivity]:
    """Each layer of a model that `prepare_qat` has just put into W4A8, given each wider form alone; the model is left as it was.

    `batches`: `(B, C, H, W)` raw pixels of training images. Costs a forward pass over them for each layer and width.
    """
    model.eval()
    teacher.eval()
    with torch.no_grad():
        images = [batch.to(torch.float32) for batch in batches]
        wanted = [teacher(batch) for batch in images]

        def distance() -> float:
            return sum(float(distillation_loss(task, model(x), y)) for x, y in zip(images, wanted, strict=True)) / len(images)

        before = distance()
        found = {}
        layers: list[tuple[str, QATLinear | QATConv2d]] = list(named(model, QATLinear, QATConv2d))
        for name, layer in layers:
            gains = {}
            for width in widths:
                if STORED.get(width, width) > layer.bits:
                    replace(model, name, _wider(layer, width))
                    gains[width] = 1 - distance() / before if before else 0.0
                    replace(model, name, layer)
            found[name] = Sensitivity(bits=layer.bits, weights=layer.weight.numel(), gains=gains)
    return found


def _wider(layer: QATLinear | QATConv2d, width: int) -> nn.Module:
    if width == FLOAT:
        return layer.plain()
    wider = copy.deepcopy(layer)
    wider.bits = width
    wider.log_scale.copy_(weight_scale(layer.weight, 0, width).log())
    return wider


def assign_bits(sensitivity: Mapping[str, Sensitivity], average_bits: float, *, floats: int = 0) -> dict[str, int]:
    """Bits of each layer: those that gain most for what they add, until a weight has `average_bits` on average.

    A width that gains less than `LEAST`, or floats that gain less than `BETTER` times what 8 bits do, are not taken, whatever is left to
    spend. Widths are those measured; `FLOAT` counts as the 16 bits it is stored in. `floats`: weights of other layers, which stay floats
    and count too; where they leave nothing to spend, no layer gets more bits. Raises `MuntinError` where the layers themselves have more
    than that already.
    """
    menus: dict[str, list[Choice]] = {}
    for name, layer in sensitivity.items():
        key = {width: gain for width, gain in layer.gains.items() if gain >= LEAST}
        if FLOAT in key and key[FLOAT] < BETTER * key.get(8, 0.0):
            del key[FLOAT]
        most = max([0.0, *key.values()])
        menus[name] = [Choice(ranks=(layer.bits,), parameters=layer.bits * layer.weights, loss=most)]
        menus[name] += [
            Choice(ranks=(width,), parameters=STORED.get(width, width) * layer.weights, loss=most - gain) for width, gain in key.items()
        ]
    weights = sum(layer.weights for layer in sensitivity.values())
    least = sum(layer.bits * layer.weights for layer in sensitivity.values())
    if least > average_bits * weights:
        raise MuntinError(
            f"average_bits {average_bits:g} is out of reach: the layers have {least / weights:.3g} already; give at least as many"
        )
    fixed = STORED[FLOAT] * floats
    budget = max(least + fixed, int(average_bits * (weights + floats)))
    picked = allocate(menus, budget, fixed=fixed)
    return {name: choice.ranks[0] for name, choice in picked.items()}
