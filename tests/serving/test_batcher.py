"""The rules of the batcher one by one, and its invariants under any sequence of events."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from muntin.errors import DataError
from muntin.serving.batcher import PRIORITIES, Batch, Batcher, Decision, Job, Refusal
from muntin.serving.job_queue import REMEMBERED_GROUPS
from muntin.serving.latency import LatencyModel

Engine = tuple[float, float]
"""Seconds of a batch, and of each of its rows."""
STEEP: Engine = (0.010, 0.0001)
LINEAR: Engine = (0.0, 0.010)


def batcher_of(engines: dict[str, Engine] | None = None, *, cost: dict[str, float] | None = None, **options: Any) -> Batcher:
    """A batcher that has measured these engines often: their spread is the minimum, 3 %."""
    latencies = LatencyModel()
    for group, (fixed, each) in (engines or {}).items():
        for number in range(200):
            rows = (1, 2, 4, 8, 16, 32)[number % 6]
            latencies.observe(group, rows, fixed + each * rows, cost=(cost or {}).get(group))
    return Batcher(latencies, **({"objective": None, "max_rows": 32, "queue_rows": 1000, "queue_bytes": 1 << 30, "margin": 0.0} | options))


def job_of(group: str = "g", **fields: Any) -> Job:
    return Job(group=group, **fields)


def admitted(batcher: Batcher, now: float, *jobs: Job) -> None:
    for job in jobs:
        assert batcher.submit(job, now) is None


def refused(batcher: Batcher, job: Job, now: float, kind: str) -> Refusal:
    refusal = batcher.submit(job, now)
    assert refusal is not None
    assert (refusal.kind, job.waiting) == (kind, False)
    assert "\n" not in refusal.message
    return refusal


def batch_of(batcher: Batcher, now: float) -> Batch:
    step = batcher.poll(now)
    assert step.batch is not None
    return step.batch


def jobs_of(batcher: Batcher, now: float) -> list[Job]:
    return list(batch_of(batcher, now).jobs)


def occupy(batcher: Batcher, now: float, group: str = "g") -> Batch:
    """Make the worker busy with one job."""
    admitted(batcher, now, job_of(group))
    return batch_of(batcher, now)


# ---- refusals


def test_refuse_too_large_request() -> None:
    batcher = batcher_of(max_rows=8, queue_bytes=100)
    refusal = refused(batcher, job_of(rows=9), 0.0, "too large")
    assert "at most 8 rows and 100 bytes" in refusal.message
    assert refusal.retry_after is None
    refused(batcher, job_of(nbytes=101), 0.0, "too large")
    admitted(batcher, 0.0, job_of(rows=8, nbytes=100))


def test_refuse_when_queue_is_full() -> None:
    batcher = batcher_of({"g": LINEAR}, max_rows=4, queue_rows=10, queue_bytes=100)
    occupy(batcher, 0.0)
    admitted(batcher, 0.0, job_of(rows=4), job_of(rows=4))
    refusal = refused(batcher, job_of(rows=3), 0.0, "full")
    assert "8 rows" in refusal.message
    assert refusal.retry_after == pytest.approx(0.08 / 11, rel=0.2)
    admitted(batcher, 0.0, job_of(rows=2, nbytes=60))
    batcher = batcher_of(queue_bytes=100)
    admitted(batcher, 0.0, job_of(nbytes=60))
    assert refused(batcher, job_of(nbytes=41), 0.0, "full").retry_after is None  # nothing is known of the group
    admitted(batcher, 0.0, job_of(nbytes=40))


def test_refuse_while_draining() -> None:
    batcher = batcher_of()
    admitted(batcher, 0.0, job_of(), job_of())
    batcher.drain()
    refused(batcher, job_of(), 0.0, "draining")
    assert batcher.poll(0.0).batch is not None


def test_invalid_jobs() -> None:
    batcher = batcher_of()
    for fields in (
        {"rows": 0},
        {"nbytes": -1},
        {"priority": -1},
        {"priority": 1 << 32},
        {"deadline": math.nan},
        {"cost": 0},
        {"cost": math.inf},
    ):
        (name,) = fields
        with pytest.raises(ValueError, match=name):
            batcher.submit(job_of(**fields), 0.0)
    job = job_of()
    admitted(batcher, 0.0, job)
    with pytest.raises(ValueError, match="admitted before"):
        batcher.submit(job, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows=0"),
        ({"workers": 0}, "workers=0"),
        ({"queue_bytes": 0}, "queue_bytes=0"),
        ({"queue_rows": 31}, "queue_rows=31, max_rows=32"),
        ({"objective": 0.0}, "objective=0.0"),
        ({"objective": math.nan}, "objective=nan"),
        ({"patience": 0.0}, "patience=0.0"),
        ({"margin": -1.0}, "margin=-1.0"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        batcher_of(**options)
    assert "give" in str(caught.value) or "let" in str(caught.value)


# ---- promises


def test_refuse_behind_too_long_a_backlog() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    occupy(batcher, 0.0)  # until 0.01
    admitted(batcher, 0.0, *(job_of() for _ in range(4)))  # until 0.05
    refusal = refused(batcher, job_of(), 0.0, "late")
    assert "4 requests wait" in refusal.message
    assert refusal.retry_after is not None
    assert 0.004 < refusal.retry_after < 0.007
    admitted(batcher, refusal.retry_after + 0.0005, job_of())


def test_promise_for_many_rows() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.035)
    admitted(batcher, 0.0, job_of())
    refused(batcher, job_of(rows=3), 0.0, "late")  # rows gain nothing from sharing, so batches have one row: this one takes 30 ms


def test_promises_include_time_beyond_the_engine() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055, margin=0.001)
    jobs = [job_of() for _ in range(20)]
    assert sum(batcher.submit(job, 0.0) is None for job in jobs) == 5
    batcher.discard()
    for batch in range(128):
        batcher.delivered(batch, 0.015)
    assert batcher.margin == 0.015
    assert sum(batcher.submit(job_of(), 0.0) is None for _ in range(20)) == 3
    for batch in range(128):
        batcher.delivered(batch + 128, 10.0)
    assert batcher.margin == pytest.approx(0.3 * 0.055)  # one very slow client does not close the server


def test_without_objective_and_deadline() -> None:
    batcher = batcher_of({"g": LINEAR})
    admitted(batcher, 0.0, *(job_of() for _ in range(1000)))
    assert batcher.poll(3600.0).dropped == ()


def test_deadline_before_the_objective() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    occupy(batcher, 0.0)
    refused(batcher, job_of(deadline=0.015), 0.0, "late")
    admitted(batcher, 0.0, job_of(deadline=0.025), *(job_of(deadline=100.0) for _ in range(3)))
    assert refused(batcher, job_of(deadline=0.0), 0.0, "late").retry_after is None
    refused(batcher, job_of(deadline=100.0), 0.0, "late")


def test_objective_counts_from_arrival() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    running = occupy(batcher, 0.0)
    early, late = job_of(arrived=-0.02), job_of(arrived=5.0)
    admitted(batcher, 0.0, early, late)
    assert early.due == pytest.approx(0.035)
    assert late.due == pytest.approx(0.055)  # no job arrives after it is submitted
    batcher.done(running, 0.01, 0.01)
    assert jobs_of(batcher, 0.01) == [early]


def test_refuse_job_read_after_its_objective() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    occupy(batcher, 0.0)
    admitted(batcher, 0.0, job_of())
    refusal = refused(batcher, job_of(arrived=-0.06), 0.0, "late")
    assert "read in time" in refusal.message
    assert refusal.retry_after == pytest.approx(0.01)
    assert "give it more" in refused(batcher, job_of(arrived=-0.06, deadline=-0.01), 0.0, "late").message  # the client's own time


def test_messages_of_jobs_that_are_late_alone() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.05)
    occupy(batcher, 0.0)
    refusal = refused(batcher, job_of(rows=10), 0.0, "late")
    assert refusal.message.startswith("the engine alone may take 103 ms for it (usually 100), and answers are promised within 50 ms: send")
    assert refusal.retry_after is None
    assert refused(batcher, job_of(rows=10, deadline=0.2), 0.0, "late").message == refusal.message
    hurried = refused(batcher, job_of(rows=10, deadline=0.04), 0.0, "late")
    assert hurried.retry_after is None
    assert "give it more" in hurried.message
    assert "read in time" in refused(batcher, job_of(arrived=-0.045), 0.0, "late").message  # the engine needs 10 ms


@pytest.mark.parametrize("priority", [3, 15, 16, 100, PRIORITIES - 1])
def test_equal_priority_is_not_more_urgent(priority: int) -> None:
    def refusals(level: int) -> int:
        batcher, count, free = batcher_of({"g": LINEAR}, objective=0.05), 0, 0.0
        batch = None
        for number in range(400):
            now = number * 0.0125  # 80 % of what it can do, rows of 10 ms each
            if batch is not None and free <= now:
                batcher.done(batch, free, 0.01)
                batch = None
            count += batcher.submit(job_of(priority=level), now) is not None
            if batch is None and (batch := batcher.poll(now).batch) is not None:
                free = now + 0.01 * batch.rows
        return count

    assert refusals(priority) == refusals(0)


def test_no_promise_before_two_measurements() -> None:
    batcher = batcher_of(objective=0.01)
    first, second = job_of(), job_of()
    admitted(batcher, 0.0, first)
    assert not first.promised
    batcher.done(batch_of(batcher, 0.0), 0.3, 0.3)  # it compiled
    admitted(batcher, 0.3, second)
    batcher.done(batch_of(batcher, 0.3), 0.302, 0.002)
    third = job_of()
    admitted(batcher, 0.302, third)
    assert third.promised


def test_promise_by_cost() -> None:
    batcher = batcher_of({"small": LINEAR}, cost={"small": 100.0}, objective=0.1)
    occupy(batcher, 0.0, "small")
    large = job_of("large", cost=800.0)
    admitted(batcher, 0.0, large)
    assert large.promised
    assert batcher.snapshot().backlog_s == pytest.approx(0.08, rel=0.05)
    refused(batcher, job_of("small", deadline=0.089), 0.0, "late")  # it would go first, and make the large one late
    admitted(batcher, 0.0, job_of("larger", cost=2000.0))  # late even alone: one is tried
    refused(batcher, job_of("larger", cost=2000.0), 0.0, "late")


def test_overtaking_within_a_priority() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    occupy(batcher, 0.0)
    admitted(batcher, 0.0, *(job_of() for _ in range(4)))
    refused(batcher, job_of(deadline=0.03), 0.0, "late")


def test_overtaking_a_lesser_priority() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.055)
    occupy(batcher, 0.0)
    admitted(batcher, 0.0, *(job_of(priority=1) for _ in range(4)))
    refused(batcher, job_of(priority=1), 0.0, "late")
    admitted(batcher, 0.0, job_of(), job_of())


def test_drop_less_urgent_job_that_was_overtaken() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.035)
    occupy(batcher, 0.0)
    lesser = job_of(priority=1)
    admitted(batcher, 0.0, lesser)
    urgent = [job_of() for _ in range(3)]
    kept = [job for job in urgent if batcher.submit(job, 0.001) is None]
    assert len(kept) == 2
    batcher.done(batcher._queue.running[0].batch, 0.01, 0.01)
    assert jobs_of(batcher, 0.01) == [kept[0]]
    batcher.done(batcher._queue.running[0].batch, 0.02, 0.01)
    assert jobs_of(batcher, 0.02) == [kept[1]]
    step = batcher.poll(0.0355)
    assert [(job, refusal.kind) for job, refusal in step.dropped] == [(lesser, "late")]
    assert batcher.snapshot().dropped == 1


def test_refuse_during_a_hiccup_only() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.05)
    batch = occupy(batcher, 0.0)
    admitted(batcher, 0.005, job_of())
    refused(batcher, job_of(), 0.2, "late")  # it takes 0.2 s already, and may as long again
    assert len(batcher.poll(0.2).dropped) == 1
    batcher.done(batch, 0.3, 0.3)
    late = job_of()
    admitted(batcher, 0.3, late)
    assert jobs_of(batcher, 0.3) == [late]
    admitted(batcher, 0.301, *(job_of() for _ in range(2)))


def test_probes_of_a_slow_group_find_its_recovery() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.05)
    now = 0.0
    for _ in range(9):
        batch = occupy(batcher, now)
        now += 0.2
        batcher.done(batch, now, 0.2)
    batch = occupy(batcher, now)  # nothing else to do
    refused(batcher, job_of(), now, "late")
    refused(batcher, job_of(deadline=now + 0.01), now, "late")
    for _ in range(9):
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = occupy(batcher, now)
    admitted(batcher, now, job_of(), job_of())


def test_refuse_huge_jobs_beside_a_fast_group() -> None:
    """Photographs of 22 megapixels take 2.2 s, other jobs 10 ms. Each size of photograph is sent once."""
    batcher = batcher_of({"g": LINEAR}, objective=0.05, cost={"g": 1e5})
    batcher.done(occupy(batcher, 0.0), 0.01, 0.01)
    now, answered = 0.01, 0
    for number in range(200):
        now += 0.02
        refusal = refused(batcher, job_of(f"huge {number}", cost=2.2e7 + number), now, "late")
        assert "send smaller images" in refusal.message
        assert batcher.submit(job_of(cost=1e5), now) is None
        batcher.done(batch_of(batcher, now), now + 0.01, 0.01)
        answered += 1
    assert answered == 200
    admitted(batcher, now + 0.02, job_of("large", cost=1.5e6))  # a few objectives
    batcher.done(batch_of(batcher, now + 0.02), now + 0.17, 0.15)
    admitted(batcher, now + 61, job_of("huge", cost=2.2e7))  # nobody was there for a minute


@pytest.mark.parametrize("seconds", [0.002, 0.032])
def test_probe_of_a_huge_guess(seconds: float) -> None:
    """From 0.5 ms for 64 x 64 the guess for 512 x 512 is 32 ms; it may take 2 ms."""
    batcher = batcher_of(objective=0.005, cost={"small": 64**2})
    for number in range(2):
        admitted(batcher, number, job_of("small", cost=64**2))
        batcher.done(batch_of(batcher, number), number + 0.0005, 0.0005)
    refused(batcher, job_of("far too large", cost=2048**2), 2.001, "late")
    now = 2.001
    for _ in range(2):
        admitted(batcher, now, job_of("large", cost=512**2))
        batcher.done(batch_of(batcher, now), now + seconds, seconds)
        now += seconds
    if seconds < 0.005:
        admitted(batcher, now, job_of("other", cost=450**2))  # guessed from the measured group
    else:
        refused(batcher, job_of("other", cost=450**2), now, "late")  # all huge groups share one pause
        admitted(batcher, 2.001 + 64 * 0.033, job_of("other", cost=450**2))


def test_probes_of_a_huge_group_are_rare() -> None:
    batcher = batcher_of({"g": LINEAR, "slow": (1.0, 0.0)}, objective=0.05)
    times = []
    now = 0.0
    while now < 200:
        now += 0.5
        batcher.done(occupy(batcher, now), now + 0.01, 0.01)
        if batcher.submit(job_of("slow"), now + 0.01) is None:
            times.append(now)
            batcher.done(batch_of(batcher, now + 0.01), now + 1.01, 1.0)
            now += 1.01
    assert len(times) == 4
    assert min(later - earlier for earlier, later in pairwise(times)) > 60


def test_stalled_group_is_not_huge() -> None:
    """A machine that stood still makes its spread large, and what the engine usually takes none the less small."""
    batcher = batcher_of({"g": LINEAR}, objective=0.5)
    batcher.done(occupy(batcher, 0.0), 0.01, 0.01)
    now = 1.0
    for number in range(40):
        admitted(batcher, now, job_of("stalled"))
        took = 1.7 if number % 6 == 5 else 0.02
        batcher.done(batch_of(batcher, now), now + took, took)
        now += took + 0.1
    latency = batcher._queue.group_of(job_of("stalled")).latency
    assert latency.safe(1) > 4 * 0.5 > 20 * latency.expected(1)
    admitted(batcher, now, job_of("stalled"))


def test_probes_of_a_slow_group_beside_others() -> None:
    batcher = batcher_of({"g": LINEAR, "slow": (1.0, 0.0)}, objective=0.3)
    batch = occupy(batcher, 0.0)
    admitted(batcher, 0.0, job_of("slow"))
    batcher.done(batch, 0.01, 0.01)
    batch = batch_of(batcher, 0.01)
    batcher.done(batch, 1.01, 1.0)
    occupy(batcher, 1.01)
    refused(batcher, job_of("slow"), 1.01, "late")
    refused(batcher, job_of("slow"), 7.9, "late")
    admitted(batcher, 8.5, job_of("slow"))


# ---- order


def test_order_by_priority_due_time_and_arrival() -> None:
    batcher = batcher_of({"g": LINEAR}, max_rows=1, queue_rows=100)
    occupy(batcher, 0.0)
    late, soon, urgent, same = job_of(deadline=0.9), job_of(deadline=0.5), job_of(priority=0, deadline=0.4), job_of(deadline=0.5)
    lesser = job_of(priority=1, deadline=0.3)
    admitted(batcher, 0.0, lesser, late, soon, urgent, same)
    order = []
    for step in range(5):
        now = 0.01 * (step + 1)
        batcher.done(batcher._queue.running[0].batch, now, 0.01)
        order += jobs_of(batcher, now)
    assert order == [urgent, soon, same, late, lesser]


def test_order_of_a_far_deadline() -> None:
    batcher = batcher_of({"g": LINEAR}, max_rows=1, queue_rows=1000)
    batch = occupy(batcher, 0.0)
    distant = job_of(deadline=3600.0)
    admitted(batcher, 0.0, *(job_of() for _ in range(3)), distant)
    now = 0.0
    for _ in range(4):
        admitted(batcher, now, job_of(), job_of())
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batch_of(batcher, now)
    assert batch.jobs == (distant,)


def test_order_of_patient_jobs() -> None:
    batcher = batcher_of({"g": LINEAR}, max_rows=1, queue_rows=1000, objective=5.0)
    batch = occupy(batcher, 0.0)
    promised = [job_of(priority=2) for _ in range(3)]
    admitted(batcher, 0.0, *promised)
    admitted(batcher, 0.001, tile := job_of(priority=3, patient=True))
    order = []
    for step in range(1, 5):
        batcher.done(batch, 0.01 * step, 0.01)
        batch = batch_of(batcher, 0.01 * step)
        order += batch.jobs
    assert order == [*promised, tile]


def test_order_of_groups() -> None:
    batcher = batcher_of({"a": STEEP, "b": STEEP}, objective=1.0)
    occupy(batcher, 0.0, "a")
    a = [job_of("a", priority=1), job_of("a", priority=1)]
    b = [job_of("b", priority=2), job_of("b")]
    admitted(batcher, 0.0, *a, *b)
    batcher.done(batcher._queue.running[0].batch, 0.01, 0.0101)
    assert jobs_of(batcher, 0.01) == [b[1], b[0]]


def test_no_job_starves() -> None:
    """A job of priority 2 goes before every job that arrives more than twice the patience later."""
    batcher = batcher_of({"g": LINEAR}, max_rows=1, queue_rows=100, patience=0.1)
    batch = occupy(batcher, 0.0)
    patient = job_of(priority=2)
    admitted(batcher, 0.0, patient)
    now = 0.0
    while True:
        admitted(batcher, now, job_of(), job_of())
        now += 0.01
        batcher.done(batch, now, 0.01)
        batch = batch_of(batcher, now)
        if patient in batch.jobs:
            break
        assert batch.jobs[0].arrived <= 0.2
    assert 0.2 < now < 0.6


def test_batches_of_one_group_by_rows() -> None:
    batcher = batcher_of({"a": STEEP, "b": STEEP}, max_rows=8, queue_rows=100)
    occupy(batcher, 0.0, "a")
    jobs = [job_of("a", rows=3), job_of("b", rows=2), job_of("a", rows=3), job_of("a", rows=3), job_of("b", rows=8), job_of("a", rows=1)]
    admitted(batcher, 0.0, *jobs)
    batches = []
    for step in range(4):
        now = 0.02 * (step + 1)
        batcher.done(batcher._queue.running[0].batch, now, 0.01)
        batches.append([jobs.index(job) for job in jobs_of(batcher, now)])
    # The first "a" takes the second along, not the third (9 rows), nor the fourth past it.
    assert batches == [[0, 2], [1], [3, 5], [4]]


def beside_traffic(*, tiles: int, tile: float, rate: float, objective: float) -> tuple[list[float], list[Job], int, int]:
    """Play a picture's tiles, each sent when the one before it is computed, beside requests of 10 ms at a rate, until it is answered.

    Returns the seconds of each tile; the admitted requests, with the time of their answer as payload; the numbers of refused and of
    dropped requests."""
    generator = random.Random(0)  # noqa: S311 - no secret
    batcher = batcher_of({"g": LINEAR, "tile": (0.0, tile)}, objective=objective)
    took: list[float] = []
    kept: list[Job] = []
    refusals = dropped = 0
    now, arrival, ends, seconds = 0.0, 1.0, math.inf, 0.0
    batch: Batch | None = None
    sent: Job | None = None
    while len(took) < tiles:
        if sent is None and now > 3.0:  # the requests' rate is known
            sent = job_of("tile", priority=3, patient=True)
            admitted(batcher, now, sent)
        step = batcher.poll(now)
        dropped += len(step.dropped)
        if step.batch is not None:
            batch, seconds = step.batch, tile if step.batch.group == "tile" else 0.01 * step.batch.rows
            ends = now + seconds
        now = min(arrival, ends, step.wake or math.inf)
        assert now < 1000
        if now == ends and batch is not None:
            batcher.done(batch, now, seconds)
            for job in batch.jobs:
                job.payload = now
                if job is sent:
                    took.append(now - job.arrived)
                    sent = None
            batch, ends = None, math.inf
        elif now == arrival:
            job = job_of(priority=2)
            if batcher.submit(job, now) is None:
                kept.append(job)
            else:
                refusals += 1
            arrival = now + generator.expovariate(rate)
    return took, [job for job in kept if job.payload is not None], refusals, dropped


@pytest.mark.parametrize("tile", [0.04, 0.25])
@pytest.mark.parametrize("rate", [30, 70, 300])
def test_picture_in_tiles_beside_traffic(tile: float, rate: float) -> None:
    """A tile takes about as long as the objective, 50 ms, or longer."""
    took, kept, refusals, dropped = beside_traffic(tiles=20, tile=tile, rate=rate, objective=0.05)
    assert max(took) < 2.1 + tile
    assert len(kept) > 30
    assert max(job.payload - job.due for job in kept) <= 1e-9
    assert dropped <= len(kept) / 1000  # foreseen in a batch that then had no room
    if rate == 30 and tile == 0.04:
        assert refusals < 0.6 * (len(kept) + refusals)


def test_patient_jobs_in_a_full_queue() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.05, max_rows=4, queue_rows=4, queue_bytes=10)
    occupy(batcher, 0.0)
    patient = [job_of(patient=True, rows=4, nbytes=8) for _ in range(3)]
    admitted(batcher, 0.0, *patient)
    assert {job.due for job in patient} == {math.inf}
    refused(batcher, job_of(), 0.0, "full")
    refused(batcher, job_of(patient=True, nbytes=11), 0.0, "too large")
    refused(batcher, job_of(patient=True, deadline=0.001), 0.0, "late")


# ---- size of batches


def after_a_pause(batcher: Batcher, now: float, *jobs: Job) -> Batch:
    """The batch of a worker that becomes free at `now`, when these jobs arrived while it was busy."""
    admitted(batcher, now - 0.005, *jobs)
    running = batcher._queue.running[0].batch
    batcher.done(running, now, None)
    return batch_of(batcher, now)


def test_full_batch_where_sharing_gains() -> None:
    batcher = batcher_of({"g": STEEP}, objective=1.0)
    occupy(batcher, 0.0)
    assert after_a_pause(batcher, 0.011, *(job_of() for _ in range(40))).rows == 32


def test_single_rows_where_sharing_gains_nothing() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=1.0)
    occupy(batcher, 0.0)
    assert after_a_pause(batcher, 0.011, *(job_of() for _ in range(4))).rows == 1


def test_batch_keeps_its_earliest_due_time() -> None:
    batcher = batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    occupy(batcher, 0.0)
    admitted(batcher, 0.001, job_of(deadline=0.0275))
    batch = after_a_pause(batcher, 0.011, *(job_of() for _ in range(20)))
    assert batch.jobs[0].deadline == 0.0275
    assert batch.rows == 6  # (0.0165 / 1.03 - 0.01) / 0.001
    assert all(job.due > 0.1 for job in batch.jobs[1:])


def test_batch_leaves_time_for_other_groups() -> None:
    batcher = batcher_of({"a": (0.010, 0.001), "b": LINEAR}, objective=0.06)
    occupy(batcher, 0.0, "a")
    admitted(batcher, 0.001, *(job_of("a") for _ in range(8)))
    urgent = job_of("b")
    admitted(batcher, 0.002, urgent)
    more = [job_of("a") for _ in range(24)]
    for job in more:
        batcher.submit(job, 0.003)
    batcher.done(batcher._queue.running[0].batch, 0.011, 0.011)
    batch = batch_of(batcher, 0.011)
    assert 20 < batch.rows < 32  # 28 rows: 0.011 + 0.038 * 1.03 + 0.0103 is all that 0.062 admits
    end = 0.011 + 0.010 + 0.001 * batch.rows
    batcher.done(batch, end, end - 0.011)
    assert jobs_of(batcher, end) == [urgent]
    assert end + 0.0103 <= urgent.due


def test_batch_skips_less_urgent_job() -> None:
    batcher = batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    occupy(batcher, 0.0)
    lesser = job_of(priority=1, deadline=0.0235)
    admitted(batcher, 0.001, lesser)
    admitted(batcher, 0.002, *(job_of() for _ in range(8)))
    batcher.done(batcher._queue.running[0].batch, 0.011, None)
    batch = batch_of(batcher, 0.011)
    assert batch.rows == 8
    assert lesser not in batch.jobs
    small = batcher_of({"g": (0.010, 0.001)}, objective=0.1)
    occupy(small, 0.0)
    fitting = job_of(priority=1, deadline=0.045)
    admitted(small, 0.001, fitting)
    assert fitting in after_a_pause(small, 0.011, *(job_of() for _ in range(8))).jobs


# ---- waiting for more rows


def busy_stream(batcher: Batcher, *, rate: float, until: float) -> float:
    """Keep an engine of `STEEP` busy with evenly spaced arrivals, and return when it is free again and nothing waits."""
    now, arrival = 0.0, 0.0
    while now < until:
        while arrival <= now:
            assert batcher.submit(job_of(), arrival) is None
            arrival += 1 / rate
        step = batcher.poll(now)
        if step.batch is None:
            now = min(arrival, step.wake or math.inf)
            continue
        now += 0.010 + 0.0001 * step.batch.rows
        batcher.done(step.batch, now, 0.010 + 0.0001 * step.batch.rows)
    while (step := batcher.poll(now)).batch is not None or step.wake is not None:
        if step.batch is None:
            now = step.wake or now
            continue
        now += 0.012
        batcher.done(step.batch, now, 0.012)
    return now


def test_wait_for_more_rows_until_latest_safe_time() -> None:
    batcher = batcher_of({"g": STEEP}, objective=0.1)
    now = busy_stream(batcher, rate=1500, until=1.0)
    admitted(batcher, now, job_of())
    step = batcher.poll(now)
    assert step.batch is None
    assert step.wake is not None
    assert now < step.wake <= now + 0.0101
    admitted(batcher, now + 0.0005, *(job_of() for _ in range(31)))
    assert batch_of(batcher, now + 0.0005).rows == 32

    hurried = batcher_of({"g": STEEP}, objective=0.1)
    now = busy_stream(hurried, rate=1500, until=1.0)
    admitted(hurried, now, job_of(deadline=now + 0.0115))
    step = hurried.poll(now)
    assert step.wake is not None
    assert step.wake == pytest.approx(now + 0.0115 - 0.0101 * 1.03, abs=3e-4)
    assert hurried.poll(step.wake + 1e-6).batch is not None


def test_wait_ends_when_no_rows_arrive() -> None:
    batcher = batcher_of({"g": STEEP}, objective=0.1)
    now = busy_stream(batcher, rate=1500, until=1.0)
    admitted(batcher, now, job_of())
    wake = batcher.poll(now).wake
    assert wake is not None
    assert wake == pytest.approx(now + 2 / batcher._queue.groups["g"].arrivals.per_second(now))  # two mean gaps
    assert batch_of(batcher, wake).rows == 1


def test_no_wait_beside_another_group() -> None:
    batcher = batcher_of({"g": STEEP, "h": STEEP}, objective=0.1)
    now = busy_stream(batcher, rate=1500, until=1.0)
    admitted(batcher, now, job_of("g"), job_of("h"))
    assert batch_of(batcher, now).rows == 1


def test_no_wait_while_draining() -> None:
    batcher = batcher_of({"g": STEEP}, objective=0.1)
    now = busy_stream(batcher, rate=1500, until=1.0)
    admitted(batcher, now, job_of())
    batcher.drain()
    assert batcher.poll(now).batch is not None


# ---- expiry, cancelling, ending


def test_cancel_waiting_jobs_only() -> None:
    batcher = batcher_of({"g": STEEP}, objective=1.0)
    running, waiting, other = job_of(), job_of(nbytes=5), job_of()
    admitted(batcher, 0.0, running)
    batch = batch_of(batcher, 0.0)
    admitted(batcher, 0.0, waiting, other)
    assert not batcher.cancel(running)
    assert batcher.cancel(waiting)
    assert not batcher.cancel(waiting)
    assert not batcher.cancel(job_of())
    snapshot = batcher.snapshot()
    assert (snapshot.waiting_jobs, snapshot.waiting_bytes, snapshot.cancelled, snapshot.running_rows) == (1, 0, 1, 1)
    batcher.done(batch, 0.01, 0.0101)
    assert jobs_of(batcher, 0.01) == [other]


def test_expire_while_no_worker_is_free() -> None:
    batcher = batcher_of()
    assert batcher.expiry == math.inf
    occupy(batcher, 0.0)
    early, late, never = job_of(deadline=1.0), job_of(deadline=2.0), job_of()
    admitted(batcher, 0.0, early, late, never)
    assert batcher.expiry == 1.0
    assert batcher.expire(1.0) == ()
    assert [(job, refusal.kind) for job, refusal in batcher.expire(1.5)] == [(early, "late")]
    assert batcher.expiry == 2.0
    batcher.cancel(late)
    assert batcher.expire(2.1) == ()
    assert batcher.expiry == math.inf
    assert batcher.snapshot().waiting_jobs == 1


def test_drop_late_job_unless_it_waits_alone() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.03)
    batch = occupy(batcher, 0.0)
    first, second = job_of(), job_of()
    admitted(batcher, 0.0, first)
    admitted(batcher, 0.005, second)
    batcher.done(batch, 0.024, None)  # longer than foreseen: 6 ms left for the first, 11 for the second
    step = batcher.poll(0.024)
    assert [job for job, _ in step.dropped] == [first]
    assert step.batch is not None
    assert step.batch.jobs == (second,)
    assert step.dropped[0][1].retry_after is not None
    batcher.done(step.batch, 0.034, 0.01)
    batch = occupy(batcher, 0.04)
    alone = job_of()
    admitted(batcher, 0.04, alone)
    batcher.done(batch, 0.065, None)
    assert jobs_of(batcher, 0.065) == [alone]


def test_batch_is_done_once() -> None:
    batcher = batcher_of()
    batch = occupy(batcher, 0.0)
    batcher.done(batch, 0.1, 0.1)
    for strange in (batch, Batch(batch.jobs, batch.group, batch.rows)):
        with pytest.raises(ValueError, match="does not run"):
            batcher.done(strange, 0.2, 0.1)


def test_failed_batch_is_not_learned() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.05)
    for step in range(20):
        batcher.done(occupy(batcher, float(step)), step + 0.5, None)
    admitted(batcher, 30.0, *(job_of() for _ in range(3)))


def test_two_workers() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.045, workers=2)
    jobs = [job_of() for _ in range(10)]
    kept = [job for job in jobs if batcher.submit(job, 0.0) is None]
    assert len(kept) == 8
    batches = [batch_of(batcher, 0.0), batch_of(batcher, 0.0)]
    assert [batch.jobs for batch in batches] == [(kept[0],), (kept[1],)]
    assert batcher.poll(0.0) == Decision(None, (), None)
    batcher.done(batches[1], 0.01, 0.01)
    assert batch_of(batcher, 0.01).jobs == (kept[2],)


def test_discard() -> None:
    batcher = batcher_of({"a": STEEP, "b": LINEAR}, objective=1.0)
    occupy(batcher, 0.0, "a")
    jobs = [job_of("a"), job_of("b"), job_of("a")]
    admitted(batcher, 0.0, *jobs)
    given_up = batcher.discard()
    assert {job for job, _ in given_up} == set(jobs)
    assert {refusal.kind for _, refusal in given_up} == {"draining"}
    assert (batcher.waiting, batcher.snapshot().running_batches, batcher.discard()) == (0, 1, ())


def test_snapshot() -> None:
    batcher = batcher_of({"g": LINEAR}, objective=0.035, max_rows=4, queue_rows=4)
    batch = occupy(batcher, 0.0)
    admitted(batcher, 0.0, job_of(nbytes=7), job_of())
    refused(batcher, job_of(), 0.0, "late")
    refused(batcher, job_of(rows=5), 0.0, "too large")
    refused(batcher, job_of(rows=3), 0.0, "full")
    snapshot = batcher.snapshot()
    assert snapshot.refused == {"full": 1, "late": 1, "too large": 1, "draining": 0, "stuck": 0}
    assert (snapshot.waiting_jobs, snapshot.waiting_rows, snapshot.waiting_bytes, snapshot.waiting_groups) == (2, 2, 7, 1)
    assert (snapshot.running_batches, snapshot.running_rows, snapshot.admitted, snapshot.finished) == (1, 1, 3, 0)
    assert snapshot.backlog_s == pytest.approx(0.02, rel=0.05)
    batcher.done(batch, 0.01, 0.01)
    assert batcher.snapshot().finished == 1


def test_old_groups_are_forgotten() -> None:
    batcher = batcher_of(objective=1.0)
    for number in range(3 * REMEMBERED_GROUPS):
        batcher.done(occupy(batcher, float(number), f"g{number}"), number + 0.5, 0.001)
    assert len(batcher._queue.groups) <= REMEMBERED_GROUPS


# ---- any sequence of events


class Anything(RuleBasedStateMachine):
    """Submits, polls, finishes, fails and cancels in any order, and compares the batcher with a plain list of waiting jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.batcher = batcher_of(
            {"a": STEEP, "b": LINEAR, "c": (0.005, 0.002)},
            objective=0.08,
            max_rows=8,
            queue_rows=24,
            queue_bytes=200,
            workers=2,
            patience=0.05,
        )
        self.waiting: list[Job] = []
        self.running: list[Batch] = []
        self.outcomes: dict[Job, str] = {}
        self.submitted = 0

    def settle(self, job: Job, outcome: str) -> None:
        assert job not in self.outcomes
        self.outcomes[job] = outcome

    @rule(
        group=st.sampled_from("abcd"),
        rows=st.integers(1, 9),
        nbytes=st.integers(0, 60),
        priority=st.integers(0, 2),
        deadline=st.none() | st.floats(-0.01, 0.2),
        count=st.integers(1, 4),
    )
    def submit(self, group: str, rows: int, nbytes: int, priority: int, deadline: float | None, count: int) -> None:
        for _ in range(count):
            when = None if deadline is None else self.now + deadline
            job = Job(group=group, rows=rows, nbytes=nbytes, priority=priority, deadline=when)
            self.submitted += 1
            refusal = self.batcher.submit(job, self.now)
            if refusal is None:
                self.waiting.append(job)
                continue
            self.settle(job, refusal.kind)
            assert refusal.retry_after is None or 0 <= refusal.retry_after < 10
            full = self.rows() + rows > 24 or sum(other.nbytes for other in self.waiting) + nbytes > 200
            assert (refusal.kind == "too large") == (rows > 8)
            assert (refusal.kind == "full") == (full and rows <= 8)

    def rows(self) -> int:
        return sum(job.rows for job in self.waiting)

    @rule()
    def poll(self) -> None:
        step = self.batcher.poll(self.now)
        for job, refusal in step.dropped:
            assert refusal.kind == "late"
            assert job.due < self.now + 0.2
            self.waiting.remove(job)
            self.settle(job, "dropped")
        if step.batch is not None:
            self.check(step.batch)
            for job in step.batch.jobs:
                self.waiting.remove(job)
            self.running.append(step.batch)
        elif self.waiting and len(self.running) < 2:
            assert step.wake is not None
            assert self.now < step.wake <= self.now + 0.03
            assert len({job.group for job in self.waiting}) == 1

    def check(self, batch: Batch) -> None:
        assert {job.group for job in batch.jobs} == {batch.group}
        assert sum(job.rows for job in batch.jobs) == batch.rows <= 8
        ordered = sorted(self.waiting, key=lambda job: (job.standing, job.ticket))
        assert batch.jobs[0] is ordered[0]
        group = [job for job in ordered if job.group == batch.group]
        places = [group.index(job) for job in batch.jobs]
        assert places == sorted(places)
        passed = [job for job in group[: places[-1]] if job not in batch.jobs]
        assert all(job.priority > batch.jobs[0].priority for job in passed)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), later=st.floats(0.0, 0.05), failed=st.booleans())
    def done(self, data: st.DataObject, later: float, failed: bool) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.now += later
        self.batcher.done(batch, self.now, None if failed or not later else later)
        for job in batch.jobs:
            self.settle(job, "answered")

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.waiting + [job for batch in self.running for job in batch.jobs]))
        assert self.batcher.cancel(job) == (job in self.waiting)
        if job in self.waiting:
            self.waiting.remove(job)
            self.settle(job, "cancelled")

    @rule(seconds=st.floats(0.0, 0.1))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        snapshot = self.batcher.snapshot()
        assert (snapshot.waiting_jobs, snapshot.waiting_rows) == (len(self.waiting), self.rows())
        assert snapshot.waiting_bytes == sum(job.nbytes for job in self.waiting) <= 200
        assert snapshot.waiting_groups == len({job.group for job in self.waiting})
        assert snapshot.running_batches == len(self.running)
        assert snapshot.backlog_s >= 0
        assert len(self.outcomes) + len(self.waiting) + sum(len(batch.jobs) for batch in self.running) == self.submitted

    def teardown(self) -> None:
        self.batcher.drain()
        for _ in range(1000):
            if not self.waiting and not self.running:
                break
            self.poll()
            if self.running:
                batch = self.running.pop()
                self.now += 0.001
                self.batcher.done(batch, self.now, 0.001)
                for job in batch.jobs:
                    self.settle(job, "answered")
        assert len(self.outcomes) == self.submitted
        assert self.batcher.waiting == 0


Anything.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestAnything = Anything.TestCase
