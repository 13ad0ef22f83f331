"""Scores of models by the user's own functions, and the certainty of a drop between two of them.

Axes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
    """A score; `samples` `(N,)` are those that it is the mean of, None if the function returned one number."""

    value: float
    samples: NDArray[np.float64] | None = None


def score_of(function: Evaluate, model: nn.Module, *, called: str, what: str) -> Score:
    """Call a user's function. Raises `MuntinError`, with `called`, the function's name, and `what`, the model's, if it fails.

    It also fails if it returns something else than a finite number or finite numbers of one dimension.
    """
    try:
        value = function(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise MuntinError(
            f"{called} raised {type(error).__name__} on {what}: {reason or 'no message'}; it is called with a callable that takes the "
            "model's inputs. What was measured before is kept: a second run with the same folder goes on"
        ) from error
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MuntinError(f"{called} returned a {type(value).__name__} for {what}: return a number, or one for each sample") from error
    if numbers.ndim > 1 or not numbers.size:
        raise MuntinError(f"{called} returned numbers of shape {numbers.shape} for {what}: return a number, or one for each sample")
    if not np.isfinite(numbers).all():
        first = numbers.ravel()[~np.isfinite(numbers.ravel())][0]
        raise MuntinError(f"{called} returned {first} for {what}: a score must be finite, such as an accuracy from 0 to 1")
    return Score(float(numbers.mean()), numbers if numbers.ndim else None)


def drop_bound(reference: Score, score: Score, confidence: float | None) -> float:
    """The drop from a reference that is not exceeded with this certainty: mean + z · standard error of the paired differences."""
    drop = reference.value - score.value
    if confidence is None:
        return drop
    difference_N = _paired(reference, score, "evaluate", "confidence needs")
    spread = float(difference_N.std(ddof=1)) if len(difference_N) > 1 else 0.0
    return drop + NormalDist().inv_cdf(confidence) * spread / math.sqrt(len(difference_N))


def drop_interval(reference: Score, score: Score, *, seed: int) -> tuple[float, float] | None:
    """The interval in which `INTERVAL` of the drops of bootstrap samples lie, of pairs; None without a score for each sample."""
    if reference.samples is None or score.samples is None:
        return None
    difference_N = _paired(reference, score, "holdout", "an interval needs")
    generator = np.random.default_rng(seed)
    count = len(difference_N)
    means = [float(difference_N[generator.integers(count, size=count)].mean()) for _ in range(RESAMPLES)]
    low, high = (float(np.quantile(means, share)) for share in ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
    return low, high


def _paired(reference: Score, score: Score, called: str, why: str) -> NDArray[np.float64]:
    counts = [0 if one.samples is None else len(one.samples) for one in (reference, score)]
    if reference.samples is None or score.samples is None or counts[0] != counts[1]:
        raise MuntinError(
            f"{called} returned {counts[0] or 'no'} scores of samples for the FP32 model and {counts[1] or 'no'} for the compressed one: "
            f"{why} one for each sample, in the same order"
        )
    return reference.samples - score.samples
