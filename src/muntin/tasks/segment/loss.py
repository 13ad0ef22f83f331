"""The loss of masks: sums over pixels with a gradient written by hand.

Axes: B images, K classes, N pixels, S sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from muntin.images import IGNORED
from muntin.tasks.base_learning import at_least_float32


class SegmentSums(torch.autograd.Function):
    """Sums over pixels of scores `(B, K, N)` and classes `(B, N)`: the cross-entropy, and with `overlap` the probability of the true class
    and all probability of each class; float64 `(1,)` or `(1 + 2K,)`. `gamma`, `weights_K`: of the cross-entropy, as of `LossTerms`.

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
    both_K = sums_by_class(true_BN, target_BN, scores_BKN.shape[1])
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


def sums_by_class(values_BN: Tensor, target_BN: Tensor, classes: int) -> Tensor:
    """Sums of values by their pixels' classes, float64 `(K,)`: scatter_add sums one by one."""
    zeros_BK = torch.zeros(len(values_BN), classes, dtype=torch.float64, device=values_BN.device)
    return zeros_BK.scatter_add(1, target_BN, values_BN.double()).sum(0)
