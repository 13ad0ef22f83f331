"""Promises: whether a job can be answered in time.

A job that has a due time is admitted only if the forecast (`forecast.py`) says that it will be met, and that no job of the same or a more
urgent priority that is in time now would become late. Jobs of a group that was measured less than twice are admitted without a promise.

The job's own batch is assumed to have the size that the arrivals call for: otherwise an overloaded queue fills until every job at its head
has just the time to run alone, and large batches never form again. For the same reason other groups owe this time to a group that was
refused for lack of it, for a while: otherwise the group with the smallest batches crowds out the others. A job that others may overtake is
promised as if more urgent jobs went on arriving at their present rate.
"""

from __future__ import annotations

import math

from muntin.serving.batching.batch_former import BatchSizes
from muntin.serving.batching.forecast import Forecast
from muntin.serving.batching.job import Job
from muntin.serving.batching.queues import GroupQueue, JobQueue, Peak, Rate

_LEVELS = 16  # priorities whose load is counted separately
_BACKLOG_FACTOR = 1.5  # safety of the estimate without a forecast
_MAX_URGENT = 0.9  # largest share of the engines that more urgent jobs are assumed to use
_MIN_PAUSE_S = 0.25
_PAUSE, _HUGE_PAUSE = 8, 64  # times the job's latency: pause after a job of its group, and after a huge job
_HUGE = 4  # objectives: a longer job delays all jobs that arrive while it runs
_HUGE_GUESS = 16  # objectives: a job that takes longer by another group's figures is never tried
_KEPT_S = 60.0  # seconds for which a group counts as one that keeps the objective


class Admission:
    """Promises for the jobs of a queue."""

    def __init__(self, queue: JobQueue, sizes: BatchSizes) -> None:
        self._queue, self._sizes, self._objective = queue, sizes, queue.objective
        self._next_huge = -math.inf  # time from which on a huge job may be tried
        self._owed = Peak()  # seconds of a batch that refused jobs would have needed
        self._load = [Rate() for _ in range(_LEVELS)]  # seconds of engine time admitted, by priority
        self._forecast: Forecast | None = None
        self._forecast_changes, self._forecast_until = -1, -math.inf

    def lateness(self, job: Job, group: GroupQueue, now: float) -> float:
        """Seconds by which the job would be late, or make another job late; 0: admit it. inf: late even if it were alone.

        Sets `job.promised`.
        """
        if job.due <= now:
            return math.inf
        if job.due == math.inf or not group.known:
            return 0.0
        latency, seconds_left = group.latency, job.due - now - self._queue.overhead(now)
        if latency.safe(job.rows) > seconds_left:
            return 0.0 if self._try(job, group, now) else math.inf
        job.promised = True
        if not self._queue.job_count and len(self._queue.running) < self._queue.workers:
            return 0.0
        batch_seconds = self._sizes.batch_seconds(group, seconds_left, now)
        reserve = latency.safe(self._sizes.target(group, batch_seconds, now))
        needed = max(reserve, min(self._owed.value(now), batch_seconds))
        stretch = self._stretch(job.priority, now)
        if job.standing >= self._queue.last_standing and stretch * self._longest(job, group, needed, now) <= seconds_left:
            return 0.0
        forecast = self._current_forecast(now)
        place = forecast.place(job, group)
        own = latency.expected(place.rows)
        own += math.sqrt(place.variance + (own * (latency.spread - 1)) ** 2)
        if needed > latency.safe(place.rows):
            own = max(own, needed + math.sqrt(place.variance))
        late = stretch * max(0.0, place.start - now) + own - seconds_left
        if late > 0:
            self._owed.raise_to(reserve, now)
            return late
        return forecast.lateness_caused(place, job.priority)

    def _try(self, job: Job, group: GroupQueue, now: float) -> bool:
        """Return True to admit a job that would be late even alone, without a promise: the engine may have become faster.

        A job without a deadline of its own is admitted when nothing waits or runs: otherwise an engine that cannot keep the objective would
        answer nothing. Other jobs are tried after pauses. Huge ones share one long pause where another group keeps the objective.
        """
        expected = group.latency.expected(job.rows)
        if self._is_huge(expected, group, now):
            assert self._objective is not None
            hopeless = group.latency.guessed and expected > _HUGE_GUESS * self._objective
            if hopeless or group.outstanding_rows or now < self._next_huge:
                return False
            self._next_huge = now + _HUGE_PAUSE * expected
            return True
        if not self._queue.job_count and not self._queue.running and job.deadline != job.due:
            return True
        return not group.outstanding_rows and now >= group.last_batch_at + max(_MIN_PAUSE_S, _PAUSE * expected)

    def _is_huge(self, expected: float, group: GroupQueue, now: float) -> bool:
        if self._objective is None or expected <= _HUGE * self._objective:
            return False
        return any(other.kept_objective_at > now - _KEPT_S for other in self._queue.groups.values() if other is not group)

    def count(self, job: Job, group: GroupQueue, now: float) -> None:
        """Count the engine time of an admitted job."""
        self._load[min(job.priority, _LEVELS - 1)].add(group.latency.expected(group.batch_rows) / group.batch_rows * job.rows, now)

    def _longest(self, job: Job, group: GroupQueue, needed: float, now: float) -> float:
        """A high estimate of the seconds until the answer of a job that overtakes none: it makes most forecasts unnecessary."""
        running = sum(run.remaining(now) for run in self._queue.running)
        rows = max(job.rows, min(group.batch_rows, group.rows + job.rows))
        return running + _BACKLOG_FACTOR * self._queue.backlog + max(needed, group.latency.safe(rows))

    def _stretch(self, priority: int, now: float) -> float:
        """Factor by which a job waits longer because more urgent jobs arrive and overtake it."""
        urgent = sum(load.per_second(now) for load in self._load[: min(priority, _LEVELS - 1)])
        return 1 / (1 - min(_MAX_URGENT, urgent / self._queue.workers)) if urgent else 1.0

    def _current_forecast(self, now: float) -> Forecast:
        """The forecast, computed once until the queue changes or a running batch should have ended."""
        queue = self._queue
        if self._forecast is None or self._forecast_changes != queue.changes or now >= self._forecast_until:
            free = [run.end(now) for run in queue.running] + [(now, 0.0)] * (queue.workers - len(queue.running))
            self._forecast = Forecast(queue.active.values(), free, margin=self._queue.overhead(now), backlog=queue.backlog)
            self._forecast_changes, self._forecast_until = queue.changes, min(end for end, _ in free)
        return self._forecast
