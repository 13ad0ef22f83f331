"""The batches that will be formed of the waiting jobs, one after the other: when a job would be answered.

Each worker becomes free after its running batch. Then the group whose head has the smallest standing goes; its batch has the rows that the
batcher would give it, takes its learned time, and frees the worker again. Each time has a variance, to which the spread of every earlier
batch adds. Times are absolute, so a forecast stays valid until the queue changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

from muntin.serving.batching.job import Job
from muntin.serving.batching.queues import GroupQueue

DEPTH = 16
"""Number of batches that are planned one by one; later ones are assumed to be like them."""
_START_DEVIATIONS = 0.5  # standard deviations of a batch's start that are subtracted from its time


class PlannedBatch(NamedTuple):
    """A batch to come: jobs `first` to `following` of a group; `head` is the first. It has room for `limit` rows."""

    group: GroupQueue
    head: Job
    first: int
    following: int
    rows: int
    limit: int
    start: float
    variance: float
    finish: float
    """Expected end plus its standard deviation."""


class Place(NamedTuple):
    """Place of a new job: its batch has `rows` with it and begins at `start`. Batches from index `behind` on begin `delay` later."""

    behind: int
    rows: int
    start: float
    variance: float
    delay: float


class Forecast:
    """Plan for the groups with waiting jobs.

    `free`: when each worker becomes free, with the variance. `margin`: seconds that an answer takes beyond the engine. `backlog`: seconds
    of engine time that wait.
    """

    def __init__(self, groups: Iterable[GroupQueue], free: list[tuple[float, float]], *, margin: float, backlog: float) -> None:
        self._margin = margin
        self.batches: list[PlannedBatch] = []
        waiting = [(*group.standing, group, 0) for group in groups]
        heapify(waiting)
        free = free.copy()
        heapify(free)
        ideal = planned = 0.0  # seconds for the planned jobs: in batches as large as allowed, and as planned
        while waiting and len(self.batches) < DEPTH:
            _, _, group, first = heappop(waiting)
            batch = self._plan(group, first, *free[0])
            self.batches.append(batch)
            seconds = group.latency.expected(batch.rows)
            ideal += group.backlog * batch.rows / group.rows
            planned += seconds
            heapreplace(free, (batch.start + seconds, batch.variance + (seconds * (group.latency.spread - 1)) ** 2))
            if batch.following < len(group.jobs):
                standing, ticket, _ = group.jobs[batch.following]
                heappush(waiting, (standing, ticket, group, batch.following))
        self.end, self.variance = free[0]
        if waiting and ideal:
            self.end += max(0.0, backlog - ideal) * max(1.0, planned / ideal) / len(free)

    def _plan(self, group: GroupQueue, first: int, start: float, variance: float) -> PlannedBatch:
        latency, head = group.latency, group.jobs[first][2]
        in_time = latency.rows_within(head.due - self._margin - start - _START_DEVIATIONS * math.sqrt(variance))
        limit = max(head.rows, min(group.batch_rows, in_time))
        following, rows = group.fitting(first, limit)
        seconds = latency.expected(rows)
        finish = start + seconds + math.sqrt(variance + (seconds * (latency.spread - 1)) ** 2)
        return PlannedBatch(group, head, first, following, rows, limit, start, variance, finish)

    def place(self, job: Job, group: GroupQueue) -> Place:
        """Place that a new job of this group would get."""
        latency, index, overtaken = group.latency, group.index(job), len(self.batches)
        for number, batch in enumerate(self.batches):
            if overtaken > number and batch.head.standing > job.standing:
                overtaken = number
            if batch.group is not group:
                continue
            fits = batch.rows + job.rows <= batch.limit
            if index < batch.following or (index == batch.following and fits):
                # In a full batch the last jobs make room. As the head of its batch, the job may start earlier.
                earlier = min(number, overtaken)
                start = self.batches[earlier]
                delay = latency.expected(batch.rows + job.rows) - latency.expected(batch.rows)
                rows = batch.rows + job.rows if fits else max(batch.limit, job.rows)
                return Place(earlier if earlier < number else number + 1, rows, start.start, start.variance, delay)
        if overtaken < len(self.batches):
            next_batch = self.batches[overtaken]
            return Place(overtaken, job.rows, next_batch.start, next_batch.variance, latency.expected(job.rows))
        return Place(overtaken, job.rows, self.end, self.variance, 0.0)

    def lateness_caused(self, place: Place, priority: int) -> float:
        """Seconds by which the job would make a batch of its own or a more urgent priority late that is in time now; 0: none."""
        for batch in self.batches[place.behind :]:
            due = batch.head.due - self._margin
            if batch.finish <= due < batch.finish + place.delay and batch.head.priority <= priority:
                return batch.finish + place.delay - due
        return 0.0
