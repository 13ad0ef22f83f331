"""The schedule of a run: share done, expected steps, learning rate."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.training.config import TrainingConfig


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (10, 0.0), (1, 0.5), (7, 0.9)])
def test_learning_rate_shape(steps: int, warmup: float) -> None:
    config = TrainingConfig(steps=steps, warmup=warmup, learning_rate=0.5)
    rates = [config.rate_at(config.share_done(step + 0.5, 0)) for step in range(steps)]
    rising = sum((step + 0.5) / steps < warmup for step in range(steps))
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


def test_learning_rate_values() -> None:
    config = TrainingConfig(warmup=0.2, learning_rate=0.5, final_learning_rate=0.1)
    assert [config.rate_at(done) for done in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.25, 0.5, 0.3, 0.1])
    with pytest.raises(ValueError, match=r"final_learning_rate 0\.5 is above learning_rate 0\.1"):
        TrainingConfig(learning_rate=0.1, final_learning_rate=0.5)


@pytest.mark.parametrize(
    ("step", "seconds", "done"),
    [(0, 0, 0), (50, 0, 0.5), (50, 59, 0.5), (50, 90, 0.75), (99, 120, 1), (100, 1, 1), (100, 500, 1)],
)
def test_share_done_by_the_nearer_limit(step: int, seconds: float, done: float) -> None:
    assert TrainingConfig(steps=100, minutes=2).share_done(step, seconds) == pytest.approx(done)


def test_share_done_without_a_limit() -> None:
    config = TrainingConfig(steps=100, minutes=2)
    for nothing in ({"steps": 0, "minutes": 0.0}, {"minutes": 0.0}, {"steps": 0}):
        assert config.model_copy(update=nothing).share_done(0, 0) == 1
    assert TrainingConfig(steps=100).share_done(10, 1e9) == pytest.approx(0.1)


@pytest.mark.parametrize(("step", "seconds", "steps"), [(0, 0, 1000), (10, 6, 200), (10, 60, 20), (10, 240, 10), (10, 0.1, 1000)])
def test_expected_steps(step: int, seconds: float, steps: int) -> None:
    assert TrainingConfig(steps=1000, minutes=2).steps_expected(step, seconds) == steps


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_out_of_range(minutes: float) -> None:
    with pytest.raises(ValueError, match="minutes"):
        TrainingConfig(minutes=minutes)


@pytest.mark.parametrize("other", [{"compile": True}, {"checkpointing": "selective"}])
def test_operator_memory_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"operator_memory with .* drop one"):
        TrainingConfig(operator_memory=8 << 20, **other)
