from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model_helpers import one_line
from muntin.budgeting.scores import Score, drop_bound, drop_interval, least_certain_drop, samples_to_certify, score_of
from muntin.errors import MuntinError

MODEL = nn.Identity()


def score(value: Any) -> Score:
    return score_of(lambda model: value, MODEL, called="evaluate", what="trial 3", folder=Path("search"))


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5)])
def test_one_number(value: Any) -> None:
    assert score(value).value == 0.5 and score(value).samples is None


@pytest.mark.parametrize("value", [[True, False], (1.0, 0.0), np.array([1, 0]), torch.tensor([1.0, 0.0])])
def test_number_of_each_sample(value: Any) -> None:
    found = score(value)
    assert found.value == 0.5 and found.samples is not None and found.samples.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "returned nan for trial 3"),
        ([0.5, float("inf")], "returned inf"),
        (None, "trial 3"),
        ("high", "returned a str"),
        ({"accuracy": 0.5}, "returned a dict"),
        ([], "shape (0,)"),
        ([[0.5]], "shape (1, 1)"),
        ([[[3, 2]]], "an intersection above its union"),
        ([[[0, 0]]], "without any pixel"),
    ],
)
def test_no_score(value: Any, words: str) -> None:
    with pytest.raises(MuntinError) as error:
        score(value)
    assert words in one_line(error)


def areas(seed: int, right: float, pictures: int = 60) -> Score:
    """A score of binomial areas of three classes; the third one is absent."""
    draw = np.random.default_rng(seed)
    union = draw.integers(50, 200, (pictures, 3)) * [1, 1, 0]
    return score(np.stack([draw.binomial(union, right), union], axis=-1))


def test_areas_give_the_mean_iou_of_their_sums() -> None:
    found = score([[[2, 4], [0, 0]], [[4, 4], [1, 2]]])
    assert found.value == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert areas(0, 0.8).value == pytest.approx(0.8, abs=0.03)


def test_uncertainty_of_areas() -> None:
    bounds, intervals = [], []
    for seed in range(40):
        pair = areas(2 * seed, 0.8), areas(2 * seed + 1, 0.7)
        bounds.append(drop_bound(*pair, 0.9) >= 0.1)
        interval = drop_interval(*pair)
        assert interval is not None
        intervals.append(interval[0] <= 0.1 <= interval[1])
    assert sum(bounds) >= 29 and sum(intervals) >= 33
    few = areas(0, 0.8, 1), areas(1, 0.7, 1)
    assert drop_bound(*few, 0.9) == few[0].value - few[1].value


def test_class_that_one_sample_holds() -> None:
    """Its absence from the other samples does not widen the margin of a model that is equally good at it."""
    pair = [np.concatenate([areas(seed, 0.8).samples[:, :2], np.zeros((60, 1, 2))], 1) for seed in (0, 1)]  # type: ignore[index]
    margins = []
    for absent in (True, False):
        for one in pair:
            one[0, 2] = (0, 0) if absent else (80, 100)
        scores = [score(one) for one in pair]
        margins.append(drop_bound(*scores, 0.95) - (scores[0].value - scores[1].value))
    assert margins[1] < margins[0]


def hits(wrong: set[int], count: int) -> Score:
    return score([float(index not in wrong) for index in range(count)])


def test_equal_answers_to_few_images() -> None:
    for count, needed in ((22, 0.069), (150, 0.011), (600, 0.0028)):
        reference = hits({0}, count)
        bound = drop_bound(reference, reference, 0.95)
        assert bound == least_certain_drop(reference.samples, 0.95) == pytest.approx(needed, rel=0.05)
        assert samples_to_certify(bound, 0.95) == count
    assert least_certain_drop(samples(1).samples, 0.95) is None


def test_coverage_of_paired_proportions() -> None:
    """The upper bound of 95 % holds in about as many of many draws, with few images and few changed answers, too."""
    draw = np.random.default_rng(0)
    for count, lost, won in ((30, 0.05, 0.02), (150, 0.02, 0.01), (600, 0.01, 0.01)):
        held = []
        for _ in range(300):
            kind = draw.choice(3, size=count, p=[lost, won, 1 - lost - won])
            pair = score((kind != 1).astype(float)), score((kind != 0).astype(float))
            held.append(drop_bound(*pair, 0.95) >= lost - won)
        assert np.mean(held) >= 0.9


def test_function_that_raises() -> None:
    def evaluate(model: nn.Module) -> float:
        raise KeyError("the label\nof a picture")

    with pytest.raises(MuntinError) as error:
        score_of(evaluate, MODEL, called="holdout", what="the FP32 model", folder=Path("search"))
    assert one_line(error).startswith("holdout raised KeyError on the FP32 model: 'the label")


def samples(seed: int, shift: float = 0.0) -> Score:
    values = np.random.default_rng(seed).normal(0.5 - shift, 0.1, 400)
    return Score(float(values.mean()), values)


def test_bound_grows_with_confidence() -> None:
    reference, other = samples(1), samples(2, 0.01)
    bounds = [drop_bound(reference, other, confidence) for confidence in (None, 0.5, 0.9, 0.99)]
    assert bounds[0] == pytest.approx(bounds[1]) and bounds == sorted(bounds)
    assert bounds[3] - bounds[0] == pytest.approx(2.326 * np.sqrt(2) * 0.1 / 20, rel=0.1)


def test_equal_samples_have_no_spread() -> None:
    assert drop_bound(samples(1), samples(1), 0.99) == 0 and drop_interval(samples(1), samples(1)) == (0, 0)


def test_interval_covers_the_drop() -> None:
    covered = 0
    for seed in range(20):
        interval = drop_interval(samples(2 * seed), samples(2 * seed + 1, 0.02))
        assert interval is not None
        covered += interval[0] <= 0.02 <= interval[1]
    assert covered >= 16


def test_interval_of_single_numbers() -> None:
    assert drop_interval(Score(0.5), Score(0.4)) is None


@pytest.mark.parametrize("measure", [lambda a, b: drop_bound(a, b, 0.9), lambda a, b: drop_interval(a, b)])
def test_other_number_of_samples(measure: Callable[[Score, Score], object]) -> None:
    with pytest.raises(MuntinError, match=r"shape \(400,\) for the FP32 model and \(3,\)"):
        measure(samples(1), Score(0.5, np.full(3, 0.5)))
