"""What an answer takes beyond the engine."""

from __future__ import annotations

import random

import pytest

from muntin.serving.overhead import Overhead


def test_before_an_answer_and_below_the_least_it_is_the_least() -> None:
    overhead = Overhead(0.001)
    assert overhead.seconds == 0.001
    overhead.add(0.0004)
    assert overhead.seconds == 0.001


def test_it_is_what_nearly_all_answers_kept() -> None:
    overhead, chance = Overhead(0.0), random.Random(0)  # noqa: S311 - no secret
    for _ in range(1000):
        overhead.add(chance.random())
    assert 0.95 < overhead.seconds < 1.0


@pytest.mark.parametrize(("answers", "hiccups", "counts"), [(10, 1, True), (100, 2, False), (100, 3, True), (128, 2, False)])
def test_two_hiccups_among_many_answers_do_not_count(answers: int, hiccups: int, counts: bool) -> None:
    overhead = Overhead(0.0)
    for number in range(answers):
        overhead.add(0.5 if number < hiccups else 0.002)
    assert overhead.seconds == (0.5 if counts else 0.002)


def test_what_was_long_ago_does_not_count() -> None:
    overhead = Overhead(0.0)
    for seconds in [0.5] * 200 + [0.002] * 128:
        overhead.add(seconds)
    assert overhead.seconds == 0.002
