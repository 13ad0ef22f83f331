"""Losses: cross-entropy, and beside it a soft IoU that gives a rare class the same say as a common one.

Axes: B images, K classes, H W map.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

IGNORED = 255


def soft_iou_loss(scores_BKHW: Tensor, target_BHW: Tensor) -> Tensor:
    """1 - the mean over the classes present of the soft intersection over union, a scalar in [0, 1].

    Each class that occurs in the batch counts once, however few its pixels; ignored pixels (255) count nowhere. Source: Rahman & Wang,
    "Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation" (ISVC 2016), equation 3; the deviation: sums run
    over the batch, and 1 is added to both sides so that a class of a few pixels has no wild gradient.
    """
    classes = scores_BKHW.shape[1]
    counted_B1HW = (target_BHW != IGNORED).unsqueeze(1)
    truth_BKHW = F.one_hot(target_BHW.masked_fill(target_BHW == IGNORED, 0), classes).permute(0, 3, 1, 2) * counted_B1HW
    probability_BKHW = scores_BKHW.softmax(1) * counted_B1HW
    both_K = (probability_BKHW * truth_BKHW).sum((0, 2, 3))
    truth_K = truth_BKHW.sum((0, 2, 3))
    either_K = probability_BKHW.sum((0, 2, 3)) + truth_K - both_K
    present_K = truth_K > 0
    loss_K = 1 - (both_K + 1) / (either_K + 1)
    return (loss_K * present_K).sum() / present_K.sum().clamp_min(1)


def segment_loss(scores_BKHW: Tensor, target_BHW: Tensor, overlap: float) -> Tensor:
    """Cross-entropy over the pixels that count, plus `overlap` times the soft IoU loss. Zero where every pixel is ignored."""
    counted = (target_BHW != IGNORED).sum().clamp_min(1)
    loss = F.cross_entropy(scores_BKHW, target_BHW, ignore_index=IGNORED, reduction="sum") / counted
    return loss + overlap * soft_iou_loss(scores_BKHW, target_BHW) if overlap else loss


def task_loss(task: str, scores: Tensor, target: Tensor, *, overlap: float) -> Tensor:
    """The loss of a task, a scalar in FP32 whatever the scores came in."""
    scores = scores.float()
    if task == "segment":
        return segment_loss(scores, target, overlap)
    return F.cross_entropy(scores, target)


def distillation_loss(task: str, scores: Tensor, wanted: Tensor) -> Tensor:
    """Distance to a teacher's scores, a scalar in FP32: for classes the divergence of its probabilities from ours, a mean over pixels
    or images; for restore the mean squared difference in units of 64 grey levels.

    Source: Hinton et al., 1503.02531, section 2, at temperature 1.
    """
    scores, wanted = scores.float(), wanted.float()
    if task == "restore":
        return F.mse_loss(scores / 64, wanted / 64)
    divergence = F.kl_div(scores.log_softmax(1), wanted.log_softmax(1), reduction="sum", log_target=True)
    return divergence * scores.shape[1] / scores.numel()
