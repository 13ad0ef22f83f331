"""Counts, intervals and renamings."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.updating.comparison import LabelCounts, compare_counts, relabel_gain


def counts(truth_NP: NDArray[np.int64], guess_NP: NDArray[np.int64], classes: int, task: str = "segment") -> LabelCounts:
    """Counts of pictures with P pixels each."""
    pairs = zip(truth_NP, guess_NP, strict=True)
    confusions = [np.bincount(t * classes + g, minlength=classes**2).reshape(classes, classes) for t, g in pairs]
    rows = [(one.diagonal(), one.sum(1), one.sum(0)) for one in confusions]
    hits, truths, guesses = (np.stack([row[part] for row in rows]) for part in range(3))
    return LabelCounts(task=task, hits=hits, truths=truths, guesses=guesses, confusion=sum(confusions))


def noisy(truth_NP: NDArray[np.int64], share: float, seed: int, classes: int = 3) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    return np.where(generator.random(truth_NP.shape) < share, generator.integers(0, classes, truth_NP.shape), truth_NP)


TRUTH = np.random.default_rng(0).integers(0, 3, (40, 100))


def test_scores_of_classes() -> None:
    truth, guess = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])
    result = compare_counts(counts(truth, truth, 3), counts(truth, guess, 3))
    assert result.old == 1 and set(result.by_class) == {0, 1}
    assert result.by_class[0][1].value == 0.5 and result.by_class[1][1].value == pytest.approx(2 / 3)
    assert result.new.value == pytest.approx((0.5 + 2 / 3) / 2)
    accuracy = compare_counts(counts(truth, truth, 3, "classify"), counts(truth, guess, 3, "classify"))
    assert accuracy.new.value == 0.75 and accuracy.by_class[1][1].value == 1


def test_interval_of_a_gain_is_paired() -> None:
    old, new = counts(TRUTH, noisy(TRUTH, 0.4, 1), 3), counts(TRUTH, noisy(TRUTH, 0.2, 2), 3)
    gain = compare_counts(old, new).gain
    assert 0 < gain.low < gain.value < gain.high
    same = compare_counts(old, old).gain
    assert same == (0, 0, 0)


def test_interval_holds_the_difference_of_many_pictures() -> None:
    held = 0
    for seed in range(20):
        truth = np.random.default_rng(seed).integers(0, 3, (60, 50))
        old, new = counts(truth, noisy(truth, 0.3, seed + 100), 3), counts(truth, noisy(truth, 0.2, seed + 200), 3)
        gain = compare_counts(old, new).gain
        wide = np.random.default_rng(999).integers(0, 3, (4000, 50))
        true = compare_counts_value(wide)
        held += gain.low <= true <= gain.high
    assert held >= 16


def compare_counts_value(truth: NDArray[np.int64]) -> float:
    def iou(guess: NDArray[np.int64]) -> float:
        return float(np.mean([((truth == k) & (guess == k)).sum() / ((truth == k) | (guess == k)).sum() for k in range(3)]))

    return iou(noisy(truth, 0.2, 5)) - iou(noisy(truth, 0.3, 6))


def test_swapped_labels() -> None:
    swapped = np.array([0, 2, 1])[TRUTH]
    gain, renamed = relabel_gain(counts(swapped, noisy(TRUTH, 0.2, 1), 3), 3)
    assert gain > 0.7 and renamed == {1: 2, 2: 1}
    gain, renamed = relabel_gain(counts(TRUTH, noisy(TRUTH, 0.5, 1), 3), 3)
    assert (gain, renamed) == (0.0, {})
