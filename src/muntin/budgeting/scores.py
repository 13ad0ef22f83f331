"""Scores of models by the user's own functions, and the certainty of a drop between two of them.

Axes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import t as student_t
from torch import Tensor, nn

from muntin.errors import MuntinError

Evaluate = Callable[[nn.Module], Any]
"""From a callable that takes the model's own inputs to a score, or a score for each sample; higher is better."""
INTERVAL = 0.95
"""Certainty of the interval of the figures that are reported."""


@dataclass(frozen=True, eq=False)
class Score:
    """A score. `samples`: what it is computed of, None if the function returned one number.

    `(N,)`: its mean; `(N, K, 2)`: intersection and union of K classes, whose sums give the mean IoU over the classes with a union.
    """

    value: float
    samples: NDArray[np.float64] | None = None

    @staticmethod
    def of(samples: NDArray[np.float64]) -> Score:
        return Score(float(_value(samples.sum(0), len(samples))), samples)


def _value(total: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The score of the sum of `count` samples; `(..., K, 2)` for areas, any other shape for scores."""
    if total.shape[-1:] != (2,) or total.ndim < 2:
        return total / count
    right, union = total[..., 0], total[..., 1]
    ratio = np.divide(right, union, out=np.zeros_like(right), where=union > 0)
    return np.asarray(ratio.sum(-1) / np.maximum((union > 0).sum(-1), 1))


def score_of(function: Evaluate, model: nn.Module, *, called: str, what: str, folder: Path) -> Score:
    """Call a user's function. Raises `MuntinError` if it fails, or returns something else than finite numbers of one dimension.

    `called`: the function's name; `what`: the model's; `folder`: of the search.
    """
    try:
        value = function(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise MuntinError(
            f"{called} raised {type(error).__name__} on {what}: {reason or 'no message'}; it is called with a callable that takes the "
            f"model's inputs. What was measured before is kept in {folder}: a second run with this folder goes on"
        ) from error
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MuntinError(f"{called} returned a {type(value).__name__} for {what}: return a number, or one for each sample") from error
    areas = numbers.ndim == 3 and numbers.shape[2] == 2
    if (numbers.ndim > 1 and not areas) or not numbers.size:
        raise MuntinError(
            f"{called} returned numbers of shape {numbers.shape} for {what}: return a number, one for each sample, or the intersection and "
            "union of each class in each sample, (N, K, 2)"
        )
    if not np.isfinite(numbers).all():
        first = numbers.ravel()[~np.isfinite(numbers.ravel())][0]
        raise MuntinError(f"{called} returned {first} for {what}: a score must be finite, such as an accuracy from 0 to 1")
    if areas and ((numbers < 0).any() or (numbers[..., 0] > numbers[..., 1]).any() or not numbers[..., 1].any()):
        raise MuntinError(f"{called} returned areas for {what} with an intersection above its union, below 0, or without any pixel")
    return Score.of(numbers) if numbers.ndim else Score(float(numbers))


def drop_bound(reference: Score, score: Score, confidence: float | None) -> float:
    """Return the upper confidence bound of the drop from a reference; the drop itself without confidence or two samples."""
    drop = reference.value - score.value
    limits = None if confidence is None else _limits(reference, score, confidence, "evaluate")
    return drop if limits is None else max(drop, limits[1])


def drop_interval(reference: Score, score: Score) -> tuple[float, float] | None:
    """Return the interval of the drop that holds with the certainty `INTERVAL`; None without samples."""
    limits = _limits(reference, score, (1 + INTERVAL) / 2, "holdout")
    if limits is None:
        return None
    drop = reference.value - score.value
    return min(drop, limits[0]), max(drop, limits[1])


def _limits(reference: Score, score: Score, confidence: float, called: str) -> tuple[float, float] | None:
    """Return the lower and the upper confidence limit of the drop, each one-sided, over pairs of samples; None without two samples.

    Samples of 0 and 1: the interval of Agresti and Min for paired proportions (2005, Statistics in Medicine 24:729), which adds half a
    count to each cell, so that equal answers to few images do not prove equality. Other samples: Student's t. The mean IoU is
    linearised in the sums over the samples (the infinitesimal jackknife), so a class that only one sample holds stays in the mean.
    """
    if reference.samples is None and score.samples is None:
        return None
    first, second = _paired(reference, score, called)
    count = len(first)
    if count < 2:
        return None
    if _binary(first) and _binary(second):
        return _binary_limits(float((first > second).sum()), float((first < second).sum()), count, confidence)
    difference_N = _linear(first) - _linear(second)
    drop, margin = reference.value - score.value, float(student_t.ppf(confidence, count - 1)) * float(difference_N.std(ddof=1))
    margin /= math.sqrt(count)
    return drop - margin, drop + margin


def least_certain_drop(samples: NDArray[np.float64] | None, confidence: float | None) -> float | None:
    """Return the least drop that samples of 0 and 1 can certify, reached where no answer changes; None for other samples."""
    if confidence is None or samples is None or len(samples) < 2 or not _binary(samples):
        return None
    return _binary_limits(0.0, 0.0, len(samples), confidence)[1]


def samples_to_certify(drop: float, confidence: float) -> int:
    """Return the number of samples of 0 and 1 that certify a drop if no answer changes."""
    return math.ceil(float(normal.ppf(confidence)) / drop) - 2


def _binary(samples: NDArray[np.float64]) -> bool:
    return samples.ndim == 1 and bool(np.isin(samples, (0.0, 1.0)).all())


def _binary_limits(lost: float, won: float, count: int, confidence: float) -> tuple[float, float]:
    drop = (lost - won) / (count + 2)
    variance = (lost + won + 1) / (count + 2) ** 2 - drop**2 / (count + 2)
    margin = float(normal.ppf(confidence)) * math.sqrt(max(0.0, variance))
    return drop - margin, drop + margin


def _linear(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return numbers `(N,)` whose mean is the score, and whose spread is that of the score's linear terms."""
    if samples.ndim == 1:
        return samples
    total_K2 = samples.sum(0)
    present = total_K2[:, 1] > 0
    union_K = total_K2[present, 1]
    ratio_K = total_K2[present, 0] / union_K
    terms_NK = (samples[:, present, 0] - ratio_K * samples[:, present, 1]) / union_K
    return np.asarray(ratio_K.mean() + len(samples) * terms_NK.mean(1))


def _paired(reference: Score, score: Score, called: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shapes = [None if one.samples is None else one.samples.shape for one in (reference, score)]
    if reference.samples is None or score.samples is None or shapes[0] != shapes[1]:
        raise MuntinError(
            f"{called} returned samples of shape {shapes[0]} for the FP32 model and {shapes[1]} for the compressed one: return the same "
            "samples, in the same order"
        )
    return reference.samples, score.samples
