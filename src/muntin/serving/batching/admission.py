"""Whether a job can be promised an answer in time.

A job that has a due time is admitted only if the forecast (`forecast.py`) says that it will be met, and that no job of the same or a more
urgent priority that is in time now would become late.

The job's own batch is assumed to have the size that the arrivals call for. If a single row's latency were enough, an overloaded queue would
fill until every job at its head has just the time to run alone, and the engine would never see a large batch again. For the same reason
other groups owe this time to a group that was refused for lack of it, for a while: otherwise the group with the smallest batches would
crowd out the others. A job that others may overtake is promised as if more urgent jobs went on arriving at their present rate.

Promises need figures: jobs of a group that was measured less than twice are admitted without one.
"""

from __future__ import annotations

import math

from muntin.serving.batching.batch_sizes import BatchSizes
from muntin.serving.batching.forecast import Forecast
from muntin.serving.batching.group_queue import GroupQueue, Peak, Rate
from muntin.serving.batching.job import Job
from muntin.serving.batching.job_queue import JobQueue
from muntin.serving.batching.overhead import Overhead
from muntin.serving.batching.probes import Probes

_LEVELS = 16  # priorities whose load is counted separately
_BACKLOG_FACTOR = 1.5  # safety of the estimate without a forecast
_MAX_URGENT = 0.9  # largest share of the engines that more urgent jobs are assumed to use


class Admission:
    """Promises for the jobs of a queue. `objective`: seconds, or None."""

    def __init__(self, queue: JobQueue, sizes: BatchSizes, overhead: Overhead, *, objective: float | None) -> None:
        self._queue, self._sizes, self._overhead = queue, sizes, overhead
        self._probes = Probes(queue, objective)
        self._owed = Peak()  # seconds of a batch that refused jobs would have needed
        self._load: dict[int, Rate] = {}  # seconds of engine time admitted, by level of priority
        self._forecast: Forecast | None = None
        self._forecast_changes = -1
        self._forecast_until = -math.inf

    def lateness(self, job: Job, group: GroupQueue, now: float) -> float:
        """Seconds by which the job would be late, or make another job late; 0: admit it. inf: late even if it were alone.

        Sets `job.promised`.
        """
        if job.due <= now:
            return math.inf
        if job.due == math.inf or not group.known:
            return 0.0
        latency, seconds_left = group.latency, job.due - now - self._overhead.seconds
        if latency.safe(job.rows) > seconds_left:
            return 0.0 if self._probes.allow(job, group, now) else math.inf
        job.promised = True
        if not self._queue.job_count and self._queue.worker_free:
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

    def count(self, job: Job, group: GroupQueue, now: float) -> None:
        """Count the engine time of an admitted job."""
        rate = self._load.setdefault(_level(job.priority), Rate())
        rate.add(group.latency.expected(group.batch_rows) / group.batch_rows * job.rows, now)

    def _longest(self, job: Job, group: GroupQueue, needed: float, now: float) -> float:
        """A high estimate of the seconds until the answer of a job that overtakes none: it makes most forecasts unnecessary."""
        running = sum(run.remaining(now) for run in self._queue.running)
        rows = max(job.rows, min(group.batch_rows, group.rows + job.rows))
        return running + _BACKLOG_FACTOR * self._queue.backlog + max(needed, group.latency.safe(rows))

    def _stretch(self, priority: int, now: float) -> float:
        """Factor by which a job waits longer because more urgent jobs arrive and overtake it."""
        urgent = sum(load.per_second(now) for level, load in self._load.items() if level < _level(priority))
        return 1 / (1 - min(_MAX_URGENT, urgent / self._queue.workers)) if urgent else 1.0

    def _current_forecast(self, now: float) -> Forecast:
        """The forecast, computed once until the queue changes or a running batch should have ended."""
        queue = self._queue
        if self._forecast is None or self._forecast_changes != queue.changes or now >= self._forecast_until:
            free = [run.end(now) for run in queue.running] + [(now, 0.0)] * (queue.workers - len(queue.running))
            self._forecast = Forecast(queue.active.values(), free, margin=self._overhead.seconds, backlog=queue.backlog)
            self._forecast_changes, self._forecast_until = queue.changes, min(end for end, _ in free)
        return self._forecast


def _level(priority: int) -> int:
    return min(priority, _LEVELS - 1)
