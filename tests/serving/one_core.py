"""Simulated time on one core: an event loop reads requests and writes answers there, and an engine computes on it, too.

`simulation.py` has an engine that nothing disturbs. Here a refusal costs something, and a batch takes longer while requests come: at a
flood that is most of what happens to it. The loop takes what comes in order. The batcher, the model of its latencies and the turnstile
are the real ones.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from muntin.serving.batcher import Batch, Batcher, Job
from muntin.serving.latency import LatencyModel
from muntin.serving.turnstile import Turnstile

READ, WRITE, NO = range(3)
"""What the loop does: takes a request in, gives an answer, or says no unread."""


@dataclass(frozen=True, kw_only=True)
class OneCore:
    """Seconds of the core: of a batch of n rows `fixed` + `each` * n, of reading a request, of writing an answer, of refusing one unread.

    `rate`: Poisson arrivals a second, of one row each. `share`: of the core that the loop gets while both want it. `warm_up`: requests that
    do not count. The rest as in `simulation.Scenario`.
    """

    rate: float
    fixed: float = 0.000215
    each: float = 0.000357
    read: float = 0.0001
    write: float = 0.00007
    unread: float = 0.00003
    share: float = 0.5
    sigma: float = 0.05
    max_rows: int = 16
    objective: float = 0.01
    warm_up: int = 1500

    def ceiling(self, rows: int) -> float:
        """Answers a second with batches of so many rows, if everything else is refused unread; no more than come."""
        left = 1 - self.rate * self.unread
        return min(self.rate, left / (self.read - self.unread + self.write + self.each + self.fixed / rows))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """After the warm-up: answers in time a second, the share of the admitted that were, and the rows of a batch."""

    goodput: float
    inside: float
    batch_rows: float


def play(requests: int, *, seed: int, scene: OneCore) -> Outcome:
    """Plays until so many requests have come and all have an outcome."""
    return _OneCore(requests, seed, scene).run()


class _OneCore:
    def __init__(self, requests: int, seed: int, scene: OneCore) -> None:
        self.requests, self.scene = requests, scene
        self.random = random.Random(seed)  # noqa: S311 - no secret
        self.batcher = Batcher(LatencyModel(), objective=scene.objective, max_rows=scene.max_rows, queue_rows=10_000, queue_bytes=1 << 30)
        self.turnstile = Turnstile()
        self.now = 0.0
        self.sent = 0
        self.next = self.random.expovariate(scene.rate)
        self.loop: deque[tuple[int, object, float]] = deque()
        """What it does next: kind, what with, seconds."""
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
            assert until < math.inf, "nothing is under way, and something has no outcome"
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
        """Of the loop and of the engine: how much of the core each gets."""
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
        kind, what, self.task_left = self.loop.popleft()
        if kind == READ:
            came, _ = what  # type: ignore[misc]
            old = self.now - came >= self.scene.objective  # as `Service.refusal` has it
            if old:
                self.turnstile.turn_away("", came)
            if old or self.turnstile.refused("", came):
                kind, self.task_left = NO, self.scene.unread
        self.task = kind, what

    def _done(self) -> None:
        assert self.batch is not None
        batch, self.batch = self.batch, None
        self.batcher.done(batch, self.now, self.now - self.started)
        self.turnstile.open()
        self.loop.extend((WRITE, (job, batch, self.now), self.scene.write) for job in batch.jobs)
        self._poll()

    def _answer(self) -> None:
        """The loop's task is done."""
        assert self.task is not None
        (kind, what), self.task = self.task, None
        if kind == READ:
            self._submit(*what)  # type: ignore[misc]
        elif kind == WRITE:
            job, batch, computed = what  # type: ignore[misc]
            self.batcher.delivered(id(batch), self.now - computed)
            came, counts = job.payload
            self.admitted += counts
            self.inside += counts and self.now - came <= self.scene.objective

    def _submit(self, came: float, counts: bool) -> None:
        job = Job(group="", nbytes=1000, payload=(came, counts), came=came, unseen=self.turnstile.unseen("", came))
        refusal = self.batcher.submit(job, self.now)
        if refusal is not None:
            if refusal.holds:
                self.turnstile.shut("", came + refusal.holds, came + (refusal.retry_after or 0.0))
            return
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
