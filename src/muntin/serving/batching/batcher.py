"""Decide which requests are admitted, and what a free worker computes next. The time is an argument.

**Order.** A job is due at the earlier of arrival + objective and its own deadline; without either, never. Its standing is its due time, or
max(`patience`, objective) seconds after its arrival if that is earlier, plus `patience` seconds for each step of its priority. The smallest
standing goes first, equal ones by arrival. So jobs of a priority go by due time, then arrival; more urgent ones go first; and none starves,
since a job that arrives after another's standing goes behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from muntin.serving.batching.admission import Admission
from muntin.serving.batching.batch_former import BatchFormer, BatchSizes
from muntin.serving.batching.job import Batch, Job, Refusal, RefusalKind
from muntin.serving.batching.latency_model import LatencyModel
from muntin.serving.batching.queues import GroupQueue, JobQueue

BROKEN = "the engine was slower than foreseen, or more urgent requests came: try again later"
"""Message of a job that was admitted and is dropped."""
_STUCK = "the engine does not come back, and no thread is left to compute on: start the server again, or send the request to another one"


@dataclass(frozen=True, slots=True)
class Decision:
    """Task of a free worker: answer `dropped`, compute `batch`; without a batch poll again at `wake`, or after the next event."""

    batch: Batch | None
    dropped: tuple[tuple[Job, Refusal], ...]
    wake: float | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counts at one moment. `admitted`, `dropped`, `cancelled`, `finished` and `refused` (by kind) count jobs since the start.

    `backlog_s`: seconds of engine time for the waiting jobs.
    """

    waiting_jobs: int
    waiting_rows: int
    waiting_bytes: int
    waiting_groups: int
    running_batches: int
    running_rows: int
    backlog_s: float
    admitted: int
    dropped: int
    cancelled: int
    finished: int
    refused: dict[RefusalKind, int]


class Batcher:
    """Admits jobs and forms batches for `workers` engines.

    `objective`: seconds from arrival to answer that every admitted job keeps, or None. `max_rows`: rows of a batch. `queue_rows`,
    `queue_bytes`: bounds of the waiting jobs. `patience`: seconds that a step of priority is worth. `margin`: least seconds that an answer
    takes beyond the engine; `delivered` learns the actual time.

    Not thread-safe; `now` must never decrease.
    """

    def __init__(
        self,
        latencies: LatencyModel,
        *,
        objective: float | None,
        max_rows: int,
        queue_rows: int,
        queue_bytes: int,
        workers: int = 1,
        patience: float = 1.0,
        margin: float = 0.0002,
    ) -> None:
        self.objective, self.max_rows, self.workers = objective, max_rows, workers
        self.queue_rows, self.queue_bytes = queue_rows, queue_bytes
        self._patience = patience
        self._queue = JobQueue(latencies, workers, objective=objective, margin=margin)
        sizes = BatchSizes(self._queue, max_rows)
        self._admission, self._former = Admission(self._queue, sizes), BatchFormer(self._queue, sizes)
        self._expiry = math.inf
        self._draining = self._stuck = False
        self._admitted = self._dropped = self._cancelled = self._finished = 0
        self._refused: dict[RefusalKind, int] = dict.fromkeys(get_args(RefusalKind), 0)

    def submit(self, job: Job, now: float) -> Refusal | None:
        """Admit a job, or return why not."""
        refusal = self._check_bounds(job)
        if refusal is None:
            group = self._queue.group_of(job)
            group.arrivals.add(job.rows, now)
            self._set_times(job, now)
            late = self._admission.lateness(job, group, now)
            if late == 0:
                self._admit(job, group, now)
                return None
            refusal = self._late(job, group, late, now)
        self._refused[refusal.kind] += 1
        return refusal

    def _set_times(self, job: Job, now: float) -> None:
        if not job.arrived <= now:
            job.arrived = now
        job.due = math.inf if self.objective is None or job.patient else job.arrived + self.objective
        if job.deadline is not None and job.deadline < job.due:
            job.due = job.deadline
        job.promised = False
        job.standing = min(job.due, job.arrived + max(self._patience, self.objective or 0.0)) + job.priority * self._patience

    def _admit(self, job: Job, group: GroupQueue, now: float) -> None:
        self._admitted += 1
        job.ticket = self._admitted
        self._queue.add(job, group, now)
        self._admission.count(job, group, now)
        job.latest_start = job.due - group.latency.expected(job.rows) if job.promised else job.due
        self._expiry = min(self._expiry, job.latest_start)

    def _check_bounds(self, job: Job) -> Refusal | None:
        if self._draining:
            return Refusal("draining", "the server is shutting down: send the request to another one")
        if self._stuck:
            return Refusal("stuck", _STUCK)
        if job.rows > self.max_rows or job.nbytes > self.queue_bytes:
            size = f"{job.rows} rows, {job.nbytes} bytes in one request"
            return Refusal("too large", f"{size}: send at most {self.max_rows} rows and {self.queue_bytes} bytes at once")
        queue = self._queue
        rows, nbytes = queue.rows + job.rows, queue.nbytes + job.nbytes
        if job.patient or (rows <= self.queue_rows and nbytes <= self.queue_bytes):
            return None
        size = f"{queue.rows} rows, {queue.nbytes} bytes wait, of at most {self.queue_rows} rows and {self.queue_bytes} bytes"
        excess = max(1 - self.queue_rows / rows, 1 - self.queue_bytes / max(nbytes, 1))
        return Refusal("full", f"{size}: try again later", excess * queue.wait_s or None)

    def _late(self, job: Job, group: GroupQueue, late: float, now: float) -> Refusal:
        """Refusal of a job that would be late by so many seconds; inf: even alone."""
        if late < math.inf:
            message = f"{self._queue.job_count} requests wait and leave it too little time: try again in {max(late * 1e3, 1):.0f} ms"
            return Refusal("late", message, late)
        if job.deadline == job.due:
            return Refusal("late", "the time until its deadline does not suffice even for the engine alone: give it more")
        assert self.objective is not None
        seconds = group.latency.safe(job.rows)
        if seconds + self._queue.overhead(now) <= self.objective:
            return Refusal("late", "it could not be read in time: try again", self._queue.wait_s or None)
        return Refusal(
            "late",
            f"the engine alone may take {seconds * 1e3:.0f} ms for it (usually {group.latency.expected(job.rows) * 1e3:.0f}), and answers "
            f"are promised within {self.objective * 1e3:g} ms: send smaller images, or fewer in a request, or have them served with a "
            "longer objective",
        )

    def poll(self, now: float) -> Decision:
        """Decide what a free worker does now."""
        dropped = self.expire(now)
        start = self._former.next(now, wait=not self._draining)
        return Decision(start, dropped, None) if isinstance(start, Batch) else Decision(None, dropped, start)

    def expire(self, now: float) -> tuple[tuple[Job, Refusal], ...]:
        """Drop the jobs that can no longer be answered in time. A job that waits alone is kept until it is due.

        `poll` calls it too; call it while no worker is free.
        """
        if now <= self._expiry:
            return ()
        dropped: list[Job] = []
        for _, _, job in sorted((job.latest_start, job.ticket, job) for job in self._queue.jobs() if job.latest_start < now):
            expected = self._queue.groups[job.group].latency.expected(job.rows)
            if job.due < now or (job.promised and self._queue.job_count > 1 and now + expected > job.due):
                self._queue.remove(job)
                dropped.append(job)
            else:
                job.latest_start = job.due
        self._dropped += len(dropped)
        self._expiry = min((job.latest_start for job in self._queue.jobs()), default=math.inf)
        return tuple((job, Refusal("late", BROKEN, self._queue.wait_s)) for job in dropped)

    def done(self, batch: Batch, now: float, seconds: float | None) -> None:
        """Free a worker. `seconds`: engine time to learn; None: the batch failed."""
        group = self._queue.finish(batch, now, seconds)
        self._finished += len(batch.jobs)
        if seconds is not None and self.objective is not None and seconds + self._queue.overhead(now) <= self.objective:
            group.kept_objective_at = now

    def delivered(self, seconds: float, now: float) -> None:
        """Learn that an answer was sent so many seconds after its batch ended."""
        self._queue.delivered(seconds, now)

    def cancel(self, job: Job) -> bool:
        """Remove a waiting job; False for a job that does not wait."""
        if not job.waiting:
            return False
        self._queue.remove(job)
        self._cancelled += 1
        return True

    def drain(self) -> None:
        """Refuse every job from now on; waiting jobs are still computed."""
        self._draining = True

    def discard(self) -> tuple[tuple[Job, Refusal], ...]:
        """Drop all waiting jobs."""
        return self._drop_all(Refusal("draining", "the server was shut down before the request was computed: send it to another one"))

    def stick(self) -> tuple[tuple[Job, Refusal], ...]:
        """Drop all waiting jobs and refuse every job until `loosen`: all engines hang."""
        self._stuck = True
        return self._drop_all(Refusal("stuck", _STUCK))

    def loosen(self) -> None:
        """Admit jobs again: an engine has come back."""
        self._stuck = False

    def _drop_all(self, refusal: Refusal) -> tuple[tuple[Job, Refusal], ...]:
        jobs = self._queue.jobs()
        for job in jobs:
            self._queue.remove(job)
        self._dropped += len(jobs)
        return tuple((job, refusal) for job in jobs)

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return self._queue.job_count

    def snapshot(self) -> Snapshot:
        """Return the current counts."""
        queue = self._queue
        return Snapshot(
            waiting_jobs=queue.job_count,
            waiting_rows=queue.rows,
            waiting_bytes=queue.nbytes,
            waiting_groups=len(queue.active),
            running_batches=len(queue.running),
            running_rows=sum(run.batch.rows for run in queue.running),
            backlog_s=queue.backlog,
            admitted=self._admitted,
            dropped=self._dropped,
            cancelled=self._cancelled,
            finished=self._finished,
            refused=dict(self._refused),
        )
