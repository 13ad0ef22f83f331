"""Two artefacts on the same held-out pictures: scores of each class, differences, and their intervals by a paired bootstrap over pictures.

Axes: N pictures (windows), K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from muntin.artifact.answers import Task
from muntin.runtime.tiles import Predictor
from muntin.tasks.learning import LEARNING
from muntin.tasks.samples import Sample
from muntin.training.evaluation import predictions

RESAMPLES, INTERVAL = 2000, 0.95
"""Bootstrap samples, and the share of them inside an interval."""


class Estimate(NamedTuple):
    """A value, and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCounts:
    """Pixels (or pictures) of each class, `(N, K)`: with the right label, in the truth, and with this label. `confusion` `(K, K)`: truth by
    label, over all pictures."""

    task: Task
    hits: NDArray[np.int64]
    truths: NDArray[np.int64]
    guesses: NDArray[np.int64]
    confusion: NDArray[np.int64]


def count_labels(session: Predictor, samples: Sequence[Sample], *, tile: int, classes: int) -> LabelCounts:
    """Count a session's labels on samples of `classes` classes, of which the session may know the first ones only."""
    task = session.signature.task
    rows, confusion = [], np.zeros((classes, classes), np.int64)
    for sample, labels in predictions(session, samples, tile=tile):
        one = LEARNING[task].confusion(sample, labels, classes)
        confusion += one
        rows.append((one.diagonal(), one.sum(1), one.sum(0)))
    hits, truths, guesses = (np.stack([row[part] for row in rows]) for part in range(3))
    return LabelCounts(task=task, hits=hits, truths=truths, guesses=guesses, confusion=confusion)


class Differences(NamedTuple):
    """Scores of the old and the new artefact, and new - old. `by_class`: of classes in the truth, by index: IoU, or recall for classify."""

    old: float
    new: Estimate
    gain: Estimate
    by_class: dict[int, tuple[float, Estimate, Estimate]]
    """(old score, new score, gain)."""


def compare_counts(old: LabelCounts, new: LabelCounts, *, seed: int = 0) -> Differences:
    """Compare two artefacts on the same samples. The score is the mean IoU over the classes in the truth, or the accuracy."""
    count = len(old.truths)
    weights_RN = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
    ones_1N = np.ones((1, count))
    present = np.flatnonzero(old.truths.any(0))
    old_1K, new_1K = _class_scores(old, ones_1N), _class_scores(new, ones_1N)
    old_RK, new_RK = _class_scores(old, weights_RN), _class_scores(new, weights_RN)
    old_1, new_1, old_R, new_R = (
        _score(counts, weights, scores, present)
        for counts, weights, scores in (
            (old, ones_1N, old_1K), (new, ones_1N, new_1K), (old, weights_RN, old_RK), (new, weights_RN, new_RK),
        )
    )  # fmt: skip
    by_class = {
        int(label): (
            float(old_1K[0, label]),
            _estimate(new_1K[0, label], new_RK[:, label]),
            _estimate(new_1K[0, label] - old_1K[0, label], new_RK[:, label] - old_RK[:, label]),
        )
        for label in present
    }
    return Differences(float(old_1[0]), _estimate(new_1[0], new_R), _estimate(new_1[0] - old_1[0], new_R - old_R), by_class)


def _class_scores(counts: LabelCounts, weights_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of each class in each resample, `(R, K)`; NaN without a pixel of it in the truth."""
    return LEARNING[counts.task].class_scores(*(weights_RN @ values for values in (counts.hits, counts.truths, counts.guesses)))


def _score(
    counts: LabelCounts, weights_RN: NDArray[np.float64], scores_RK: NDArray[np.float64], present: NDArray[np.intp]
) -> NDArray[np.float64]:
    return LEARNING[counts.task].mean_scores(scores_RK[:, present], weights_RN @ counts.hits, weights_RN @ counts.truths)


def _estimate(value: float, resamples_R: NDArray[np.float64]) -> Estimate:
    finite = resamples_R[~np.isnan(resamples_R)]
    low, high = np.quantile(finite, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]) if finite.size else (value, value)
    return Estimate(float(value), float(low), float(high))


def relabel_gain(counts: LabelCounts, classes: int) -> tuple[float, dict[int, int]]:
    """By how much the recall of some classes rises if they are renamed in the truth, and the names that fit best.

    Of all renamings of the first `classes` classes the one with the highest mean recall counts; the gain is over the classes that it
    renames. (0, {}) if it renames none. A large gain for an artefact that is known to be good means that the truth has swapped labels.
    """
    confusion = counts.confusion[:classes, :classes].astype(np.float64)
    present = np.flatnonzero(confusion.sum(1))
    recall = confusion[present] / confusion[present].sum(1, keepdims=True)
    own = recall[np.arange(len(present)), present]
    rows, columns = linear_sum_assignment(recall, maximize=True)
    moved = [(row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True) if present[row] != column]
    if not moved:
        return 0.0, {}
    gain = float(np.mean([recall[row, column] - own[row] for row, column in moved]))
    return max(0.0, gain), {int(present[row]): column for row, column in moved}
