"""Losses: cross-entropy, soft IoU (a rare class counts as much as a common one), and the distance to a teacher.

Axes: B images, K classes, H W map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.images import IGNORED


class _SegmentLoss(torch.autograd.Function):
    """`ce` times the cross-entropy plus `overlap` times the soft IoU loss; scores `(B, K, N)` of N pixels, their classes `(B, N)`.

    The explicit gradient passes ten times over the full-size scores; autograd would pass about thirty times.
    """

    @staticmethod
    def forward(ctx: Any, scores_BKN: Tensor, target_BN: Tensor, ce: float, overlap: float) -> Tensor:
        counted_BN = target_BN != IGNORED
        target_BN = target_BN.masked_fill(~counted_BN, 0)
        log_BKN = scores_BKN.log_softmax(1)
        weight_BN = counted_BN.to(log_BKN.dtype)
        count = weight_BN.sum().clamp_min(1)
        entropy = -(_of_class(log_BKN, target_BN) * weight_BN).sum() / count
        p_BKN = log_BKN.exp_()
        p_BKN *= weight_BN.unsqueeze(1)  # 0 where ignored
        true_BN = _of_class(p_BKN, target_BN)
        zeros_BK = torch.zeros(scores_BKN.shape[:2], dtype=torch.float64, device=scores_BKN.device)  # scatter_add sums one by one
        both_K, truth_K = (zeros_BK.scatter_add(1, target_BN, values.double()).sum(0).to(p_BKN.dtype) for values in (true_BN, weight_BN))
        either_K = p_BKN.sum((0, 2)) + truth_K - both_K
        present_K = (truth_K > 0).to(truth_K.dtype)
        present_K /= present_K.sum().clamp_min(1)
        ctx.save_for_backward(p_BKN, true_BN, target_BN, weight_BN, both_K, either_K, present_K, count)
        ctx.factors = ce, overlap
        return ce * entropy + overlap * ((1 - (both_K + 1) / (either_K + 1)) * present_K).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p_BKN, true_BN, target_BN, weight_BN, both_K, either_K, present_K, count = ctx.saved_tensors
        ce, overlap = (factor * grad for factor in ctx.factors)
        any_K = overlap * present_K * (both_K + 1) / (either_K + 1).square()  # derivative by a pixel's p, for any true class
        true_K = any_K + overlap * present_K / (either_K + 1)  # minus this for the true class
        pulled_BN = true_K[target_BN] * true_BN + weight_BN * (ce / count)
        grad_BKN = p_BKN * any_K[:, None]
        grad_BKN.addcmul_(p_BKN, (pulled_BN - grad_BKN.sum(1)).unsqueeze(1))
        grad_BKN.scatter_add_(1, target_BN.unsqueeze(1), -pulled_BN.unsqueeze(1))
        return grad_BKN, None, None, None


def _of_class(values_BKN: Tensor, target_BN: Tensor) -> Tensor:
    return values_BKN.gather(1, target_BN.unsqueeze(1)).squeeze(1)


def segment_loss(scores_BKHW: Tensor, target_BHW: Tensor, overlap: float, *, entropy: float = 1.0) -> Tensor:
    """`entropy` times the cross-entropy over the pixels that are not ignored, plus `overlap` times the soft IoU loss.

    The soft IoU loss is 1 - the mean over the present classes of the soft intersection over union, in [0, 1]: each class in the batch
    counts once. Zero if all pixels are ignored; no second derivative. Source: Rahman & Wang, "Optimizing Intersection-Over-Union in Deep
    Neural Networks for Image Segmentation" (ISVC 2016), equation 3. Deviation: sums are over the batch, and 1 is added to numerator and
    denominator, which bounds the gradient of a class of few pixels.
    """
    scores_BKN, target_BN = scores_BKHW.contiguous().flatten(2), target_BHW.flatten(1)
    loss: Tensor = _SegmentLoss.apply(scores_BKN, target_BN, entropy, overlap)  # type: ignore[no-untyped-call]
    return loss


def task_loss(task: str, scores: Tensor, target: Tensor, *, overlap: float) -> Tensor:
    """The loss of a task, a scalar in FP32 for scores of any type."""
    scores = scores.float()
    if task == "segment":
        return segment_loss(scores, target, overlap)
    return F.cross_entropy(scores, target)


def distillation_loss(task: str, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
    """Distance to a teacher's scores, a scalar in FP32: the KL divergence from its probabilities, mean over pixels or images; for restore
    the mean squared difference in units of 64 grey levels. `target`: labels, whose ignored pixels (255) do not count.

    Source: Hinton et al., 1503.02531, section 2, at temperature 1.
    """
    scores, teacher_scores = scores.float(), teacher_scores.float()
    if task == "restore":
        return F.mse_loss(scores / 64, teacher_scores / 64)
    if task == "segment" and target is not None:
        counted_BHW = target != IGNORED
        divergence_BHW = F.kl_div(scores.log_softmax(1), teacher_scores.log_softmax(1), reduction="none", log_target=True).sum(1)
        return (divergence_BHW * counted_BHW).sum() / counted_BHW.sum().clamp_min(1)
    divergence = F.kl_div(scores.log_softmax(1), teacher_scores.log_softmax(1), reduction="sum", log_target=True)
    return divergence * scores.shape[1] / scores.numel()
