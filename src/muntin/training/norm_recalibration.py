"""Norm recalibration: statistics of batch norms for the averaged weights.

The running statistics of training are of earlier weights, and with a small momentum (timm's EfficientNets: 0.01) of the initial ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muntin.training.precision import TrainingPrecision

MAX_IMAGES = 256
"""Maximum number of training crops for the statistics; fewer if a run has seen fewer."""


def renew_statistics(model: nn.Module, batches: Iterable[Tensor], precision: TrainingPrecision) -> None:
    """Set every norm's running mean and variance to the plain average over batches (B, C, H, W) of pixels.

    Frozen norms, which stay in `eval` mode in training or have no momentum, are unchanged. Takes no batch if there is no other norm. Costs
    a forward pass a batch. Source: Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3 (PreciseBN). Deviation: variances
    of the batches are averaged, without the spread of their means.
    """
    norms = _gathering(model)
    if not norms:
        return
    before = [(norm.training, norm.momentum) for norm in norms]
    handles: list[Any] = []
    try:
        for norm in norms:
            norm.train()
        handles += [norm.register_forward_pre_hook(_share()) for norm in norms]
        for number, images in enumerate(batches, 1):
            for norm in norms:  # for a norm whose forward is called without hooks
                norm.momentum = 1 / number
            with torch.no_grad(), precision.autocast():
                model(images.to(precision.device, torch.float32, memory_format=torch.channels_last))
    finally:
        for handle in handles:
            handle.remove()
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def _share() -> Callable[..., None]:
    """A hook that gives all calls of a norm, even several in one forward pass, the same share of its statistics."""
    calls = 0

    def hook(norm: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        norm.momentum = 1 / calls

    return hook


def _gathering(model: nn.Module) -> list[Any]:
    """The norms whose statistics training updates."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    norms = [m for m, _ in modes if m.training and getattr(m, "running_mean", None) is not None and hasattr(m, "momentum")]
    for module, mode in modes:
        module.training = mode
    return norms
