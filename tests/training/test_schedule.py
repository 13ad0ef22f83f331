"""A run's limits in steps and in time, and the learning rate between its ends."""

from __future__ import annotations

import pytest

from muntin.training.config import TrainingConfig
from muntin.training.schedule import learning_rate, share_done, steps_expected


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (10, 0.0), (1, 0.5), (7, 0.9)])
def test_the_learning_rate_rises_and_falls_along_a_cosine(steps: int, warmup: float) -> None:
    config = TrainingConfig(steps=steps, warmup=warmup, learning_rate=0.5)
    rates = [learning_rate(share_done(config, step + 0.5, 0), config) for step in range(steps)]
    rising = sum((step + 0.5) / steps < warmup for step in range(steps))
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


def test_the_learning_rate_is_what_the_recipe_says_at_the_end_of_the_warm_up_and_of_the_run() -> None:
    config = TrainingConfig(warmup=0.2, learning_rate=0.5, final_learning_rate=0.1)
    found = [learning_rate(done, config) for done in (0, 0.1, 0.2, 0.6, 1)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.3, 0.1])
    with pytest.raises(ValueError, match=r"final_learning_rate 0\.5 is above learning_rate 0\.1"):
        TrainingConfig(learning_rate=0.1, final_learning_rate=0.5)


@pytest.mark.parametrize(
    ("step", "seconds", "done"),
    [(0, 0, 0), (50, 0, 0.5), (50, 59, 0.5), (50, 90, 0.75), (99, 120, 1), (100, 1, 1), (100, 500, 1)],
)
def test_the_nearer_limit_says_how_far_a_run_is(step: int, seconds: float, done: float) -> None:
    assert share_done(TrainingConfig(steps=100, minutes=2), step, seconds) == pytest.approx(done)


def test_a_stage_of_no_steps_or_no_minutes_is_done() -> None:
    config = TrainingConfig(steps=100, minutes=2)
    for nothing in ({"steps": 0, "minutes": 0.0}, {"minutes": 0.0}, {"steps": 0}):
        assert share_done(config.model_copy(update=nothing), 0, 0) == 1


def test_without_minutes_time_says_nothing() -> None:
    assert share_done(TrainingConfig(steps=100), 10, 1e9) == pytest.approx(0.1)


@pytest.mark.parametrize(("step", "seconds", "steps"), [(0, 0, 1000), (10, 6, 200), (10, 60, 20), (10, 240, 10), (10, 0.1, 1000)])
def test_the_steps_of_a_run_follow_from_its_pace(step: int, seconds: float, steps: int) -> None:
    assert steps_expected(TrainingConfig(steps=1000, minutes=2), step, seconds) == steps


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match="minutes"):
        TrainingConfig(minutes=minutes)
