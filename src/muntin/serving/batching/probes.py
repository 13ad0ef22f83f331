"""When a job is tried although its group seems too slow for it: the only way to find out that the engine has become faster."""

from __future__ import annotations

import math

from muntin.serving.batching.group_queue import GroupQueue
from muntin.serving.batching.job import Job
from muntin.serving.batching.job_queue import JobQueue

_MIN_PAUSE_S = 0.25
_PAUSE, _HUGE_PAUSE = 8, 64  # times the job's latency: pause after a job of its group, and after a huge job
_HUGE = 4  # objectives: a longer job delays all jobs that arrive while it runs
_HUGE_GUESS = 16  # objectives: a job that takes longer by another group's figures is never tried
_KEPT_S = 60.0  # seconds for which a group counts as one that keeps the objective


class Probes:
    """Decides for jobs that would be late even alone. `objective`: seconds, or None."""

    def __init__(self, queue: JobQueue, objective: float | None) -> None:
        self._queue, self._objective = queue, objective
        self._next_huge = -math.inf

    def allow(self, job: Job, group: GroupQueue, now: float) -> bool:
        """Whether the job is admitted without a promise.

        A job without a deadline of its own is, when nothing waits or runs: otherwise an engine that cannot keep the objective would answer
        nothing. Other jobs are tried after pauses. Huge ones, where another group keeps the objective, share one long pause.
        """
        expected = group.latency.expected(job.rows)
        if self._is_huge(expected, group, now):
            assert self._objective is not None
            hopeless = group.latency.guessed and expected > _HUGE_GUESS * self._objective
            if hopeless or group.outstanding_rows or now < self._next_huge:
                return False
            self._next_huge = now + _HUGE_PAUSE * expected
            return True
        if self._queue.idle and not job.limited_by_deadline:
            return True
        return not group.outstanding_rows and now >= group.last_batch_at + max(_MIN_PAUSE_S, _PAUSE * expected)

    def _is_huge(self, expected: float, group: GroupQueue, now: float) -> bool:
        if self._objective is None or expected <= _HUGE * self._objective:
            return False
        return any(other.kept_objective_at > now - _KEPT_S for other in self._queue.groups.values() if other is not group)
