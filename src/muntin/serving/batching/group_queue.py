"""The waiting jobs of one group in order, with the group's recent rates and latencies."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable

from muntin.serving.batching.job import Job
from muntin.serving.batching.latency_model import UNKNOWN, LatencyLine

MEMORY_S = 1.0
"""Time constant of rates and peaks, seconds: they decay by a factor e in each."""
LOAD = 0.8
"""Share of an engine's throughput up to which arrivals do not call for larger batches."""
MIN_GAIN = 1.05
"""Least ratio of throughputs that counts as a gain."""
_GROWTH = 2  # largest ratio of a batch's rows to the rows of the largest batch measured
_NO_TICKET = 1 << 62


class Rate:
    """Amount per second, averaged over about the last `MEMORY_S` seconds."""

    def __init__(self) -> None:
        self._value, self.updated_at = 0.0, 0.0

    def add(self, amount: float, now: float) -> None:
        self._value = self._value * math.exp((self.updated_at - now) / MEMORY_S) + amount
        self.updated_at = now

    def per_second(self, now: float) -> float:
        return self._value * math.exp((self.updated_at - now) / MEMORY_S) / MEMORY_S if self._value else 0.0


class Peak:
    """Highest recent value; it decays as a rate does."""

    def __init__(self) -> None:
        self._value, self._updated_at = 0.0, 0.0

    def raise_to(self, value: float, now: float) -> None:
        if value >= self.value(now):
            self._value, self._updated_at = value, now

    def value(self, now: float) -> float:
        return self._value * math.exp((self._updated_at - now) / MEMORY_S) if self._value else 0.0


class GroupQueue:
    """Waiting jobs of one group, in a sorted list: inserting among thousands moves a few kilobytes of pointers."""

    def __init__(self, group: Hashable) -> None:
        self.group = group
        self.cost: float | None = None
        self.latency: LatencyLine = UNKNOWN
        self.batch_rows = 1
        """Rows of the largest batch that is formed at present."""
        self.jobs: list[tuple[float, int, Job]] = []
        """(standing, ticket, job), sorted."""
        self.rows = 0
        """Rows that wait."""
        self.backlog = 0.0
        """Seconds of engine time for the rows that wait."""
        self.outstanding_rows = 0
        """Rows that wait or run."""
        self.peak_rows = Peak()
        """Most outstanding rows of late."""
        self.arrivals = Rate()
        """Rows that arrive, including refused ones."""
        self.busy = Rate()
        """Seconds of engine time used."""
        self.last_batch_at = -math.inf
        self.kept_objective_at = -math.inf
        """When a batch last took no longer than the objective."""
        self.waiting_since: float | None = None
        """Since when a worker has been waiting for more rows."""

    @property
    def known(self) -> bool:
        """Whether promises can rest on the latency. One batch is not enough: a first call may have compiled."""
        return self.latency.batch_count >= 2

    @property
    def head(self) -> Job:
        return self.jobs[0][2]

    @property
    def standing(self) -> tuple[float, int]:
        """Standing and ticket of the head: the sort key of groups."""
        standing, ticket, _ = self.jobs[0]
        return standing, ticket

    def insert(self, job: Job) -> None:
        insort(self.jobs, (job.standing, job.ticket, job))
        self.rows += job.rows

    def take(self, indices: list[int]) -> tuple[Job, ...]:
        """Remove the jobs at these ascending indices."""
        taken = tuple(self.jobs[index][2] for index in indices)
        if indices[-1] == len(indices) - 1:
            del self.jobs[: len(indices)]
        else:
            for index in reversed(indices):
                del self.jobs[index]
        self.rows -= sum(job.rows for job in taken)
        return taken

    def index(self, job: Job) -> int:
        """Index of a waiting job, or the index that a job without a ticket would get."""
        return bisect_left(self.jobs, (job.standing, job.ticket or _NO_TICKET))

    def fitting(self, first: int, rows: int) -> tuple[int, int]:
        """Index after the last job, from `first` on, that fits into so many rows, and the rows of these jobs. The first job always fits."""
        if self.rows == len(self.jobs):
            count = min(rows, len(self.jobs) - first)
            return first + count, count
        total = 0
        for index in range(first, len(self.jobs)):
            job_rows = self.jobs[index][2].rows
            if total and total + job_rows > rows:
                return index, total
            total += job_rows
        return len(self.jobs), total

    def seconds_for(self, rows: int) -> float:
        """Seconds of engine time for so many rows, in batches of `batch_rows`."""
        full, rest = divmod(rows, self.batch_rows)
        return full * self.latency.expected(self.batch_rows) + (self.latency.expected(rest) if rest else 0.0)

    def sustaining_rows(self, engines: float, now: float, max_rows: int) -> int:
        """Smallest batch with which `LOAD` of so many engines keep up with the arrivals, at most `max_rows`."""
        latency, rate = self.latency, self.arrivals.per_second(now)
        spare = engines * LOAD - rate * latency.per_row
        if spare <= 0:
            return max_rows
        return max(1, min(max_rows, math.ceil(rate * max(latency.fixed, latency.minimum) / spare)))

    def worthwhile_rows(self, sustaining: int, max_rows: int, reach: int) -> int:
        """Rows of the largest batch that pays, if so many wait. `reach`: rows of the largest batch that keeps the objective.

        All rows, where the fixed part of a batch outweighs a row: every answer comes sooner. One, where larger batches have no higher
        throughput. In between a batch delays its first rows for its last ones: as many as the arrivals call for.

        That larger batches gain nothing is believed only of sizes measured often (`LatencyLine.firm_rows`): a line through single rows and
        a few pairs is mostly noise at sixteen rows, and an engine that computes single rows only never learns otherwise.
        """
        latency = self.latency
        if latency.minimum or latency.fixed >= latency.per_row:
            return max_rows
        gains = (latency.fixed + latency.per_row) * max_rows >= MIN_GAIN * (latency.fixed + latency.per_row * max_rows)
        return sustaining if gains or min(sustaining, reach) > _GROWTH * latency.firm_rows else 1

    def limited_growth(self, rows: int) -> int:
        """At most `rows`, growing in steps from the largest batch measured, so that no promise rests on a far extrapolation."""
        return min(rows, _GROWTH * self.latency.largest_rows) if self.known else 1
