"""When a job would be answered: the batches that will be formed of what waits, one after the other, as far as one knows now.

Each worker is free after what it computes. Then the batch goes whose head stands first; it has as many rows as the batcher would give it,
ends after its learned time, and its worker is free again. Each time comes with a variance, in which the spread of every batch before it
adds up. Times are the clock's, so a forecast holds until something happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from muntin.serving.job import Batch, Job
from muntin.serving.lane import Lane

DEPTH = 16
"""Batches that are foreseen one by one; what lies beyond is taken to go on like them."""
_DOUBT = 0.5  # standard deviations of a batch's start by which its size is foreseen smaller


class Run:
    """A batch that is being computed."""

    __slots__ = ("batch", "expected", "lane", "safe", "started")

    def __init__(self, batch: Batch, lane: Lane, now: float) -> None:
        self.batch, self.lane, self.started = batch, lane, now
        self.expected, self.safe = lane.line.expected(batch.rows), lane.line.safe(batch.rows)

    def left(self, now: float) -> float:
        """Seconds that it still takes. Beyond what is safe it is a hiccup, and may take as long again as it took."""
        gone = now - self.started
        return max(0.0, self.expected - gone) if gone <= self.safe else gone

    def free(self, now: float) -> tuple[float, float]:
        """When its worker is free, and the variance of that."""
        left = self.left(now)
        return now + left, min(left, self.safe - self.expected) ** 2


class Planned(NamedTuple):
    """A batch to come: jobs `first` to `following` of a lane, of which `head` is the first. It would admit up to `limit` rows."""

    lane: Lane
    head: Job
    first: int
    following: int
    rows: int
    limit: int
    start: float
    variance: float
    finish: float
    """With its deviation on top."""


class Place(NamedTuple):
    """Where a new job would come: its batch, with it, has `rows` and begins at `start`. Batches from `behind` on begin `delay` later."""

    behind: int
    rows: int
    start: float
    variance: float
    delay: float


class Forecast:
    """Made of the lanes in which jobs wait and of `free`: when each worker is, with the variance of that.

    `margin`: seconds that an answer takes beyond the engine. `backlog`: seconds of engine time that wait.
    """

    __slots__ = ("_margin", "batches", "end", "variance")

    def __init__(self, lanes: Iterable[Lane], free: list[tuple[float, float]], *, margin: float, backlog: float) -> None:
        self._margin = margin
        self.batches: list[Planned] = []
        waiting = [(*lane.standing, lane, 0) for lane in lanes]
        heapify(waiting)
        free = free.copy()
        heapify(free)
        ideal = spent = 0.0  # seconds for what is foreseen: in batches as large as they may be, and as they will be
        while waiting and len(self.batches) < DEPTH:
            _, _, lane, first = heappop(waiting)
            batch = self._next(lane, first, *free[0])
            self.batches.append(batch)
            seconds = lane.line.expected(batch.rows)
            ideal += lane.seconds * batch.rows / lane.rows
            spent += seconds
            heapreplace(free, (batch.start + seconds, batch.variance + (seconds * (lane.line.spread - 1)) ** 2))
            if batch.following < len(lane.jobs):
                standing, ticket, _ = lane.jobs[batch.following]
                heappush(waiting, (standing, ticket, lane, batch.following))
        self.end, self.variance = free[0]
        if waiting and ideal:
            self.end += max(0.0, backlog - ideal) * max(1.0, spent / ideal) / len(free)

    def _next(self, lane: Lane, first: int, start: float, variance: float) -> Planned:
        line, head = lane.line, lane.jobs[first][2]
        fitting = line.rows_within(head.due - self._margin - start - _DOUBT * math.sqrt(variance))
        limit = max(head.rows, min(lane.most, fitting))
        following, rows = lane.until(first, limit)
        seconds = line.expected(rows)
        finish = start + seconds + math.sqrt(variance + (seconds * (line.spread - 1)) ** 2)
        return Planned(lane, head, first, following, rows, limit, start, variance, finish)

    def place(self, job: Job, lane: Lane) -> Place:
        """Where a job of this lane would come."""
        line, index, overtaken = lane.line, lane.index(job), len(self.batches)
        for at, batch in enumerate(self.batches):
            if overtaken > at and batch.head.standing > job.standing:
                overtaken = at
            if batch.lane is not lane:
                continue
            fits = batch.rows + job.rows <= batch.limit
            if index < batch.following or (index == batch.following and fits):
                # Where the batch is full, its last jobs make room. Where the job becomes its head, it may go sooner.
                ahead = min(at, overtaken)
                begins = self.batches[ahead]
                delay = line.expected(batch.rows + job.rows) - line.expected(batch.rows)
                rows = batch.rows + job.rows if fits else max(batch.limit, job.rows)
                return Place(ahead if ahead < at else at + 1, rows, begins.start, begins.variance, delay)
        if overtaken < len(self.batches):
            before = self.batches[overtaken]
            return Place(overtaken, job.rows, before.start, before.variance, line.expected(job.rows))
        return Place(overtaken, job.rows, self.end, self.variance, 0.0)

    def harm(self, place: Place, priority: int) -> float:
        """By how many seconds a job of this priority would make late what was in time, of its own or a more urgent one; 0: not at all."""
        for batch in self.batches[place.behind :]:
            due = batch.head.due - self._margin
            if batch.finish <= due < batch.finish + place.delay and batch.head.priority <= priority:
                return batch.finish + place.delay - due
        return 0.0
