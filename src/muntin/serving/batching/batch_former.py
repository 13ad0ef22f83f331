"""Choose the jobs that a free worker computes next, or have it wait for more.

**Batches.** A free worker takes the group whose head has the smallest standing, and of it, in order, as many rows as are worth a batch
(`BatchSizes`), while the batch by its safe latency still ends before the earliest due time in it, and leaves the first job of each other
group its time where possible. A less urgent job that would make the batch smaller is skipped.

**Waiting.** A batch starts at once unless waiting pays: no other group waits; rows arrive faster than 0.8 times the throughput of batches
of the present size; a larger one has a higher throughput; and fewer rows wait than were recently outstanding at once (c clients that each
await their answer never have more than c). Then it waits for the smallest size that keeps up with the arrivals, but no longer than the
fixed part of a batch, which is what sharing saves, nor than two mean gaps without an arrival, nor past the latest safe moment.
"""

from __future__ import annotations

import math

from muntin.serving.batching.job import Batch
from muntin.serving.batching.latency_model import LatencyLine
from muntin.serving.batching.queues import GroupQueue, JobQueue, by_standing

LOAD = 0.8
"""Share of an engine's throughput up to which arrivals do not call for larger batches."""
MIN_GAIN = 1.05
"""Least ratio of throughputs that counts as a gain."""
_GROWTH = 2  # largest ratio of a batch's rows to the rows of the largest batch measured
_SHARE, _FLOOD_SHARE = 0.5, 0.6  # of an objective: largest time of a batch, normally and in a flood
_FLOOD = 2  # times the throughput of full batches: arrivals of which most are refused


def sustaining_rows(latency: LatencyLine, rate: float, engines: float, max_rows: int) -> int:
    """Smallest batch with which `LOAD` of so many engines keep up with `rate` rows per second, at most `max_rows`."""
    spare = engines * LOAD - rate * latency.per_row
    if spare <= 0:
        return max_rows
    return max(1, min(max_rows, math.ceil(rate * max(latency.fixed, latency.minimum) / spare)))


def worthwhile_rows(latency: LatencyLine, sustaining: int, max_rows: int, reach: int) -> int:
    """Rows of the largest batch that pays, if so many wait. `reach`: rows of the largest batch that keeps the objective.

    All rows, where the fixed part of a batch outweighs a row: every answer comes sooner. One, where larger batches have no higher
    throughput. In between a batch delays its first rows for its last ones: as many as the arrivals call for.

    Only sizes measured often (`LatencyLine.firm_rows`) prove that larger batches gain nothing: a line through single rows and a few pairs
    is mostly noise at sixteen rows, and an engine that computes single rows only never learns otherwise.
    """
    if latency.minimum or latency.fixed >= latency.per_row:
        return max_rows
    gains = (latency.fixed + latency.per_row) * max_rows >= MIN_GAIN * (latency.fixed + latency.per_row * max_rows)
    return sustaining if gains or min(sustaining, reach) > _GROWTH * latency.firm_rows else 1


class BatchSizes:
    """Rows that a batch of a group should have, of at most `max_rows`."""

    def __init__(self, queue: JobQueue, max_rows: int) -> None:
        self._queue, self._objective, self._max_rows = queue, queue.objective, max_rows

    def largest(self, group: GroupQueue, now: float) -> int:
        """Rows of the largest batch to form now. It grows in steps from the largest one measured: no promise is a far extrapolation."""
        if not group.known:
            return 1
        reach = group.latency.rows_within(self.batch_seconds(group, math.inf, now))
        rows = worthwhile_rows(group.latency, self._sustaining(group, now), self._most(group), reach)
        return min(rows, _GROWTH * group.latency.largest_rows)

    def target(self, group: GroupQueue, seconds: float, now: float) -> int:
        """Rows of a worthwhile batch that the arrivals call for and that takes at most so many seconds; at least 1."""
        sustaining, reach = self._sustaining(group, now), group.latency.rows_within(seconds)
        return max(1, min(worthwhile_rows(group.latency, sustaining, self._most(group), reach), sustaining, reach))

    def batch_seconds(self, group: GroupQueue, without_objective: float, now: float) -> float:
        """Largest time of a batch: two batches in a row keep the objective, since a job may arrive when a batch has just begun.

        It is longer in a flood: most requests are refused then, such as those that arrive early in a batch. `without_objective`: time
        that the share is taken of where there is no objective.
        """
        most = self._most(group)
        flood = group.arrivals.per_second(now) * group.latency.expected(most) > _FLOOD * self._queue.workers * most
        return (without_objective if self._objective is None else self._objective) * (_FLOOD_SHARE if flood else _SHARE)

    def _sustaining(self, group: GroupQueue, now: float) -> int:
        used_by_others = self._queue.busy.per_second(now) - group.busy.per_second(now)
        engines = max(0.0, self._queue.workers - used_by_others)
        return sustaining_rows(group.latency, group.arrivals.per_second(now), engines, self._most(group))

    def _most(self, group: GroupQueue) -> int:
        return 1 if group.alone else self._max_rows


class BatchFormer:
    """Forms the batches of a queue."""

    def __init__(self, queue: JobQueue, sizes: BatchSizes) -> None:
        self._queue, self._sizes, self._objective = queue, sizes, queue.objective

    def next(self, now: float, *, wait: bool) -> Batch | float | None:
        """Start the next batch, or return the time until which a worker waits for more rows; None: nothing can start.

        `wait`: False if it may not wait.
        """
        queue = self._queue
        if not queue.active or len(queue.running) == queue.workers:
            return None
        group = min(queue.active.values(), key=by_standing)
        queue.set_batch_rows(group, self._sizes.largest(group, now))
        indices, rows, due = self._choose(group, now)
        if wait and len(queue.active) == 1 and len(indices) == len(group.jobs) and (until := self._wait_until(group, rows, due, now)) > now:
            return until
        return queue.start(group, indices, now)

    def _choose(self, group: GroupQueue, now: float) -> tuple[list[int], int, float]:
        """Indices of the group's jobs that make a batch, their rows, and the latest end of the batch."""
        latency, earliest = group.latency, now + self._queue.overhead(now)
        due = self._due_for_others(group, now)
        limit = min(group.batch_rows, latency.rows_within(due - earliest))
        urgent = group.head.priority
        indices: list[int] = []
        rows = 0
        for index, (_, _, job) in enumerate(group.jobs):
            allowed = limit if job.due >= due else min(limit, latency.rows_within(job.due - earliest))
            shrinks = job.priority > urgent and allowed < min(limit, group.rows)
            if indices and (rows + job.rows > allowed or shrinks):
                if job.priority <= urgent or allowed == limit:
                    break
                continue
            limit, due = allowed, min(due, job.due)
            rows += job.rows
            indices.append(index)
            if rows >= limit:
                break
        return indices, rows, due

    def _due_for_others(self, group: GroupQueue, now: float) -> float:
        """Latest end of a batch of this group that lets the first job of each other group be in time, where it can be."""
        queue = self._queue
        if len(queue.active) == 1 or len(queue.running) + 1 < queue.workers:
            return math.inf
        next_free = min((run.remaining(now) for run in queue.running), default=math.inf)
        shortest, latest, ahead = group.latency.safe(group.head.rows), math.inf, 0.0
        for other in sorted(queue.active.values(), key=by_standing):
            if other is group:
                continue
            rows = min(other.rows, other.batch_rows)
            seconds = other.head.due - now - self._queue.overhead(now) - ahead - other.latency.safe(rows)
            if shortest <= seconds < next_free:  # otherwise it is late anyway, or another worker takes it
                latest = min(latest, now + seconds)
            ahead += other.latency.expected(rows)
        return latest

    def _wait_until(self, group: GroupQueue, rows: int, due: float, now: float) -> float:
        """Time until which waiting for more than these rows, all that wait, pays; not after `now`: it does not."""
        latency, arrivals = group.latency, group.arrivals
        busy = arrivals.per_second(now) * latency.expected(rows) >= LOAD * rows
        if not (group.known and busy and rows < group.peak_rows.value(now) - 0.5):
            return now
        target = self._sizes.target(group, (due - now if self._objective is None else self._objective) / 2, now)
        gains = latency.minimum or target * latency.expected(rows) >= MIN_GAIN * rows * latency.expected(target)
        if rows >= target or not gains:
            return now
        if group.waiting_since is None:
            group.waiting_since = now
        mean_gap = 1 / arrivals.per_second(arrivals.updated_at)
        saved = latency.fixed or latency.minimum / 4  # with one size measured the fixed part is unknown
        return min(
            due - self._queue.overhead(now) - latency.safe(rows),
            group.waiting_since + saved,
            max(group.waiting_since, arrivals.updated_at) + 2 * mean_gap,
        )
