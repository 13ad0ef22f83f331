"""Helpers for tests of the batcher, and a state machine that checks its invariants under any sequence of events."""

from __future__ import annotations

import math
import random
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.job import Batch, Job, Refusal
from muntin.serving.batching.latency_model import LatencyModel

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


def after_a_pause(batcher: Batcher, now: float, *jobs: Job) -> Batch:
    """The batch of a worker that becomes free at `now`, when these jobs arrived while it was busy."""
    admitted(batcher, now - 0.005, *jobs)
    running = batcher._queue.running[0].batch
    batcher.done(running, now, None)
    return batch_of(batcher, now)


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


class AnySequence(RuleBasedStateMachine):
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


AnySequence.TestCase.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
