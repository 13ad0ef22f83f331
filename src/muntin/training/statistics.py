"""The statistics of batch norms, taken anew for the weights that are kept.

What a norm gathers while training is of weights that are no more, at the pace of its momentum: timm's EfficientNets take a hundredth of a
batch: after eighty steps nearly half of what they divide by is still where it began. Averaged weights have statistics of their own besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muntin.training.precision import TrainingPrecision

IMAGES = 256
"""Training crops that statistics are taken of; no more than a run has seen."""


def renew_statistics(model: nn.Module, batches: Iterable[Tensor], precision: TrainingPrecision) -> None:
    """Sets every norm's running mean and variance to the plain average over batches (B, C, H, W) of pixels; all else stays as it was.

    Norms that stay in `eval` mode when their model is trained, or have no momentum, are frozen: they keep what they have. Costs a forward
    pass a batch. Source: Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3 (PreciseBN). Deviation: the variances of the
    batches are averaged, without the spread of their means.
    """
    norms = _gathering(model)
    before = [(norm.training, norm.momentum) for norm in norms]
    handles: list[Any] = []
    try:
        for norm in norms:
            norm.train()
        handles += [norm.register_forward_pre_hook(_share()) for norm in norms]
        for number, images in enumerate(batches, 1):
            for norm in norms:  # for one whose forward is called past its hooks
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
    """Gives each call of a norm, of which a forward pass may have several, the same share of its statistics."""
    calls = 0

    def hook(norm: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        norm.momentum = 1 / calls

    return hook


def has_statistics(model: nn.Module) -> bool:
    """Whether there is anything to renew: folded norms are gone, and frozen ones stay as they are."""
    return bool(_gathering(model))


def _gathering(model: nn.Module) -> list[Any]:
    """The norms whose statistics training takes."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    norms = [m for m, _ in modes if m.training and getattr(m, "running_mean", None) is not None and hasattr(m, "momentum")]
    for module, mode in modes:
        module.training = mode
    return norms
