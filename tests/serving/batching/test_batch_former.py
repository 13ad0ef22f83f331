"""Batches: which jobs share one, and how long a worker waits for more."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.serving.batching.batch_former import sustaining_rows, worthwhile_rows
from muntin.serving.batching.latency_model import LatencyLine


def line(fixed: float, per_row: float, *, minimum: float = 0.0, firm_rows: int = 64) -> LatencyLine:
    return LatencyLine(fixed, per_row, minimum, 1.1, 64, 100, firm_rows)


@pytest.mark.parametrize(
    ("rate", "engines", "max_rows", "rows"),
    [
        (0.0, 1.0, 32, 1),
        (4.0, 1.0, 32, 10),  # n / (1 + n / 10) * 0.8 >= 4 from n = 10
        (4.0, 1.0, 8, 8),
        (4.0, 2.0, 32, 4),
        (4.0, 0.0, 32, 32),
        (14.0, 1.0, 32, 32),
    ],
)
def test_rows_that_sustain_arrivals(rate: float, engines: float, max_rows: int, rows: int) -> None:
    assert sustaining_rows(line(1.0, 0.1), rate, engines, max_rows) == rows


@pytest.mark.parametrize(
    ("latency", "sustaining", "reach", "rows"),
    [
        (line(2.0, 1.0), 3, 64, 16),  # the fixed part outweighs a row
        (line(0.5, 1.0), 3, 64, 3),  # a gain of a third: as many as the arrivals call for
        (line(0.01, 1.0), 3, 64, 1),  # nothing to gain
        (line(0.01, 1.0, firm_rows=0), 1, 64, 1),
        (line(0.0, 1.0, minimum=1.0), 3, 64, 16),  # one size measured: the gain is unknown
        (line(0.0, 1.0, firm_rows=0), 16, 64, 16),  # only single rows were measured
        (line(0.0, 1.0, firm_rows=4), 16, 64, 16),  # four rows say little of sixteen
        (line(0.0, 1.0, firm_rows=4), 8, 64, 1),
        (line(0.0, 1.0, firm_rows=4), 16, 8, 1),  # larger ones would not keep the objective
        (line(0.0, 1.0, firm_rows=8), 16, 64, 1),
    ],
)
def test_worthwhile_rows(latency: LatencyLine, sustaining: int, reach: int, rows: int) -> None:
    assert worthwhile_rows(latency, sustaining, 16, reach) == rows


def test_full_batch_where_sharing_gains(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP}, objective=1.0)
    batching.occupy(batcher, 0.0)
    assert batching.after_a_pause(batcher, 0.011, *(batching.job_of() for _ in range(40))).rows == 32


def test_jobs_that_share_no_batch(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP}, objective=1.0)
    batching.admitted(batcher, 0.0, batching.job_of(alone=True))
    batching.batch_of(batcher, 0.0)
    assert batching.after_a_pause(batcher, 0.011, *(batching.job_of(alone=True) for _ in range(40))).rows == 1


def test_single_rows_where_sharing_gains_nothing(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=1.0)
    batching.occupy(batcher, 0.0)
    assert batching.after_a_pause(batcher, 0.011, *(batching.job_of() for _ in range(4))).rows == 1


def test_batch_keeps_its_earliest_due_time(batching: Any) -> None:
    batcher = batching.batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.001, batching.job_of(deadline=0.0275))
    batch = batching.after_a_pause(batcher, 0.011, *(batching.job_of() for _ in range(20)))
    assert batch.jobs[0].deadline == 0.0275
    assert batch.rows == 6  # (0.0165 / 1.03 - 0.01) / 0.001
    assert all(job.due > 0.1 for job in batch.jobs[1:])


def test_batch_leaves_time_for_other_groups(batching: Any) -> None:
    batcher = batching.batcher_of({"a": (0.010, 0.001), "b": batching.LINEAR}, objective=0.06)
    batching.occupy(batcher, 0.0, "a")
    batching.admitted(batcher, 0.001, *(batching.job_of("a") for _ in range(8)))
    urgent = batching.job_of("b")
    batching.admitted(batcher, 0.002, urgent)
    more = [batching.job_of("a") for _ in range(24)]
    for job in more:
        batcher.submit(job, 0.003)
    batcher.done(batcher._queue.running[0].batch, 0.011, 0.011)
    batch = batching.batch_of(batcher, 0.011)
    assert 20 < batch.rows < 32  # 28 rows: 0.011 + 0.038 * 1.03 + 0.0103 is all that 0.062 admits
    end = 0.011 + 0.010 + 0.001 * batch.rows
    batcher.done(batch, end, end - 0.011)
    assert batching.jobs_of(batcher, end) == [urgent]
    assert end + 0.0103 <= urgent.due


def test_batch_skips_less_urgent_job(batching: Any) -> None:
    batcher = batching.batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    batching.occupy(batcher, 0.0)
    lesser = batching.job_of(priority=1, deadline=0.0235)
    batching.admitted(batcher, 0.001, lesser)
    batching.admitted(batcher, 0.002, *(batching.job_of() for _ in range(8)))
    batcher.done(batcher._queue.running[0].batch, 0.011, None)
    batch = batching.batch_of(batcher, 0.011)
    assert batch.rows == 8
    assert lesser not in batch.jobs
    small = batching.batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    batching.occupy(small, 0.0)
    fitting = batching.job_of(priority=1, deadline=0.045)
    batching.admitted(small, 0.001, fitting)
    assert fitting in batching.after_a_pause(small, 0.011, *(batching.job_of() for _ in range(8))).jobs


def test_wait_for_more_rows_until_latest_safe_time(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP}, objective=0.1)
    now = batching.busy_stream(batcher, rate=1500, until=1.0)
    batching.admitted(batcher, now, batching.job_of())
    step = batcher.poll(now)
    assert step.batch is None
    assert step.wake is not None
    assert now < step.wake <= now + 0.0101
    batching.admitted(batcher, now + 0.0005, *(batching.job_of() for _ in range(31)))
    assert batching.batch_of(batcher, now + 0.0005).rows == 32

    hurried = batching.batcher_of({"g": batching.STEEP}, objective=0.1)
    now = batching.busy_stream(hurried, rate=1500, until=1.0)
    batching.admitted(hurried, now, batching.job_of(deadline=now + 0.0115))
    step = hurried.poll(now)
    assert step.wake is not None
    assert step.wake == pytest.approx(now + 0.0115 - 0.0101 * 1.03, abs=3e-4)
    assert hurried.poll(step.wake + 1e-6).batch is not None


def test_wait_ends_when_no_rows_arrive(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP}, objective=0.1)
    now = batching.busy_stream(batcher, rate=1500, until=1.0)
    batching.admitted(batcher, now, batching.job_of())
    wake = batcher.poll(now).wake
    assert wake is not None
    assert wake == pytest.approx(now + 2 / batcher._queue.groups["g"].arrivals.per_second(now))  # two mean gaps
    assert batching.batch_of(batcher, wake).rows == 1


def test_no_wait_beside_another_group(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP, "h": batching.STEEP}, objective=0.1)
    now = batching.busy_stream(batcher, rate=1500, until=1.0)
    batching.admitted(batcher, now, batching.job_of("g"), batching.job_of("h"))
    assert batching.batch_of(batcher, now).rows == 1


def test_no_wait_while_draining(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.STEEP}, objective=0.1)
    now = batching.busy_stream(batcher, rate=1500, until=1.0)
    batching.admitted(batcher, now, batching.job_of())
    batcher.drain()
    assert batcher.poll(now).batch is not None
