"""Which jobs a free worker computes next, and whether it waits for more.

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

from muntin.serving.batching.batch_sizes import BatchSizes
from muntin.serving.batching.group_queue import LOAD, MIN_GAIN, GroupQueue
from muntin.serving.batching.job import Batch
from muntin.serving.batching.job_queue import JobQueue, by_standing
from muntin.serving.batching.overhead import Overhead


class BatchFormer:
    """Forms the batches of a queue. `objective`: seconds, or None."""

    def __init__(self, queue: JobQueue, sizes: BatchSizes, overhead: Overhead, *, objective: float | None) -> None:
        self._queue, self._sizes, self._overhead, self._objective = queue, sizes, overhead, objective

    def next(self, now: float, *, wait: bool) -> Batch | float | None:
        """Start the next batch, or return the time until which a worker waits for more rows; None: nothing can start.

        `wait`: whether it may wait.
        """
        queue = self._queue
        if not queue.active or not queue.worker_free:
            return None
        group = next(iter(queue.active.values())) if len(queue.active) == 1 else min(queue.active.values(), key=by_standing)
        queue.set_batch_rows(group, self._sizes.largest(group, now))
        indices, rows, due = self._choose(group, now)
        if wait and len(queue.active) == 1 and len(indices) == len(group.jobs) and (until := self._wait_until(group, rows, due, now)) > now:
            return until
        return queue.start(group, indices, now)

    def _choose(self, group: GroupQueue, now: float) -> tuple[list[int], int, float]:
        """Indices of the group's jobs that make a batch, their rows, and the latest end of the batch."""
        latency, earliest = group.latency, now + self._overhead.seconds
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
            seconds = other.head.due - now - self._overhead.seconds - ahead - other.latency.safe(rows)
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
            due - self._overhead.seconds - latency.safe(rows),
            group.waiting_since + saved,
            max(group.waiting_since, arrivals.updated_at) + 2 * mean_gap,
        )
