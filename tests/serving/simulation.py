"""Simulated time around the real batcher: arrivals, engines with noise and hiccups, failures, clients that give up.

`simulate(requests, seed=..., scenario=...)` plays a scenario and returns a summary; nothing depends on the wall clock. While it runs it
checks the invariants, and raises AssertionError: every job has exactly one outcome, and is answered with its own rows in order; a batch has
jobs of one group, in order, and no more rows than allowed; the queue keeps its bounds; and the memory of the batcher and of the latency
model is bounded.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.job import Batch, Job, Refusal
from muntin.serving.batching.latency_model import GROUPS, LatencyModel
from muntin.serving.batching.queues import REMEMBERED_GROUPS

ARRIVAL, DONE, WAKE, GIVE_UP = range(4)
QUEUE_BYTES = 1 << 30


def taken_apart(answers: Sequence[Any], jobs: Iterable[Job]) -> list[Any]:
    """Return each job's part of answers of single rows."""
    parts, first = [], 0
    for job in jobs:
        parts.append(answers[first : first + job.rows])
        first += job.rows
    return parts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A group of requests: an engine takes `fixed` + `each` * rows seconds for them. `share`: their share of the requests."""

    fixed: float
    each: float
    share: float = 1.0
    cost: float | None = None

    def seconds(self, rows: int) -> float:
        return self.fixed + self.each * rows


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The arrivals and the engines. Times in seconds; `load` and `slowness` are functions of the time.

    `load`: arrivals as a share of `saturation`. `sigma`: standard deviation of the logarithm of an engine's time. `hiccups`: share of
    batches that take `hiccup` times longer. `slowness`: factor by which the machine is slower. `clients`: instead of arrivals by `load`,
    number of clients that send, await the answer and send again after `think` (after a refusal, `retry`). `rows`: largest number of rows of
    a request, uniform from 1. `priorities`: weights. `deadlines`: range of a request's own deadline, as shares of the objective (without
    one, seconds). `failures`: share of batches. `gives_up`: share of requests that are cancelled, within the time of an objective.
    `burst`: requests that arrive together. `strangers`: share of requests whose group occurs once. `warm_up`: requests that do not count.
    """

    shapes: tuple[Shape, ...]
    max_rows: int
    objective: float | None = None
    load: Callable[[float], float] = field(default=lambda now: 0.9)
    workers: int = 1
    queue_rows: int = 100_000
    margin: float = 0.0002
    patience: float = 1.0
    sigma: float = 0.07
    hiccups: float = 1 / 4000
    hiccup: float = 3.0
    slowness: Callable[[float], float] = field(default=lambda now: 1.0)
    clients: int = 0
    think: float = 0.0001
    retry: float = 0.01
    rows: int = 1
    priorities: tuple[float, ...] = (1.0,)
    deadlines: tuple[float, float] | None = None
    failures: float = 0.0
    gives_up: float = 0.0
    burst: int = 1
    strangers: float = 0.0
    warm_up: int = 0

    @property
    def saturation(self) -> float:
        """Rows per second of all the engines, in full batches of each shape."""
        weight = sum(shape.share for shape in self.shapes)
        each = sum(shape.share * shape.seconds(self.max_rows) / self.max_rows for shape in self.shapes) / weight
        return self.workers / each


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Outcomes of the requests after the warm-up.

    `goodput`: work of the answers in time, in seconds of an engine that runs full batches, per second and worker. Latencies in seconds.
    """

    requests: int
    refused: dict[str, int]
    dropped: int
    cancelled: int
    failed: int
    answered: int
    late: int
    inside: float
    """Share of the admitted requests that was answered in time, without cancelled and failed ones."""
    goodput: float
    batch_rows: float
    busy: float
    p50: float
    p99: float
    p999: float
    by_priority: tuple[tuple[float, float], ...]
    """For each priority: share admitted, and share of the admitted that was answered in time."""
    by_shape: tuple[float, ...]
    """For each shape: share admitted."""
    ended: float
    """Time of the end."""
    late_after: float
    """Time of the last request that was refused, dropped or late."""

    @property
    def refusal(self) -> float:
        """Share of the requests that was refused."""
        return sum(self.refused.values()) / max(1, self.requests)


def _tide(now: float) -> float:
    """Load between 0.5 and 1.5, with a period of two seconds."""
    return 1 + 0.5 * math.sin(math.pi * now)


def _fits(now: float) -> float:
    """Twice as slow in every fifth second."""
    return 2.0 if now % 5 > 4 else 1.0


CHAOS = Scenario(
    shapes=(
        Shape(fixed=0.001, each=0.00015, share=0.5, cost=1.0),
        Shape(fixed=0.001, each=0.0003, share=0.3, cost=2.0),
        Shape(fixed=0.0, each=0.001, share=0.2, cost=7.0),
    ),
    max_rows=16,
    objective=0.03,
    load=_tide,
    workers=2,
    queue_rows=100,
    slowness=_fits,
    hiccups=0.003,
    hiccup=10.0,
    rows=4,
    priorities=(0.3, 0.5, 0.2),
    deadlines=(0.3, 2.0),
    failures=0.01,
    gives_up=0.1,
    burst=4,
    strangers=0.01,
)
"""All faults at once."""


class Sent(NamedTuple):
    """A job's payload: the index of its shape, whether it counts in the summary, and its rows, numbers that no other job has."""

    shape: int
    counts: bool
    rows: range


def simulate(requests: int, *, seed: int, scenario: Scenario = CHAOS) -> Summary:
    """Play a scenario until so many requests have arrived and all have an outcome."""
    return _Simulation(requests, seed, scenario).run()


class _Simulation:
    def __init__(self, requests: int, seed: int, scenario: Scenario) -> None:
        self.requests, self.scenario = requests, scenario
        self.random = random.Random(seed)  # noqa: S311 - no secret
        self.latencies = LatencyModel()
        self.batcher = Batcher(
            self.latencies,
            objective=scenario.objective,
            max_rows=scenario.max_rows,
            queue_rows=scenario.queue_rows,
            queue_bytes=QUEUE_BYTES,
            workers=scenario.workers,
            margin=scenario.margin,
            patience=scenario.patience,
        )
        self.events: list[tuple[float, int, int, object]] = []
        self.number = 0
        self.sent = self.sent_rows = 0
        self.open: set[Job] = set()
        """Admitted, without an outcome."""
        self.waiting_rows = 0
        self.wake = math.inf
        self.shares = list(accumulate(shape.share for shape in scenario.shapes))
        self.weights = list(accumulate(scenario.priorities))
        self.rate = scenario.saturation / ((1 + scenario.rows) / 2)
        self.count = _Count(scenario)

    def run(self) -> Summary:
        if self.scenario.clients:
            for _ in range(self.scenario.clients):
                self._at(self.random.random() * self.scenario.think, ARRIVAL, None)
        else:
            self._at(0.0, ARRIVAL, None)
        now = 0.0
        while self.events:
            now, _, kind, what = heappop(self.events)
            if kind == ARRIVAL:
                self._arrive(now)
            elif kind == DONE:
                self._done(now, *what)  # type: ignore[misc]
            elif kind == GIVE_UP:
                self._give_up(now, what)  # type: ignore[arg-type]
            elif now >= self.wake:
                self.wake = math.inf
            self._poll(now)
        self._check_end()
        return self.count.summary(now)

    def _at(self, when: float, kind: int, what: object) -> None:
        self.number += 1
        heappush(self.events, (when, self.number, kind, what))

    # ---- in

    def _arrive(self, now: float) -> None:
        scenario, random = self.scenario, self.random
        for _ in range(1 if scenario.clients else scenario.burst):
            if self.sent < self.requests:
                self._send(now)
        if not scenario.clients and self.sent < self.requests:
            rate = self.rate * scenario.load(now) / scenario.burst
            self._at(now + random.expovariate(rate), ARRIVAL, None)

    def _send(self, now: float) -> None:
        scenario, random = self.scenario, self.random
        self.sent += 1
        shape = bisect_left(self.shares, random.random() * self.shares[-1]) if len(self.shares) > 1 else 0
        group: Hashable = ("once", self.sent) if scenario.strangers and random.random() < scenario.strangers else shape
        rows = random.randint(1, scenario.rows) if scenario.rows > 1 else 1
        first, self.sent_rows = self.sent_rows, self.sent_rows + rows
        job = Job(
            group=group,
            rows=rows,
            nbytes=1000,
            priority=bisect_left(self.weights, random.random() * self.weights[-1]) if len(self.weights) > 1 else 0,
            deadline=now + random.uniform(*scenario.deadlines) * (scenario.objective or 1.0) if scenario.deadlines else None,
            cost=scenario.shapes[shape].cost,
            payload=Sent(shape, self.sent > scenario.warm_up, range(first, self.sent_rows)),
        )
        refusal = self.batcher.submit(job, now)
        self.count.submitted(job, refusal, now)
        if refusal is not None:
            self._again(now, scenario.retry)
            return
        self.open.add(job)
        self.waiting_rows += job.rows
        assert self.waiting_rows <= scenario.queue_rows
        if scenario.gives_up and random.random() < scenario.gives_up:
            self._at(now + random.random() * (scenario.objective or 1.0), GIVE_UP, job)

    def _again(self, now: float, pause: float) -> None:
        """Schedule a client's next request."""
        if self.scenario.clients and self.sent < self.requests:
            self._at(now + 2 * self.random.random() * pause, ARRIVAL, None)

    def _give_up(self, now: float, job: Job) -> None:
        waited = job.waiting
        assert self.batcher.cancel(job) == waited
        assert not self.batcher.cancel(job)
        if waited:
            self.waiting_rows -= job.rows
            self._settle(job)
            self.count.cancelled(job)
            self._again(now, self.scenario.think)

    # ---- out

    def _poll(self, now: float) -> None:
        while True:
            step = self.batcher.poll(now)
            for job, refusal in step.dropped:
                assert refusal.kind == "late" and job.due < math.inf
                self.waiting_rows -= job.rows
                self._settle(job)
                self.count.dropped(job, now)
                self._again(now, self.scenario.retry)
            if step.batch is None:
                assert step.wake is None or step.wake > now
                if step.wake is not None and step.wake < self.wake:
                    self.wake = step.wake
                    self._at(step.wake, WAKE, None)
                return
            self._start(now, step.batch)

    def _start(self, now: float, batch: Batch) -> None:
        scenario, random, jobs = self.scenario, self.random, batch.jobs
        rows = sum(job.rows for job in jobs)
        assert jobs and rows == batch.rows <= scenario.max_rows
        assert all(job.group == batch.group for job in jobs)
        assert all(one.standing <= other.standing for one, other in pairwise(jobs))
        assert scenario.objective is None or now <= jobs[0].arrived + scenario.objective + 1e-9
        self.waiting_rows -= rows
        shape = scenario.shapes[jobs[0].payload.shape]
        seconds = shape.seconds(rows) * math.exp(random.gauss(0.0, scenario.sigma)) * scenario.slowness(now)
        if random.random() < scenario.hiccups:
            seconds *= scenario.hiccup
        failed = scenario.failures > 0 and random.random() < scenario.failures
        self.count.started(batch, seconds)
        # The engine returns each row unchanged, of the jobs that it got at the start.
        computed = list(chain.from_iterable(job.payload.rows for job in jobs))
        assert len(computed) == rows
        self._at(now + seconds, DONE, (batch, computed, seconds, failed))

    def _done(self, now: float, batch: Batch, computed: list[int], seconds: float, failed: bool) -> None:
        self.batcher.done(batch, now, None if failed else seconds)
        for job, answer in zip(batch.jobs, taken_apart(computed, batch.jobs), strict=True):
            self._settle(job)
            assert failed or answer == list(job.payload.rows), "a job is answered with rows that are not its own"
            self.count.answered(job, now, failed)
            self._again(now, self.scenario.think)

    def _settle(self, job: Job) -> None:
        assert job in self.open, "a job has two outcomes"
        self.open.remove(job)

    def _check_end(self) -> None:
        assert not self.open and self.sent == self.requests
        snapshot = self.batcher.snapshot()
        assert (snapshot.waiting_jobs, snapshot.waiting_rows, snapshot.waiting_bytes, snapshot.running_batches) == (0, 0, 0, 0)
        assert snapshot.waiting_groups == 0 and snapshot.backlog_s == 0.0
        assert snapshot.admitted == snapshot.finished + snapshot.dropped + snapshot.cancelled
        assert snapshot.admitted + sum(snapshot.refused.values()) == self.requests
        assert len(self.latencies) <= GROUPS and len(self.batcher._queue.groups) <= REMEMBERED_GROUPS + self.scenario.workers
        assert not self.batcher._queue.active


class _Count:
    """Collects the summary."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.began = math.nan
        self.refused: dict[str, int] = {}
        self.counts = dict.fromkeys(("dropped", "cancelled", "failed", "late"), 0)
        self.latencies: list[float] = []
        self.batches = self.rows = 0
        self.busy = self.work = self.late_after = 0.0
        priorities, shapes = len(scenario.priorities), len(scenario.shapes)
        self.sent, self.admitted, self.inside = [0] * priorities, [0] * priorities, [0] * priorities
        self.lost = [0] * priorities  # cancelled or failed: neither inside nor not
        self.shapes = [[0, 0] for _ in range(shapes)]

    def submitted(self, job: Job, refusal: Refusal | None, now: float) -> None:
        shape, counts, _ = job.payload
        if refusal is not None:
            self.late_after = now
        if not counts:
            return
        if math.isnan(self.began):
            self.began = now
        self.sent[job.priority] += 1
        self.shapes[shape][0] += 1
        if refusal is None:
            self.admitted[job.priority] += 1
            self.shapes[shape][1] += 1
        else:
            self.refused[refusal.kind] = self.refused.get(refusal.kind, 0) + 1

    def dropped(self, job: Job, now: float) -> None:
        self.late_after = now
        self.counts["dropped"] += job.payload.counts

    def cancelled(self, job: Job) -> None:
        if job.payload.counts:
            self.counts["cancelled"] += 1
            self.lost[job.priority] += 1

    def started(self, batch: Batch, seconds: float) -> None:
        if batch.jobs[0].payload.counts:
            self.batches += 1
            self.rows += batch.rows
            self.busy += seconds

    def answered(self, job: Job, now: float, failed: bool) -> None:
        shape, counts, _ = job.payload
        if now > job.due:
            self.late_after = now
        if not counts:
            return
        if failed:
            self.counts["failed"] += 1
            self.lost[job.priority] += 1
            return
        self.latencies.append(now - job.arrived)
        if now > job.due:
            self.counts["late"] += 1
            return
        self.inside[job.priority] += 1
        self.work += self.scenario.shapes[shape].seconds(self.scenario.max_rows) / self.scenario.max_rows * job.rows

    def summary(self, now: float) -> Summary:
        latencies = sorted(self.latencies) or [math.nan]
        took = now - self.began
        admitted = [count - lost for count, lost in zip(self.admitted, self.lost, strict=True)]
        return Summary(
            requests=sum(self.sent),
            refused=self.refused,
            dropped=self.counts["dropped"],
            cancelled=self.counts["cancelled"],
            failed=self.counts["failed"],
            answered=len(self.latencies),
            late=self.counts["late"],
            inside=sum(self.inside) / max(1, sum(admitted)),
            goodput=self.work / took / self.scenario.workers,
            batch_rows=self.rows / max(1, self.batches),
            busy=self.busy / took / self.scenario.workers,
            p50=latencies[len(latencies) // 2],
            p99=latencies[int(0.99 * len(latencies))],
            p999=latencies[int(0.999 * len(latencies))],
            by_priority=tuple(
                (all_admitted / max(1, sent), inside / max(1, kept))
                for sent, all_admitted, kept, inside in zip(self.sent, self.admitted, admitted, self.inside, strict=True)
            ),
            by_shape=tuple(admitted / max(1, sent) for sent, admitted in self.shapes),
            ended=now,
            late_after=self.late_after,
        )
