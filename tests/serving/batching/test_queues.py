"""A group's queue: the order of its jobs, and how many fit."""

from __future__ import annotations

import math

import pytest

from muntin.serving.batching.job import Job
from muntin.serving.batching.latency_model import LatencyLine
from muntin.serving.batching.queues import GroupQueue, Peak, Rate


def queue_of(*rows: int) -> GroupQueue:
    queue = GroupQueue("g")
    for number, count in enumerate(rows, 1):
        job = Job(group="g", rows=count)
        job.standing, job.ticket = float(number), number
        queue.insert(job)
    return queue


def test_order_by_standing_then_ticket() -> None:
    queue = GroupQueue("g")
    for ticket, standing in enumerate((3.0, 1.0, 2.0, 1.0), 1):
        job = Job(group="g")
        job.standing, job.ticket = standing, ticket
        queue.insert(job)
        assert queue.jobs[queue.index(job)][2] is job
    assert [ticket for _, ticket, _ in queue.jobs] == [2, 4, 3, 1]
    assert queue.standing == (1.0, 2)
    new = Job(group="g")
    new.standing = 1.0
    assert queue.index(new) == 2


@pytest.mark.parametrize(
    ("rows", "first", "limit", "fitting"),
    [
        ((1, 1, 1, 1), 0, 3, (3, 3)),
        ((1, 1, 1, 1), 2, 3, (4, 2)),
        ((2, 2, 2), 0, 4, (2, 4)),
        ((2, 2, 2), 0, 5, (2, 4)),
        ((5, 1), 0, 2, (1, 5)),
        ((1, 5, 1), 0, 3, (1, 1)),
        ((2, 3), 0, 9, (2, 5)),
    ],
)
def test_fitting_jobs_at_least_one(rows: tuple[int, ...], first: int, limit: int, fitting: tuple[int, int]) -> None:
    assert queue_of(*rows).fitting(first, limit) == fitting


def test_seconds_for_rows_in_batches() -> None:
    queue = queue_of(1)
    queue.latency = LatencyLine(1.0, 0.5, 0.0, 1.1, 64, 100, 64)
    queue.batch_rows = 4
    assert queue.seconds_for(0) == 0
    assert queue.seconds_for(3) == pytest.approx(2.5)
    assert queue.seconds_for(9) == pytest.approx(3.0 + 3.0 + 1.5)


def test_rates_and_peaks_decay() -> None:
    rate, peak = Rate(), Peak()
    assert (rate.per_second(5.0), peak.value(5.0)) == (0.0, 0.0)
    for step in range(5000):
        rate.add(2, step / 100)
    assert rate.per_second(50.0) == pytest.approx(200, rel=0.02)
    assert rate.per_second(52.0) == pytest.approx(200 * math.exp(-2), rel=0.02)
    peak.raise_to(8, 1.0)
    peak.raise_to(5, 1.1)
    assert peak.value(1.1) == pytest.approx(8 * math.exp(-0.1))
    peak.raise_to(5, 2.0)
    assert peak.value(2.0) == 5
