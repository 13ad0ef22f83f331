"""Time of an answer beyond the engine."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from muntin.serving.batching.overhead import Overhead


def overhead_of(batches: Iterable[float], **bounds: float) -> Overhead:
    """Batches of one answer each; the last one is not counted yet."""
    overhead = Overhead(**({"minimum": 0.0, "maximum": 1.0} | bounds))
    for number, seconds in enumerate([*batches, 0.0]):
        overhead.add(number, seconds)
    return overhead


def test_overhead_is_at_least_the_minimum() -> None:
    assert overhead_of([], minimum=0.001).seconds == 0.001
    assert overhead_of([0.0004] * 10, minimum=0.001).seconds == 0.001


def test_overhead_of_nearly_all_answers() -> None:
    chance = random.Random(0)  # noqa: S311 - no secret
    batches = [chance.random() for _ in range(1000)]
    assert 0.95 < overhead_of(batches).seconds < 1.0
    assert overhead_of(batches, maximum=0.3).seconds == 0.3


@pytest.mark.parametrize(("since", "counts"), [(0, True), (10, True), (127, True), (128, False)])
def test_hiccup_counts_for_128_batches(since: int, counts: bool) -> None:
    assert overhead_of([0.002] * 300 + [0.5] + [0.002] * since).seconds == (0.5 if counts else 0.002)


def test_batch_counts_with_its_slowest_answer() -> None:
    overhead = Overhead(0.0, 1.0)
    for batch in range(200):
        for seconds in (0.001, 0.004, 0.002):
            overhead.add(batch, 0.5 if batch == 50 else seconds)
    assert overhead.seconds == 0.004
    for seconds in (0.001, 0.006, 0.002):
        overhead.add("the last", seconds)
    overhead.add("another one", 0.0)
    assert overhead.seconds == 0.006
