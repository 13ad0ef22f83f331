"""Training one unit of a model in quantisation-aware training to give the float unit's output.

The squared difference of each channel is weighed by the squared gradient of the answer's log-probabilities with respect to it (BRECQ, Li et
al., 2102.05426, section 3.2). Deviations: the gradient is straight through the rounding, with learned scales, and begins at the result of
rounding column by column; classes are drawn from the model's own answer, without labels.

Axes: B images, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.quantization.units import Arguments, Unit, run_unit
from muntin.compression.sparsity.pattern import HeldZeros
from muntin.models.eager import ModelInputs, call, tensors_of

WEIGHT_RATE, SCALE_RATE, BIAS_RATE = 0.02, 0.001, 0.002
"""Learning rates at the start: of weights in steps of their grid, of logarithms of scales, of biases in deviations of the weight's rows."""


def tune_unit(
    unit: nn.Module,
    layers: Mapping[str, QATLinear | QATConv2d],
    inputs: Sequence[Arguments],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor | float],
    *,
    steps: int,
) -> tuple[float, float]:
    """Train the layers of a unit, in place. Returns the weighed squared difference before and after, over all batches.

    `inputs`, `targets`, `weights`: for each batch. The state with the lower difference of the two is kept.
    """
    groups: list[dict[str, Any]] = []
    for layer in layers.values():
        step = float(layer.log_scale.detach().exp().mean())
        groups += [
            {"params": [layer.weight], "lr": WEIGHT_RATE * step},
            {"params": [layer.log_scale, layer.input.log_scale], "lr": SCALE_RATE},
        ]
        if layer.bias is not None:
            spread = float(layer.weight.detach().flatten(1).norm(dim=1).mean())
            groups.append({"params": [layer.bias], "lr": BIAS_RATE * spread})
    rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter.requires_grad for parameter in parameters]
    start = [parameter.detach().clone() for parameter in parameters]
    before = _difference(unit, inputs, targets, weights)
    optimizer, zeros = torch.optim.Adam(groups), HeldZeros(layers.values())
    order = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = int(torch.randint(len(inputs), (), generator=order))
        with torch.enable_grad():
            loss = _distance(run_unit(unit, inputs[index]), targets[index], weights[index])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        zeros.of_weights()
    optimizer.zero_grad()
    for parameter, was in zip(parameters, trained, strict=True):
        parameter.requires_grad_(was)
    after = _difference(unit, inputs, targets, weights)
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return before, min(after, before)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of floats of an output."""
    return next(part for part in tensors_of(output) if part.is_floating_point())


def _distance(output: Any, target: Tensor, weight: Tensor | float) -> Tensor:
    return ((first_tensor(output) - target).square() * weight).mean()


@torch.no_grad()
def _difference(unit: nn.Module, inputs: Sequence[Arguments], targets: Sequence[Tensor], weights: Sequence[Tensor | float]) -> float:
    terms = zip(inputs, targets, weights, strict=True)
    return sum(float(_distance(run_unit(unit, given), target, weight)) for given, target, weight in terms) / len(inputs)


def output_weights(model: nn.Module, units: Sequence[Unit], batches: Sequence[ModelInputs]) -> dict[str, list[Tensor | float]]:
    """For each unit and batch: weights of the channels of its output, with mean 1. Costs a pass and its gradient over the batches.

    The squared gradient of the log-probability of a class that is drawn from the answer (over axis 1), averaged over the positions of a
    row. All weights are 1 where the answer does not depend on the output by a gradient.
    """
    weights: dict[str, list[Tensor | float]] = {unit.name: [] for unit in units}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        outputs: dict[str, Tensor] = {}
        handles = [model.get_submodule(unit.name).register_forward_hook(_keeping(outputs, unit.name)) for unit in units if unit.name]
        try:
            with torch.enable_grad():
                answer = first_tensor(call(model, batch)).float()
                scores_BK = answer.movedim(1, -1).flatten(0, -2) if answer.ndim > 1 else answer[:, None]
                drawn_B = torch.multinomial(scores_BK.detach().softmax(1).cpu(), 1, generator=generator).to(scores_BK.device)
                loss = -scores_BK.log_softmax(1).gather(1, drawn_B).sum()
        finally:
            for handle in handles:
                handle.remove()
        names = [name for name in outputs if outputs[name].requires_grad] if loss.requires_grad else []
        gradients = (
            dict(zip(names, torch.autograd.grad(loss, [outputs[name] for name in names], allow_unused=True), strict=True)) if names else {}
        )
        for unit in units:
            weights[unit.name].append(_channel_weight(gradients.get(unit.name)))
    for name, per_batch in weights.items():
        mean = sum(float(torch.as_tensor(one).mean()) for one in per_batch) / len(per_batch)
        weights[name] = [one / mean for one in per_batch] if mean > 0 else [1.0] * len(per_batch)
    return weights


def _channel_weight(gradient: Tensor | None) -> Tensor | float:
    if gradient is None:
        return 1.0
    squared = gradient.square()
    if squared.ndim < 3:
        return squared
    return squared.mean((2, 3), keepdim=True) if squared.ndim == 4 else squared.mean(1, keepdim=True)


def _keeping(outputs: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        outputs[name] = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        return outputs[name].clone()  # the model may write into it

    return hook
