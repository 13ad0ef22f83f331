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
from scipy.stats import t as student_t
from torch import Tensor, nn

from muntin.errors import MuntinError

Evaluate = Callable[[nn.Module], Any]
"""From a callable that takes the model's own inputs to a score, or a score for each sample; higher is better."""
RESAMPLES = 2000
"""Bootstrap samples of a confidence interval."""
INTERVAL = 0.95
"""Share of the bootstrap samples inside an interval."""


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
    """The drop from a reference that is not exceeded with this certainty, by Student's t and the jackknife over the pairs of samples.

    The drop itself without `confidence`, or without at least two samples.
    """
    drop = reference.value - score.value
    if confidence is None or reference.samples is None or len(reference.samples) < 2:
        return drop
    first, second = _paired(reference, score, "evaluate")
    count = len(first)
    left_out_N = _value(first.sum(0) - first, count - 1) - _value(second.sum(0) - second, count - 1)
    error = math.sqrt((count - 1) * float(left_out_N.var()))
    return drop + float(student_t.ppf(confidence, count - 1)) * error


def drop_interval(reference: Score, score: Score, *, seed: int) -> tuple[float, float] | None:
    """The interval in which `INTERVAL` of the drops of bootstrap samples lie, of pairs; None without a score for each sample."""
    if reference.samples is None or score.samples is None:
        return None
    first, second = _paired(reference, score, "holdout")
    generator = np.random.default_rng(seed)
    count = len(first)
    drops = []
    for _ in range(RESAMPLES):
        rows = generator.integers(count, size=count)
        drops.append(float(_value(first[rows].sum(0), count) - _value(second[rows].sum(0), count)))
    low, high = (float(np.quantile(drops, share)) for share in ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
    return low, high


def _paired(reference: Score, score: Score, called: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shapes = [None if one.samples is None else one.samples.shape for one in (reference, score)]
    if reference.samples is None or score.samples is None or shapes[0] != shapes[1]:
        raise MuntinError(
            f"{called} returned samples of shape {shapes[0]} for the FP32 model and {shapes[1]} for the compressed one: return the same "
            "samples, in the same order"
        )
    return reference.samples, score.samples
