"""The state of the batcher: jobs that wait, by group, and batches that run. It decides nothing."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from operator import attrgetter

from muntin.serving.batching.forecast import RunningBatch
from muntin.serving.batching.group_queue import GroupQueue, Rate
from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.latency_model import UNKNOWN, LatencyModel

REMEMBERED_GROUPS = 256
"""Number of groups without waiting or running jobs that are remembered."""
by_standing = attrgetter("standing")


class JobQueue:
    """Waiting jobs and running batches of `workers` engines."""

    def __init__(self, latencies: LatencyModel, workers: int) -> None:
        self.workers = workers
        self.groups: OrderedDict[Hashable, GroupQueue] = OrderedDict()
        """Least recently used first."""
        self.active: dict[Hashable, GroupQueue] = {}
        """Groups with waiting jobs."""
        self.running: list[RunningBatch] = []
        self.job_count = self.rows = self.nbytes = 0
        """Of the waiting jobs."""
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
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.job_count and not self.running

    @property
    def worker_free(self) -> bool:
        return len(self.running) < self.workers

    @property
    def wait_s(self) -> float:
        """Seconds that the waiting jobs keep the workers busy."""
        return self.backlog / self.workers

    def group_of(self, job: Job) -> GroupQueue:
        """The job's group, created if it is new. The latency of a group that never ran is looked up each time."""
        group = self.groups.get(job.group)
        if group is None:
            group = self.groups[job.group] = GroupQueue(job.group)
            if len(self.groups) > REMEMBERED_GROUPS:
                self._forget_one(group)
        else:
            self.groups.move_to_end(job.group)
        if job.cost is not None:
            group.cost = job.cost
        if group.last_batch_at == -math.inf:
            self._update_latency(group)
        return group

    def _forget_one(self, new: GroupQueue) -> None:
        for name, group in self.groups.items():
            if not group.outstanding_rows and group is not new:
                del self.groups[name]
                return

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
        """Count a batch as done; learn its engine time unless it is None. Raises ValueError for a batch that does not run."""
        run = next((run for run in self.running if run.batch is batch), None)
        if run is None:
            raise ValueError("this batch does not run: give each batch of `poll` back once")
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
