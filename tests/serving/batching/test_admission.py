"""Promises: which jobs are admitted because they will be in time."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.serving.batching.batcher import PRIORITIES


def test_refuse_behind_too_long_a_backlog(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    batching.occupy(batcher, 0.0)  # until 0.01
    batching.admitted(batcher, 0.0, *(batching.job_of() for _ in range(4)))  # until 0.05
    refusal = batching.refused(batcher, batching.job_of(), 0.0, "late")
    assert "4 requests wait" in refusal.message
    assert refusal.retry_after is not None
    assert 0.004 < refusal.retry_after < 0.007
    batching.admitted(batcher, refusal.retry_after + 0.0005, batching.job_of())


def test_promise_for_many_rows(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.035)
    batching.admitted(batcher, 0.0, batching.job_of())
    batching.refused(batcher, batching.job_of(rows=3), 0.0, "late")  # three rows take 30 ms


def test_promises_include_time_beyond_the_engine(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055, margin=0.001)
    jobs = [batching.job_of() for _ in range(20)]
    assert sum(batcher.submit(job, 0.0) is None for job in jobs) == 5
    batcher.discard()
    for batch in range(128):
        batcher.delivered(batch, 0.015)
    assert batcher.margin == 0.015
    assert sum(batcher.submit(batching.job_of(), 0.0) is None for _ in range(20)) == 3
    for batch in range(128):
        batcher.delivered(batch + 128, 10.0)
    assert batcher.margin == pytest.approx(0.3 * 0.055)  # one very slow client does not close the server


def test_without_objective_and_deadline(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR})
    batching.admitted(batcher, 0.0, *(batching.job_of() for _ in range(1000)))
    assert batcher.poll(3600.0).dropped == ()


def test_deadline_before_the_objective(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    batching.occupy(batcher, 0.0)
    batching.refused(batcher, batching.job_of(deadline=0.015), 0.0, "late")
    batching.admitted(batcher, 0.0, batching.job_of(deadline=0.025), *(batching.job_of(deadline=100.0) for _ in range(3)))
    assert batching.refused(batcher, batching.job_of(deadline=0.0), 0.0, "late").retry_after is None
    batching.refused(batcher, batching.job_of(deadline=100.0), 0.0, "late")


def test_objective_counts_from_arrival(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    running = batching.occupy(batcher, 0.0)
    early, late = batching.job_of(arrived=-0.02), batching.job_of(arrived=5.0)
    batching.admitted(batcher, 0.0, early, late)
    assert early.due == pytest.approx(0.035)
    assert late.due == pytest.approx(0.055)  # no job arrives after it is submitted
    batcher.done(running, 0.01, 0.01)
    assert batching.jobs_of(batcher, 0.01) == [early]


def test_refuse_job_read_after_its_objective(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, batching.job_of())
    refusal = batching.refused(batcher, batching.job_of(arrived=-0.06), 0.0, "late")
    assert "read in time" in refusal.message
    assert refusal.retry_after == pytest.approx(0.01)
    late = batching.refused(batcher, batching.job_of(arrived=-0.06, deadline=-0.01), 0.0, "late")
    assert "give it more" in late.message


def test_messages_of_jobs_that_are_late_alone(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05)
    batching.occupy(batcher, 0.0)
    refusal = batching.refused(batcher, batching.job_of(rows=10), 0.0, "late")
    assert refusal.message.startswith("the engine alone may take 103 ms for it (usually 100), and answers are promised within 50 ms: send")
    assert refusal.retry_after is None
    assert batching.refused(batcher, batching.job_of(rows=10, deadline=0.2), 0.0, "late").message == refusal.message
    hurried = batching.refused(batcher, batching.job_of(rows=10, deadline=0.04), 0.0, "late")
    assert hurried.retry_after is None
    assert "give it more" in hurried.message
    assert "read in time" in batching.refused(batcher, batching.job_of(arrived=-0.045), 0.0, "late").message  # the engine needs 10 ms


@pytest.mark.parametrize("priority", [3, 15, 16, 100, PRIORITIES - 1])
def test_equal_priority_is_not_more_urgent(batching: Any, priority: int) -> None:
    def refusals(level: int) -> int:
        batcher, count, free = batching.batcher_of({"g": batching.LINEAR}, objective=0.05), 0, 0.0
        batch = None
        for number in range(400):
            now = number * 0.0125  # 80 % of what it can do, rows of 10 ms each
            if batch is not None and free <= now:
                batcher.done(batch, free, 0.01)
                batch = None
            count += batcher.submit(batching.job_of(priority=level), now) is not None
            if batch is None and (batch := batcher.poll(now).batch) is not None:
                free = now + 0.01 * batch.rows
        return count

    assert refusals(priority) == refusals(0)


def test_no_promise_before_two_measurements(batching: Any) -> None:
    batcher = batching.batcher_of(objective=0.01)
    first, second = batching.job_of(), batching.job_of()
    batching.admitted(batcher, 0.0, first)
    assert not first.promised
    batcher.done(batching.batch_of(batcher, 0.0), 0.3, 0.3)  # it compiled
    batching.admitted(batcher, 0.3, second)
    batcher.done(batching.batch_of(batcher, 0.3), 0.302, 0.002)
    third = batching.job_of()
    batching.admitted(batcher, 0.302, third)
    assert third.promised


def test_promise_by_cost(batching: Any) -> None:
    batcher = batching.batcher_of({"small": batching.LINEAR}, cost={"small": 100.0}, objective=0.1)
    batching.occupy(batcher, 0.0, "small")
    large = batching.job_of("large", cost=800.0)
    batching.admitted(batcher, 0.0, large)
    assert large.promised
    assert batcher.snapshot().backlog_s == pytest.approx(0.08, rel=0.05)
    batching.refused(batcher, batching.job_of("small", deadline=0.089), 0.0, "late")  # it would go first, and make the large one late
    batching.admitted(batcher, 0.0, batching.job_of("larger", cost=2000.0))  # late even alone: one is tried
    batching.refused(batcher, batching.job_of("larger", cost=2000.0), 0.0, "late")


def test_overtaking_within_a_priority(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, *(batching.job_of() for _ in range(4)))
    batching.refused(batcher, batching.job_of(deadline=0.03), 0.0, "late")


def test_overtaking_a_lesser_priority(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.055)
    batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, *(batching.job_of(priority=1) for _ in range(4)))
    batching.refused(batcher, batching.job_of(priority=1), 0.0, "late")
    batching.admitted(batcher, 0.0, batching.job_of(), batching.job_of())


def test_drop_less_urgent_job_that_was_overtaken(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.035)
    batching.occupy(batcher, 0.0)
    lesser = batching.job_of(priority=1)
    batching.admitted(batcher, 0.0, lesser)
    urgent = [batching.job_of() for _ in range(3)]
    kept = [job for job in urgent if batcher.submit(job, 0.001) is None]
    assert len(kept) == 2
    batcher.done(batcher._queue.running[0].batch, 0.01, 0.01)
    assert batching.jobs_of(batcher, 0.01) == [kept[0]]
    batcher.done(batcher._queue.running[0].batch, 0.02, 0.01)
    assert batching.jobs_of(batcher, 0.02) == [kept[1]]
    step = batcher.poll(0.0355)
    assert [(job, refusal.kind) for job, refusal in step.dropped] == [(lesser, "late")]
    assert batcher.snapshot().dropped == 1


def test_refuse_during_a_hiccup_only(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05)
    batch = batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.005, batching.job_of())
    batching.refused(batcher, batching.job_of(), 0.2, "late")  # it takes 0.2 s already, and may as long again
    assert len(batcher.poll(0.2).dropped) == 1
    batcher.done(batch, 0.3, 0.3)
    late = batching.job_of()
    batching.admitted(batcher, 0.3, late)
    assert batching.jobs_of(batcher, 0.3) == [late]
    batching.admitted(batcher, 0.301, *(batching.job_of() for _ in range(2)))
