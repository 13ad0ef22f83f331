"""The loss of a training: the task's own, soft IoU or Dice (a rare class counts as much as a common one), distance to a teacher.

A loss is a function of sums over pixels or pictures. Sums add up over micro-batches and processes, so that a batch in parts has the loss
and the gradient of the whole.

Axes: B images, K classes, H W map, N pixels, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muntin.artifact.answers import Task
from muntin.data.items import class_counts
from muntin.data.source import Source
from muntin.errors import RecipeError
from muntin.layers.chunks import in_chunks, rows_within
from muntin.tasks.base_learning import Learning, LossTerms
from muntin.tasks.learning import LEARNING
from muntin.text import list_some
from muntin.training.config import TrainingConfig

MOST_WEIGHT = 100.0
"""Largest weight of a class by `class_weights: auto`, times the smallest one."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a task: `entropy` times the mean of the task's own loss (cross-entropy, absolute error), plus `overlap` times the soft
    IoU loss where the task has overlaps, plus `distillation` times the mean distance to a teacher.

    The soft IoU loss is 1 - the mean over the present classes of the soft intersection over union, in [0, 1]: each class in the batch
    counts once. No second derivative. Source: Rahman & Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image
    Segmentation" (ISVC 2016), equation 3. Deviation: sums are over the batch, and 1 is added to numerator and denominator, which bounds the
    gradient of a class of few pixels. `dice`: the soft Dice loss in its place, 1 - the mean over the present classes of
    2·both / (p + truth) (Milletari et al., 1606.04797, section 3; deviation: the same, and without squares).

    `gamma`: as of `LossTerms`. `weights`: of the classes in the cross-entropy, which is then a weighted mean; empty: all equal.

    `value(sums, totals)` is the loss of a batch, from the added `sums` and `totals` of its parts. `memory`: most temporary bytes beyond the
    scores and their gradient; sums that need more are computed in chunks (rows of all maps, or pictures), again for the gradient.
    """

    task: Task
    overlap: float = 0.0
    entropy: float = 1.0
    distillation: float = 0.0
    gamma: float = 0.0
    weights: tuple[float, ...] = ()
    dice: bool = False
    memory: int | None = None

    @property
    def learning(self) -> Learning:
        """The task's training."""
        return LEARNING[self.task]

    @property
    def _overlaps(self) -> bool:
        return self.learning.overlaps and self.overlap > 0

    @property
    def linear(self) -> bool:
        """True if the gradient by the sums does not depend on the sums, so that a part's gradient is known before the other parts'."""
        return not self._overlaps

    def totals(self, target: Tensor, classes: int) -> Tensor:
        """Counts, float64: `(1,)` pictures, pixels or values, or `(1 + K,)` with those of each class, where overlaps or weights count."""
        count = self.learning.counted(target).sum().double()[None]
        if not self._overlaps and not self.weights:
            return count
        return torch.cat([count, self.learning.class_counts(target, len(self.weights) or classes)])

    def sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        """Sums of a part, float64 `(S,)`, with gradients for `scores` of any float type. The last one is the distance to the teacher, 0
        without `teacher_scores`.
        """
        given = [scores, target] if teacher_scores is None else [scores, target, teacher_scores]
        return self.in_parts(self._sums, given)

    def in_parts(self, sums: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
        """`sums` of scores, target and teacher's scores, in chunks within `memory`."""
        axis = self.learning.axis
        count = given[1].shape[axis]
        rows = count if self.memory is None else rows_within(self.memory, self._bytes(*given) // max(1, count), count)
        if rows >= count:
            return sums(*given)

        def part_sums(*tensors: Tensor) -> Tensor:
            return sums(*(tensor.movedim(0, axis) for tensor in tensors))

        return in_chunks(part_sums, [tensor.movedim(axis, 0) for tensor in given], rows=rows, summed=True)

    def distance(self, scores: Tensor, target: Tensor, teacher_scores: Tensor) -> Tensor:
        """The sum of the distance to the teacher, float64 `(1,)`."""
        return self.learning.distance(scores, teacher_scores, target).double()[None]

    def _bytes(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> int:
        """Temporary bytes of the sums and their gradient: of each score copies in its type and, beside it, float32; of each pixel 64."""
        item = scores.element_size()
        copies = 2 * item + 3 * max(4, item) + (0 if teacher_scores is None else item + 7 * max(4, item))
        return copies * scores.numel() + 64 * target.numel()

    def _sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        weights_K = torch.tensor(self.weights, device=scores.device) if self.weights else None
        sums_S = self.learning.sums(scores, target, LossTerms(gamma=self.gamma, weights=weights_K, overlap=self._overlaps))
        distance = sums_S.new_zeros(1) if teacher_scores is None else self.distance(scores, target, teacher_scores)
        return torch.cat([sums_S, distance])

    def value(self, sums_S: Tensor, totals: Tensor) -> Tensor:
        """The loss, a float64 scalar. 0 if nothing is counted."""
        count = totals[0].clamp_min(1)
        if self.weights:
            weight = (totals[1:] * torch.tensor(self.weights, dtype=totals.dtype, device=totals.device)).sum()
            value = self.entropy * sums_S[0] / weight.where(weight > 0, 1.0) + self.distillation * sums_S[-1] / count
        else:
            value = (self.entropy * sums_S[0] + self.distillation * sums_S[-1]) / count
        if not self._overlaps:
            return value
        truth_K = totals[1:]
        both_K, p_K = sums_S[1:-1].chunk(2)
        present_K = (truth_K > 0).double()
        overlap_K = (2 * both_K + 1) / (p_K + truth_K + 1) if self.dice else (both_K + 1) / (p_K + truth_K - both_K + 1)
        return value + self.overlap * ((1 - overlap_K) * present_K).sum() / present_K.sum().clamp_min(1)

    def gradient(self, sums_S: Tensor, totals: Tensor) -> Tensor:
        """The loss's gradient by the sums, float64 `(S,)`."""
        sums_S = sums_S.detach().requires_grad_()
        (gradient_S,) = torch.autograd.grad(self.value(sums_S, totals), sums_S)
        return gradient_S

    def __call__(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        """The loss of one batch, a scalar in FP32, or FP64 for such scores."""
        value = self.value(self.sums(scores, target, teacher_scores), self.totals(target, scores.shape[1]))
        return value if scores.dtype is torch.float64 else value.float()


def loss_of(config: TrainingConfig, *, task: Task, weights: tuple[float, ...] = (), distillation: float = 0.0) -> Loss:
    """The loss that a recipe's `training` describes. `weights`: of the classes, from `class_weights`."""
    dice = config.loss in ("dice", "dice-cross-entropy")
    return Loss(
        task=task, overlap=1.0 if config.loss == "dice" else config.overlap_loss, entropy=0.0 if config.loss == "dice" else 1.0,
        gamma=config.focal_gamma if config.loss == "focal" else 0.0, weights=weights, dice=dice, distillation=distillation,
    )  # fmt: skip


def class_weights(config: TrainingConfig, source: Source) -> tuple[float, ...]:
    """The weights of the classes in the cross-entropy, empty without `class_weights`. "auto" costs a read of all training targets.

    Raises `RecipeError` for a name that is no class.
    """
    given, names = config.class_weights, [entry.name for entry in source.classes]
    if given is None:
        return ()
    if isinstance(given, dict):
        if unknown := [name for name in given if name not in names]:
            raise RecipeError(f"training.class_weights names {unknown[0]!r}, which is no class: the classes are {list_some(names)}")
        return tuple(float(given.get(name, 1.0)) for name in names)
    counts = class_counts(source.split("train"), len(names), source.task).tolist()
    total, present = sum(counts), sum(number > 0 for number in counts)
    weights = [total / (present * number) if number else 1.0 for number in counts]
    return tuple(min(weight, MOST_WEIGHT * min(weights)) for weight in weights)


def weights_note(weights: tuple[float, ...], source: Source) -> tuple[str, ...]:
    """A note on the weights of the classes, none without weights."""
    pairs = [f"{entry.name} {weight:.3g}" for entry, weight in zip(source.classes, weights, strict=False)]
    return (f"class weights in the loss: {list_some(pairs, 12)}",) if pairs else ()
