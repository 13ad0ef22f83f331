"""Simulated time on one core: an event loop reads requests and writes answers there, and an engine computes on it, too.

`simulation.py` has an engine that nothing disturbs. Here reading a request costs time, and a batch takes longer while requests arrive. The
loop does its tasks in order. The batcher and the latency model are the real ones.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.latency_model import LatencyModel

READ, WRITE = range(2)
"""Tasks of the loop: reading a request, which may be refused then, and writing an answer."""


@dataclass(frozen=True, kw_only=True)
class OneCore:
    """Seconds of the core: for a batch of n rows `fixed` + `each` * n, for reading a request, for writing an answer.

    `rate`: Poisson arrivals per second, of one row each. `share`: share of the core that the loop gets while both want it. `warm_up`:
    requests that do not count. The other fields are those of `simulation.Scenario`.
    """

    rate: float
    fixed: float = 0.000215
    each: float = 0.000357
    read: float = 0.0001
    write: float = 0.00007
    share: float = 0.5
    sigma: float = 0.05
    max_rows: int = 16
    objective: float = 0.01
    warm_up: int = 1500

    def ceiling(self, rows: int) -> float:
        """Answers per second with batches of so many rows, if every request is read; at most `rate`."""
        left = 1 - self.rate * self.read
        return min(self.rate, left / (self.write + self.each + self.fixed / rows))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """After the warm-up: answers in time per second, their share of the admitted requests, and the mean rows of a batch."""

    goodput: float
    inside: float
    batch_rows: float


def play(requests: int, *, seed: int, scene: OneCore) -> Outcome:
    """Play until so many requests have arrived and all have an outcome."""
    return _OneCore(requests, seed, scene).run()


class _OneCore:
    def __init__(self, requests: int, seed: int, scene: OneCore) -> None:
        self.requests, self.scene = requests, scene
        self.random = random.Random(seed)  # noqa: S311 - no secret
        self.batcher = Batcher(LatencyModel(), objective=scene.objective, max_rows=scene.max_rows, queue_rows=10_000, queue_bytes=1 << 30)
        self.now = 0.0
        self.sent = 0
        self.next = self.random.expovariate(scene.rate)
        self.loop: deque[tuple[int, object, float]] = deque()
        """Waiting tasks: kind, argument, seconds."""
        self.task: tuple[int, object] | None = None
        self.task_left = 0.0
        self.batch: Batch | None = None
        self.batch_left = self.started = 0.0
        self.wake = math.inf
        self.began = math.nan
        self.admitted = self.inside = self.batches = self.rows = 0

    def run(self) -> Outcome:
        while self.sent < self.requests or self.loop or self.task or self.batch or self.batcher.waiting:
            if self.task is None and self.loop:
                self._begin()
            loop, engine = self._speeds()
            arrival = self.next if self.sent < self.requests else math.inf
            task = self.now + self.task_left / loop if loop else math.inf
            batch = self.now + self.batch_left / engine if engine else math.inf
            wake = math.inf if self.batch else max(self.now, self.wake)
            until = min(arrival, task, batch, wake)
            assert until < math.inf, "nothing is running, and a request has no outcome"
            self.task_left -= (until - self.now) * loop
            self.batch_left -= (until - self.now) * engine
            self.now = until
            if until == arrival:
                self._arrive()
            elif until == task:
                self._answer()
            elif until == batch:
                self._done()
            else:
                self._poll()
        took = self.now - self.began
        return Outcome(goodput=self.inside / took, inside=self.inside / max(1, self.admitted), batch_rows=self.rows / max(1, self.batches))

    def _speeds(self) -> tuple[float, float]:
        """Shares of the core that the loop and the engine get."""
        if self.task is None or self.batch is None:
            return float(self.task is not None), float(self.batch is not None)
        return self.scene.share, 1 - self.scene.share

    def _arrive(self) -> None:
        self.sent += 1
        if self.sent == self.scene.warm_up:
            self.began = self.now
        self.loop.append((READ, (self.now, self.sent > self.scene.warm_up), self.scene.read))
        self.next = self.now + self.random.expovariate(self.scene.rate)

    def _begin(self) -> None:
        kind, argument, self.task_left = self.loop.popleft()
        self.task = kind, argument

    def _done(self) -> None:
        assert self.batch is not None
        batch, self.batch = self.batch, None
        self.batcher.done(batch, self.now, self.now - self.started)
        self.loop.extend((WRITE, (job, self.now), self.scene.write) for job in batch.jobs)
        self._poll()

    def _answer(self) -> None:
        """End the loop's task."""
        assert self.task is not None
        (kind, argument), self.task = self.task, None
        if kind == READ:
            self._submit(*argument)  # type: ignore[misc]
        else:
            job, computed = argument  # type: ignore[misc]
            self.batcher.delivered(self.now - computed, self.now)
            arrived, counts = job.payload
            self.admitted += counts
            self.inside += counts and self.now - arrived <= self.scene.objective

    def _submit(self, arrived: float, counts: bool) -> None:
        job = Job(group="", nbytes=1000, payload=(arrived, counts), arrived=arrived)
        if self.batcher.submit(job, self.now) is None:
            self._poll()

    def _poll(self) -> None:
        self.wake = math.inf
        while self.batch is None:
            step = self.batcher.poll(self.now)
            self.admitted += sum(job.payload[1] for job, _ in step.dropped)
            if step.batch is not None:
                self.batch, self.started = step.batch, self.now
                self.batch_left = (self.scene.fixed + self.scene.each * step.batch.rows) * math.exp(self.random.gauss(0, self.scene.sigma))
                if step.batch.jobs[0].payload[1]:
                    self.batches += 1
                    self.rows += step.batch.rows
            elif not step.dropped:
                self.wake = math.inf if step.wake is None else step.wake
                return
