"""How a model learns from new data: what it sees of the old data, which weights move, and what keeps it as it was.

    replay   kept old pictures in every batch, and the old model as teacher of scores and pooled features (DER++, PLOP)
    naive    new pictures alone: fine-tuning, which forgets
    joint    all old and new pictures, and all steps of the first training: the bound, at its price
    frozen   the last layer alone: of new classes, with new pictures alone (DFT*); if there are none, of all classes, with kept old pictures
             too, without which the rows of classes that new pictures lack would be forgotten

Sources: DER++ (Buzzega et al., 2004.07211, section 3; deviation: the old model answers anew for each augmented crop, no scores are stored),
PLOP (Douillard et al., 2011.11390), DFT* (2508.04267).

Axes: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from muntin.data.batch_feed import ImageBatch
from muntin.data.batches import BatchMaker
from muntin.training.config import UpdateStrategy


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """`old`: the old pictures to train with; of `head_only` without new classes the memory. `teacher`: the old model's answers enter the
    loss. `head_only`: other weights are frozen. `whole`: take all steps of the first training; a model that is not compressed then begins
    with random weights."""

    old: Literal["memory", "all", "none"]
    teacher: bool = False
    head_only: bool = False
    whole: bool = False


STRATEGIES: dict[UpdateStrategy, Strategy] = {
    "replay": Strategy(old="memory", teacher=True),
    "naive": Strategy(old="none"),
    "joint": Strategy(old="all", whole=True),
    "frozen": Strategy(old="none", head_only=True),
}


class ReplayCrops:
    """Batches of `batch_size` with a share of old crops, at random places of the batch. A pure function of seed and step."""

    def __init__(self, old: BatchMaker, new: BatchMaker, *, batch_size: int, share: float, seed: int) -> None:
        self._old, self._new, self._size, self._share, self._seed = old, new, batch_size, share, seed

    def old_count(self, step: int) -> int:
        """Old crops in a batch: whole numbers whose mean over the steps is the share."""
        per_step = self._size * self._share
        return int((step + 1) * per_step) - int(step * per_step)

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """As of `Crops.batch`."""
        old = self.old_count(step)
        parts = [self._old.batch(step, slice(0, old))] if old else []
        parts += [self._new.batch(step, slice(0, self._size - old))] if old < self._size else []
        order = torch.from_numpy(np.random.default_rng((self._seed, step, 1)).permutation(self._size))[rows]
        images_BHWC = torch.cat([images.permute(0, 2, 3, 1) for images, _ in parts])[order]
        return images_BHWC.permute(0, 3, 1, 2), torch.cat([target for _, target in parts])[order]


def freeze_body(model: nn.Module, classifier: Mapping[str, int], *, added: bool) -> None:
    """Let only the classifier's parameters be trained, in place; norms keep their statistics.

    `classifier`: names and lengths before growth (`classifier_tensors`). `added`: rows up to these lengths are frozen, too.
    """
    for name, parameter in model.named_parameters():
        if name not in classifier:
            parameter.requires_grad_(False)
        elif added:
            parameter.register_hook(_without_first(classifier[name]))  # type: ignore[no-untyped-call]
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()
            module.train = MethodType(_stay, module)  # type: ignore[method-assign]  # a method, so that copies of the model have their own


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _without_first(rows: int) -> Any:
    """A hook that removes the gradient of the first rows."""

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:rows] = 0
        return gradient

    return hook
