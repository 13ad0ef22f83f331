"""Promises: jobs that are admitted because they will be in time, and jobs that would be late and are tried now and then."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest


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
    for seconds in (0.004, 0.015, 0.002):
        batcher.delivered(seconds, 0.0)
    assert batcher._queue.overhead(0.0) == 0.015
    assert sum(batcher.submit(batching.job_of(), 0.0) is None for _ in range(20)) == 3
    batcher.delivered(10.0, 0.0)
    assert batcher._queue.overhead(0.0) == pytest.approx(0.3 * 0.055)  # one very slow client does not close the server
    assert batcher._queue.overhead(1.0) == pytest.approx(0.3 * 0.055 / math.e)
    assert batcher._queue.overhead(60.0) == 0.001


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


@pytest.mark.parametrize("priority", [3, 15, 16, 100, (1 << 32) - 1])
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


def test_probes_of_a_slow_group_find_its_recovery(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05)
    now = 0.0
    for _ in range(9):
        batch = batching.occupy(batcher, now)
        now += 0.2
        batcher.done(batch, now, 0.2)
    batch = batching.occupy(batcher, now)  # nothing else waits or runs
    batching.refused(batcher, batching.job_of(), now, "late")
    batching.refused(batcher, batching.job_of(deadline=now + 0.01), now, "late")
    for _ in range(9):
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batching.occupy(batcher, now)
    batching.admitted(batcher, now, batching.job_of(), batching.job_of())


def test_refuse_huge_jobs_beside_a_fast_group(batching: Any) -> None:
    """Photographs of 22 megapixels take 2.2 s, other jobs 10 ms. Each size of photograph is sent once."""
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.05, cost={"g": 1e5})
    batcher.done(batching.occupy(batcher, 0.0), 0.01, 0.01)
    now = 0.01
    for number in range(200):
        now += 0.02
        refusal = batching.refused(batcher, batching.job_of(f"huge {number}", cost=2.2e7 + number), now, "late")
        assert "send smaller images" in refusal.message
        assert batcher.submit(batching.job_of(cost=1e5), now) is None
        batcher.done(batching.batch_of(batcher, now), now + 0.01, 0.01)
    batching.admitted(batcher, now + 0.02, batching.job_of("large", cost=1.5e6))  # a few objectives
    batcher.done(batching.batch_of(batcher, now + 0.02), now + 0.17, 0.15)
    batching.admitted(batcher, now + 61, batching.job_of("huge", cost=2.2e7))  # no job has kept the objective for a minute


@pytest.mark.parametrize("seconds", [0.002, 0.032])
def test_probe_of_a_huge_guess(batching: Any, seconds: float) -> None:
    """From 0.5 ms for 64 x 64 the guess for 512 x 512 is 32 ms; it may take 2 ms."""
    batcher = batching.batcher_of(objective=0.005, cost={"small": 64**2})
    for number in range(2):
        batching.admitted(batcher, number, batching.job_of("small", cost=64**2))
        batcher.done(batching.batch_of(batcher, number), number + 0.0005, 0.0005)
    batching.refused(batcher, batching.job_of("far too large", cost=2048**2), 2.001, "late")
    now = 2.001
    for _ in range(2):
        batching.admitted(batcher, now, batching.job_of("large", cost=512**2))
        batcher.done(batching.batch_of(batcher, now), now + seconds, seconds)
        now += seconds
    if seconds < 0.005:
        batching.admitted(batcher, now, batching.job_of("other", cost=450**2))  # guessed from the measured group
    else:
        batching.refused(batcher, batching.job_of("other", cost=450**2), now, "late")  # all huge groups share one pause
        batching.admitted(batcher, 2.001 + 64 * 0.033, batching.job_of("other", cost=450**2))


def test_probes_of_a_huge_group_are_rare(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR, "slow": (1.0, 0.0)}, objective=0.05)
    times = []
    now = 0.0
    while now < 200:
        now += 0.5
        batcher.done(batching.occupy(batcher, now), now + 0.01, 0.01)
        if batcher.submit(batching.job_of("slow"), now + 0.01) is None:
            times.append(now)
            batcher.done(batching.batch_of(batcher, now + 0.01), now + 1.01, 1.0)
            now += 1.01
    assert len(times) == 4
    assert min(later - earlier for earlier, later in pairwise(times)) > 60


def test_stalled_group_is_not_huge(batching: Any) -> None:
    """Stalls of the machine make the spread of the latency large, not its expected value."""
    batcher = batching.batcher_of({"g": batching.LINEAR}, objective=0.5)
    batcher.done(batching.occupy(batcher, 0.0), 0.01, 0.01)
    now = 1.0
    for number in range(40):
        batching.admitted(batcher, now, batching.job_of("stalled"))
        took = 1.7 if number % 6 == 5 else 0.02
        batcher.done(batching.batch_of(batcher, now), now + took, took)
        now += took + 0.1
    latency = batcher._queue.group_of(batching.job_of("stalled")).latency
    assert latency.safe(1) > 4 * 0.5 > 20 * latency.expected(1)
    batching.admitted(batcher, now, batching.job_of("stalled"))


def test_probes_of_a_slow_group_beside_others(batching: Any) -> None:
    batcher = batching.batcher_of({"g": batching.LINEAR, "slow": (1.0, 0.0)}, objective=0.3)
    batch = batching.occupy(batcher, 0.0)
    batching.admitted(batcher, 0.0, batching.job_of("slow"))
    batcher.done(batch, 0.01, 0.01)
    batch = batching.batch_of(batcher, 0.01)
    batcher.done(batch, 1.01, 1.0)
    batching.occupy(batcher, 1.01)
    batching.refused(batcher, batching.job_of("slow"), 1.01, "late")
    batching.refused(batcher, batching.job_of("slow"), 7.9, "late")
    batching.admitted(batcher, 8.5, batching.job_of("slow"))
