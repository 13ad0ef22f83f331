"""The statistics of batch norms, taken anew for the weights that are kept.

What a norm gathers while training is of weights that are no more, at the pace of its momentum: timm's EfficientNets take a hundredth of a
batch: after eighty steps nearly half of what they divide by is still where it began. Averaged weights have statistics of their own besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muntin.training.precision import Precision

IMAGES = 256
"""Training crops that statistics are taken of; no more than a run has seen."""


def renew_statistics(model: nn.Module, batches: Iterable[Tensor], precision: Precision) -> None:
    """Sets every norm's running mean and variance to the plain average over batches (B, C, H, W) of pixels; all else stays as it was.

    Whatever has a running mean counts as a norm. Costs a forward pass a batch. Source: Wu and Johnson (2021), "Rethinking 'Batch' in
    BatchNorm", section 3 (PreciseBN). Deviation: the variances of the batches are averaged, without the spread of their means.
    """
    norms: list[Any] = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    before = [(norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.train()
        for number, images in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = 1 / number
            with torch.no_grad(), precision.autocast():
                model(images.to(precision.device, torch.float32, memory_format=torch.channels_last))
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def has_statistics(model: nn.Module) -> bool:
    """Whether there is anything to renew: folded norms are gone."""
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())
