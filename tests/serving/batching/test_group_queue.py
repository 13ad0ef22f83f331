"""A group's queue: the order of its jobs, how many fit, and how large a batch pays."""

from __future__ import annotations

import math

import pytest

from muntin.serving.batching.group_queue import GroupQueue, Peak, Rate
from muntin.serving.batching.job import Job
from muntin.serving.batching.latency_model import LatencyLine


def queue_of(*rows: int, line: LatencyLine | None = None) -> GroupQueue:
    queue = GroupQueue("g")
    for number, count in enumerate(rows, 1):
        job = Job(group="g", rows=count)
        job.standing, job.ticket = float(number), number
        queue.insert(job)
    if line is not None:
        queue.latency = line
    return queue


def line(
    fixed: float, per_row: float, *, minimum: float = 0.0, largest_rows: int = 64, batch_count: int = 100, firm_rows: int = 64
) -> LatencyLine:
    return LatencyLine(fixed, per_row, minimum, 1.1, largest_rows, batch_count, firm_rows)


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


def test_take_from_anywhere() -> None:
    queue = queue_of(1, 2, 3, 4)
    jobs = [job for _, _, job in queue.jobs]
    assert queue.take([1, 3]) == (jobs[1], jobs[3])
    assert (queue.rows, [job for _, _, job in queue.jobs]) == (4, [jobs[0], jobs[2]])
    assert queue.take([0, 1]) == (jobs[0], jobs[2])
    assert (queue.rows, queue.jobs) == (0, [])


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
    queue = queue_of(1, line=line(1.0, 0.5))
    queue.batch_rows = 4
    assert queue.seconds_for(0) == 0
    assert queue.seconds_for(3) == pytest.approx(2.5)
    assert queue.seconds_for(9) == pytest.approx(3.0 + 3.0 + 1.5)


def test_rows_that_sustain_arrivals() -> None:
    queue = queue_of(1, line=line(1.0, 0.1))
    assert queue.sustaining_rows(1.0, 0.0, 32) == 1
    queue.arrivals.add(4, 0.0)  # 4 rows a second: n / (1 + n / 10) * 0.8 >= 4 from n = 10
    assert queue.sustaining_rows(1.0, 0.0, 32) == 10
    assert queue.sustaining_rows(1.0, 0.0, 8) == 8
    assert queue.sustaining_rows(2.0, 0.0, 32) == 4
    assert queue.sustaining_rows(0.0, 0.0, 32) == 32
    queue.arrivals.add(10, 0.0)
    assert queue.sustaining_rows(1.0, 0.0, 32) == 32


def test_worthwhile_rows() -> None:
    assert queue_of(1, line=line(2.0, 1.0)).worthwhile_rows(3, 32, 64) == 32  # the fixed part outweighs a row
    assert queue_of(1, line=line(0.5, 1.0)).worthwhile_rows(3, 32, 64) == 3  # a gain of a third: as many as the arrivals call for
    assert queue_of(1, line=line(0.01, 1.0)).worthwhile_rows(3, 32, 64) == 1  # nothing to gain
    assert queue_of(1, line=line(0.01, 1.0, firm_rows=0)).worthwhile_rows(1, 32, 64) == 1
    assert queue_of(1, line=line(0.0, 1.0, minimum=1.0)).worthwhile_rows(3, 32, 64) == 32  # one size measured: the gain is unknown


def test_worthwhile_rows_of_sizes_not_measured() -> None:
    flat = queue_of(1, line=line(0.0, 1.0, firm_rows=0))
    assert flat.worthwhile_rows(16, 16, 64) == 16  # only single rows were measured
    flat.latency = line(0.0, 1.0, firm_rows=4)
    assert flat.worthwhile_rows(16, 16, 64) == 16  # four rows say little of sixteen
    assert flat.worthwhile_rows(8, 16, 64) == 1
    assert flat.worthwhile_rows(16, 16, 8) == 1  # larger ones would not keep the objective
    flat.latency = line(0.0, 1.0, firm_rows=8)
    assert flat.worthwhile_rows(16, 16, 64) == 1


def test_growth_in_steps() -> None:
    assert queue_of(1).limited_growth(32) == 1
    assert queue_of(1, line=line(1.0, 0.1, largest_rows=4, batch_count=1)).limited_growth(32) == 1
    assert queue_of(1, line=line(1.0, 0.1, largest_rows=4, batch_count=2)).limited_growth(32) == 8
    assert queue_of(1, line=line(1.0, 0.1, largest_rows=4)).limited_growth(5) == 5


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
