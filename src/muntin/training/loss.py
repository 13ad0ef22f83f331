"""Losses: cross-entropy, focal, soft IoU and Dice (a rare class counts as much as a common one), absolute error, distance to a teacher.

A loss is a function of sums over pixels or pictures. Sums add up over micro-batches and processes, so that a batch in parts has the loss
and the gradient of the whole.

Axes: B images, K classes, H W map, N pixels, S sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.data.classes import list_some
from muntin.data.items import class_counts
from muntin.data.source import Source
from muntin.errors import RecipeError
from muntin.images import IGNORED
from muntin.layers.chunks import in_chunks, rows_within
from muntin.training.config import TrainingConfig

MOST_WEIGHT = 100.0
"""Largest weight of a class by `class_weights: auto`, times the smallest one."""

UNIT = 64.0
"""Grey levels that are 1 in the loss of restore, as in the model's own numbers."""


class _SegmentSums(torch.autograd.Function):
    """Sums over pixels of scores `(B, K, N)` and classes `(B, N)`: the cross-entropy, and with `overlap` the probability of the true class
    and all probability of each class; float64 `(1,)` or `(1 + 2K,)`. `gamma`, `weights_K`: of the cross-entropy, as of `Loss`.

    The explicit gradient passes ten times over the full-size scores; autograd would pass about thirty times.
    """

    @staticmethod
    def forward(ctx: Any, scores_BKN: Tensor, target_BN: Tensor, overlap: bool, gamma: float, weights_K: Tensor | None) -> Tensor:
        ctx.overlap, ctx.dtype = overlap, scores_BKN.dtype
        sums_S, *kept = _segment_sums(scores_BKN, target_BN, overlap, gamma, weights_K)
        ctx.save_for_backward(*kept)
        return sums_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _segment_gradient(grad_S, ctx.overlap, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None


def _segment_sums(
    scores_BKN: Tensor, target_BN: Tensor, overlap: bool, gamma: float = 0.0, weights_K: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the sums, and what the gradient needs: probabilities `(B, K, N)`, 0 where ignored, those of the true class, classes, and the
    slopes of the cross-entropy, which are 0 where ignored and otherwise 1 without `gamma` and weights."""
    counted_BN = target_BN != IGNORED
    target_BN = target_BN.masked_fill(~counted_BN, 0)
    log_BKN = at_least_float32(scores_BKN).log_softmax(1)
    weight_BN = counted_BN.to(log_BKN.dtype)
    log_true_BN = _of_class(log_BKN, target_BN)
    slope_BN = factor_BN = weight_BN if weights_K is None else weight_BN * weights_K.to(weight_BN)[target_BN]
    if gamma:
        true_BN = log_true_BN.exp()
        rest_BN = (1 - true_BN).clamp_min(torch.finfo(true_BN.dtype).eps)  # a power below 0 of 0 is infinite
        slope_BN = factor_BN * (rest_BN**gamma - gamma * true_BN * rest_BN ** (gamma - 1) * log_true_BN)
        factor_BN = factor_BN * rest_BN**gamma
    entropy = -(log_true_BN * factor_BN).sum()
    p_BKN = log_BKN.exp_()
    p_BKN *= weight_BN.unsqueeze(1)
    true_BN = _of_class(p_BKN, target_BN)
    if not overlap:
        return entropy.double()[None], p_BKN, true_BN, target_BN, slope_BN
    both_K = _by_class(true_BN, target_BN, scores_BKN.shape[1])
    return torch.cat([entropy.double()[None], both_K, p_BKN.sum((0, 2)).double()]), p_BKN, true_BN, target_BN, slope_BN


def _segment_gradient(grad_S: Tensor, overlap: bool, p_BKN: Tensor, true_BN: Tensor, target_BN: Tensor, slope_BN: Tensor) -> Tensor:
    """The gradient by the scores `(B, K, N)`, for the gradient by the sums."""
    grad_S = grad_S.to(p_BKN.dtype)
    entropy_BN = slope_BN * grad_S[0]
    if not overlap:
        return (p_BKN * entropy_BN.unsqueeze(1)).scatter_add_(1, target_BN.unsqueeze(1), -entropy_BN.unsqueeze(1))
    both_K, p_K = grad_S[1:].chunk(2)  # by a pixel's p: of its true class, of any class
    true_BN = both_K[target_BN] * true_BN
    grad_BKN = p_BKN * p_K[:, None]
    grad_BKN.addcmul_(p_BKN, (entropy_BN - true_BN - grad_BKN.sum(1)).unsqueeze(1))
    return grad_BKN.scatter_add_(1, target_BN.unsqueeze(1), (true_BN - entropy_BN).unsqueeze(1))


def _of_class(values_BKN: Tensor, target_BN: Tensor) -> Tensor:
    return values_BKN.gather(1, target_BN.unsqueeze(1)).squeeze(1)


def _class_shares(target: Tensor, classes: int) -> Tensor:
    """Shares of the classes in each picture `(B, K)`, from class numbers `(B,)` or such shares."""
    return F.one_hot(target, classes) if target.ndim == 1 else target


def _by_class(values_BN: Tensor, target_BN: Tensor, classes: int) -> Tensor:
    """Sums of values by their pixels' classes, float64 `(K,)`: scatter_add sums one by one."""
    zeros_BK = torch.zeros(len(values_BN), classes, dtype=torch.float64, device=values_BN.device)
    return zeros_BK.scatter_add(1, target_BN, values_BN.double()).sum(0)


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are in it."""
    return values if values.dtype is torch.float64 else values.float()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a task: `entropy` times the cross-entropy, or for restore the mean absolute error in units of 64 grey levels, plus
    `overlap` times the soft IoU loss (segment), plus `distillation` times the distance to a teacher. See `segment_loss` and
    `distillation_loss`.

    `gamma`: above 0 the cross-entropy is the focal loss: each pixel or picture counts by (1 - p)^gamma, p of its true class (Lin et al.,
    1708.02002, equation 4). `weights`: of the classes in the cross-entropy, which is then a weighted mean; empty: all equal. `dice`: the
    overlap is the soft Dice loss, 1 - the mean over the present classes of 2·both / (p + truth), in place of the soft IoU loss (Milletari
    et al., 1606.04797, section 3; deviation: as of `segment_loss`, and without squares).

    `value(sums, totals)` is the loss of a batch, from the added `sums` and `totals` of its parts. `memory`: most temporary bytes beyond the
    scores and their gradient; sums that need more are computed in chunks (rows of all maps, or pictures), again for the gradient.
    """

    task: str
    overlap: float = 0.0
    entropy: float = 1.0
    distillation: float = 0.0
    gamma: float = 0.0
    weights: tuple[float, ...] = ()
    dice: bool = False
    memory: int | None = None

    @property
    def _overlaps(self) -> bool:
        return self.task == "segment" and self.overlap > 0

    @property
    def linear(self) -> bool:
        """True if the gradient by the sums does not depend on the sums, so that a part's gradient is known before the other parts'."""
        return not self._overlaps

    def totals(self, target: Tensor, classes: int) -> Tensor:
        """Counts, float64: `(1,)` pictures, pixels or values, or `(1 + K,)` with those of each class, where overlaps or weights count."""
        classes = len(self.weights) or classes
        if self.task != "segment":
            items = target.numel() if self.task == "restore" else len(target)
            count = torch.tensor([float(items)], dtype=torch.float64, device=target.device)
            return torch.cat([count, _class_shares(target, classes).double().sum(0)]) if self.weights else count
        counted_BN = (target != IGNORED).flatten(1)
        if not self._overlaps and not self.weights:
            return counted_BN.sum().double()[None]
        of_K = _by_class(counted_BN, target.flatten(1).masked_fill(~counted_BN, 0), classes)
        return torch.cat([of_K.sum()[None], of_K])

    def sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        """Sums of a part, float64 `(S,)`, with gradients for `scores` of any float type: `(B, K, H, W)` and target `(B, H, W)`, or `(B, K)`
        and `(B,)`, or `(B, K)` shares of the classes, or for restore two of `(B, C, H, W)`. The last one is the distance to the teacher, 0
        without `teacher_scores`.
        """
        given = [scores, target] if teacher_scores is None else [scores, target, teacher_scores]
        return self.in_parts(self._sums, given)

    def in_parts(self, sums: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
        """`sums` of scores, target and teacher's scores, in chunks within `memory`."""
        axis = 0 if self.task == "classify" else -2
        count = given[1].shape[axis]
        rows = count if self.memory is None else rows_within(self.memory, self._bytes(*given) // max(1, count), count)
        if rows >= count:
            return sums(*given)

        def part_sums(*tensors: Tensor) -> Tensor:
            return sums(*(tensor.movedim(0, axis) for tensor in tensors))

        return in_chunks(part_sums, [tensor.movedim(axis, 0) for tensor in given], rows=rows, summed=True)

    def distance(self, scores: Tensor, target: Tensor, teacher_scores: Tensor) -> Tensor:
        """The sum of the distance to the teacher, float64 `(1,)`."""
        return _divergence(self.task, scores, teacher_scores, target).double()[None]

    def _bytes(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> int:
        """Temporary bytes of the sums and their gradient: of each score copies in its type and, beside it, float32; of each pixel 64."""
        item = scores.element_size()
        copies = 2 * item + 3 * max(4, item) + (0 if teacher_scores is None else item + 7 * max(4, item))
        return copies * scores.numel() + 64 * target.numel()

    def _sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        weights_K = torch.tensor(self.weights, device=scores.device) if self.weights else None
        if self.task == "segment":
            sums_S: Tensor = _SegmentSums.apply(  # type: ignore[no-untyped-call]
                scores.contiguous().flatten(2), target.flatten(1), self._overlaps, self.gamma, weights_K
            )
        elif self.task == "restore":
            difference = (at_least_float32(scores) - target) / UNIT
            sums_S = difference.abs().sum().double()[None]
        elif self.gamma or weights_K is not None:
            log_BK = at_least_float32(scores).log_softmax(1)
            share_BK = _class_shares(target, scores.shape[1]).to(log_BK) * (1 if weights_K is None else weights_K)
            focus_BK = (1 - log_BK.exp()).clamp_min(torch.finfo(log_BK.dtype).eps) ** self.gamma
            sums_S = -(share_BK * focus_BK * log_BK).sum().double()[None]
        else:
            sums_S = F.cross_entropy(at_least_float32(scores), target, reduction="sum").double()[None]
        distance = sums_S.new_zeros(()) if teacher_scores is None else _divergence(self.task, scores, teacher_scores, target).double()
        return torch.cat([sums_S, distance[None]])

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


def loss_of(config: TrainingConfig, *, task: str, weights: tuple[float, ...] = (), distillation: float = 0.0) -> Loss:
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
    counts = class_counts(source.split("train"), len(names)).tolist()
    total, present = sum(counts), sum(number > 0 for number in counts)
    weights = [total / (present * number) if number else 1.0 for number in counts]
    return tuple(min(weight, MOST_WEIGHT * min(weights)) for weight in weights)


def weights_note(weights: tuple[float, ...], source: Source) -> tuple[str, ...]:
    """A note on the weights of the classes, none without weights."""
    pairs = [f"{entry.name} {weight:.3g}" for entry, weight in zip(source.classes, weights, strict=False)]
    return (f"class weights in the loss: {list_some(pairs, 12)}",) if pairs else ()


def segment_loss(scores_BKHW: Tensor, target_BHW: Tensor, overlap: float, *, entropy: float = 1.0) -> Tensor:
    """`entropy` times the cross-entropy over the pixels that are not ignored, plus `overlap` times the soft IoU loss.

    The soft IoU loss is 1 - the mean over the present classes of the soft intersection over union, in [0, 1]: each class in the batch
    counts once. Zero if all pixels are ignored; no second derivative. Source: Rahman & Wang, "Optimizing Intersection-Over-Union in Deep
    Neural Networks for Image Segmentation" (ISVC 2016), equation 3. Deviation: sums are over the batch, and 1 is added to numerator and
    denominator, which bounds the gradient of a class of few pixels.
    """
    return Loss(task="segment", overlap=overlap, entropy=entropy)(scores_BKHW, target_BHW)


def distillation_loss(task: str, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
    """Distance to a teacher's scores, a scalar in FP32: the KL divergence from its probabilities, mean over pixels or images; for restore
    the mean squared difference in units of 64 grey levels. `target`: labels, whose ignored pixels (255) do not count.

    Source: Hinton et al., 1503.02531, section 2, at temperature 1.
    """
    if task == "restore":
        return F.mse_loss(scores.float() / UNIT, teacher_scores.float() / UNIT)
    if task == "segment" and target is not None:
        return _divergence(task, scores, teacher_scores, target) / (target != IGNORED).sum().clamp_min(1)
    return _divergence(task, scores, teacher_scores, None) * scores.shape[1] / scores.numel()


def _divergence(task: str, scores: Tensor, teacher_scores: Tensor, target: Tensor | None) -> Tensor:
    """The KL divergence from the teacher's probabilities, summed over the pixels or images that count; `target` None: all.

    A teacher may know only the first classes: the divergence is then of the probabilities among these. For restore the squared difference
    in units of 64 grey levels, summed over all values.
    """
    if task == "restore":
        return F.mse_loss(at_least_float32(scores) / UNIT, at_least_float32(teacher_scores) / UNIT, reduction="sum")
    known = scores[:, : teacher_scores.shape[1]]
    log_scores, log_teacher = (at_least_float32(values).log_softmax(1) for values in (known, teacher_scores))
    if task != "segment" or target is None:
        return F.kl_div(log_scores, log_teacher, reduction="sum", log_target=True)
    divergence_BHW = F.kl_div(log_scores, log_teacher, reduction="none", log_target=True).sum(1)
    return (divergence_BHW * (target != IGNORED)).sum()
