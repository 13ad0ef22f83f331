"""The state of the batcher: jobs that wait, by group, and batches that run. It decides nothing."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable
from operator import attrgetter

from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.latency_model import UNKNOWN, LatencyLine, LatencyModel

MEMORY_S = 1.0
"""Time constant of rates and peaks, seconds: they decay by a factor e in each."""
_NO_TICKET = 1 << 62
_MAX_OVERHEAD, _MAX_OVERHEAD_S = 0.3, 0.01  # largest overhead: share of the objective, or seconds without one
REMEMBERED_GROUPS = 256
"""Number of groups without waiting or running jobs that are remembered."""
by_standing = attrgetter("standing")


class _Decaying:
    """A value that decays with the time constant `MEMORY_S`."""

    def __init__(self) -> None:
        self._value, self.updated_at = 0.0, 0.0

    def value(self, now: float) -> float:
        return self._value * math.exp((self.updated_at - now) / MEMORY_S) if self._value else 0.0


class Rate(_Decaying):
    """Amount per second, averaged over about the last `MEMORY_S` seconds."""

    def add(self, amount: float, now: float) -> None:
        self._value, self.updated_at = self.value(now) + amount, now

    def per_second(self, now: float) -> float:
        return self.value(now) / MEMORY_S


class Peak(_Decaying):
    """Highest recent value."""

    def raise_to(self, value: float, now: float) -> None:
        if value >= self.value(now):
            self._value, self.updated_at = value, now


class GroupQueue:
    """Waiting jobs of one group, in a sorted list: inserting among thousands moves a few kilobytes of pointers."""

    def __init__(self, group: Hashable) -> None:
        self.group = group
        self.cost: float | None = None
        self.alone = False
        """True if each job is computed alone."""
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
        """True if promises can rest on the latency. One batch is not enough: a first call may have compiled."""
        return self.latency.batch_count >= 2

    @property
    def head(self) -> Job:
        return self.jobs[0][2]

    @property
    def standing(self) -> tuple[float, int]:
        """Standing and ticket of the head: the sort key of groups."""
        return self.jobs[0][:2]

    def insert(self, job: Job) -> None:
        insort(self.jobs, (job.standing, job.ticket, job))
        self.rows += job.rows

    def take(self, indices: list[int]) -> tuple[Job, ...]:
        """Remove the jobs at these ascending indices."""
        taken = tuple(self.jobs[index][2] for index in indices)
        for index in reversed(indices):
            del self.jobs[index]
        self.rows -= sum(job.rows for job in taken)
        return taken

    def index(self, job: Job) -> int:
        """Index of a waiting job, or the index that a job without a ticket would get."""
        return bisect_left(self.jobs, (job.standing, job.ticket or _NO_TICKET))

    def fitting(self, first: int, rows: int) -> tuple[int, int]:
        """Index after the last job, from `first` on, that fits into so many rows, and the rows of these jobs. The first job always fits."""
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


class RunningBatch:
    """A batch that is being computed."""

    def __init__(self, batch: Batch, group: GroupQueue, now: float) -> None:
        self.batch, self.group, self.started = batch, group, now
        self.expected, self.safe = group.latency.expected(batch.rows), group.latency.safe(batch.rows)

    def remaining(self, now: float) -> float:
        """Seconds that it still takes. Beyond its safe time it is a hiccup, and may take as long again as it has taken."""
        elapsed = now - self.started
        return max(0.0, self.expected - elapsed) if elapsed <= self.safe else elapsed

    def end(self, now: float) -> tuple[float, float]:
        """Time of its end, and the variance of that."""
        remaining = self.remaining(now)
        return now + remaining, min(remaining, self.safe - self.expected) ** 2


class JobQueue:
    """Waiting jobs and running batches of `workers` engines. `objective`, `margin`: see `Batcher`."""

    def __init__(self, latencies: LatencyModel, workers: int, *, objective: float | None, margin: float) -> None:
        self.workers, self.objective, self._margin = workers, objective, margin
        self._overhead = Peak()
        self.groups: OrderedDict[Hashable, GroupQueue] = OrderedDict()
        """Least recently used first."""
        self.active: dict[Hashable, GroupQueue] = {}
        """Groups with waiting jobs."""
        self.running: list[RunningBatch] = []
        self.job_count = self.rows = self.nbytes = 0
        """Sums over the waiting jobs."""
        self.backlog = 0.0
        """Seconds of engine time for the waiting jobs."""
        self.last_standing = -math.inf
        """No waiting job stands behind this."""
        self.busy = Rate()
        """Seconds of engine time used."""
        self.changes = 0
        """Counts every change of what waits or runs."""
        self.latencies = latencies

    @property
    def wait_s(self) -> float:
        """Seconds that the waiting jobs keep the workers busy."""
        return self.backlog / self.workers

    def overhead(self, now: float) -> float:
        """Seconds that an answer takes beyond the engine. Promises include them."""
        return max(self._margin, self._overhead.value(now))

    def delivered(self, seconds: float, now: float) -> None:
        """Learn the overhead of an answer that was sent, bounded so that a very slow one does not close the server."""
        self._overhead.raise_to(min(seconds, _MAX_OVERHEAD * self.objective if self.objective else _MAX_OVERHEAD_S), now)

    def group_of(self, job: Job) -> GroupQueue:
        """The job's group, created if it is new. The latency of a group that never ran is looked up each time."""
        group = self.groups.get(job.group)
        if group is None:
            group = self.groups[job.group] = GroupQueue(job.group)
            if len(self.groups) > REMEMBERED_GROUPS:
                idle = (name for name, other in self.groups.items() if not other.outstanding_rows and other is not group)
                self.groups.pop(next(idle, None), None)
        else:
            self.groups.move_to_end(job.group)
        if job.cost is not None:
            group.cost = job.cost
        group.alone = job.alone
        if group.last_batch_at == -math.inf:
            self._update_latency(group)
        return group

    def _update_latency(self, group: GroupQueue) -> None:
        latency = self.latencies.line(group.group, cost=group.cost) or UNKNOWN
        if latency != group.latency:
            group.latency = latency
            self._update_backlog(group)

    def _update_backlog(self, group: GroupQueue) -> None:
        self.changes += 1
        self.backlog -= group.backlog
        group.backlog = group.seconds_for(group.rows)
        self.backlog = max(self.backlog + group.backlog, 0.0) if self.job_count else 0.0  # an empty queue keeps no rounding error

    def set_batch_rows(self, group: GroupQueue, rows: int) -> None:
        if rows != group.batch_rows:
            group.batch_rows = rows
            self._update_backlog(group)

    def add(self, job: Job, group: GroupQueue, now: float) -> None:
        job.waiting = True
        self.active[group.group] = group
        group.insert(job)
        self.last_standing = max(self.last_standing, job.standing)
        self.job_count += 1
        self.rows += job.rows
        self.nbytes += job.nbytes
        self._update_backlog(group)
        group.outstanding_rows += job.rows
        group.peak_rows.raise_to(group.outstanding_rows, now)

    def remove(self, job: Job) -> None:
        """Remove a waiting job that will not be computed."""
        group = self.groups[job.group]
        self._take(group, [group.index(job)])
        group.outstanding_rows -= job.rows

    def start(self, group: GroupQueue, indices: list[int], now: float) -> Batch:
        """Make a batch of a group's jobs at these ascending indices, and count it as running."""
        jobs = self._take(group, indices)
        rows = sum(job.rows for job in jobs)
        batch = Batch(jobs, group.group, rows, group.latency.overdue(rows))
        group.waiting_since, group.last_batch_at = None, now
        self.running.append(RunningBatch(batch, group, now))
        return batch

    def finish(self, batch: Batch, now: float, seconds: float | None) -> GroupQueue:
        """Count a batch as done; learn its engine time unless it is None."""
        run = next(run for run in self.running if run.batch is batch)
        self.running.remove(run)
        self.changes += 1
        run.group.outstanding_rows -= batch.rows
        run.group.busy.add(now - run.started, now)
        self.busy.add(now - run.started, now)
        if seconds is not None:
            self.latencies.observe(batch.group, batch.rows, seconds, cost=run.group.cost)
            self._update_latency(run.group)
        return run.group

    def jobs(self) -> list[Job]:
        """All waiting jobs."""
        return [job for group in self.active.values() for _, _, job in group.jobs]

    def _take(self, group: GroupQueue, indices: list[int]) -> tuple[Job, ...]:
        jobs = group.take(indices)
        for job in jobs:
            job.waiting = False
            self.rows -= job.rows
            self.nbytes -= job.nbytes
        self.job_count -= len(jobs)
        self._update_backlog(group)
        if not group.jobs:
            del self.active[group.group]
        if not self.job_count:
            self.last_standing = -math.inf
        return jobs
