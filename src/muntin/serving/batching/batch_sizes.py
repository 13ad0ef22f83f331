"""How many rows a batch of a group should have."""

from __future__ import annotations

import math

from muntin.serving.batching.group_queue import GroupQueue
from muntin.serving.batching.job_queue import JobQueue

_SHARE, _FLOOD_SHARE = 0.5, 0.6  # of an objective: largest time of a batch, normally and in a flood
_FLOOD = 2  # times the throughput of full batches: arrivals of which most are refused


class BatchSizes:
    """Sizes for batches of at most `max_rows`. `objective`: seconds, or None."""

    def __init__(self, queue: JobQueue, *, objective: float | None, max_rows: int) -> None:
        self._queue, self._objective, self._max_rows = queue, objective, max_rows

    def largest(self, group: GroupQueue, now: float) -> int:
        """Rows of the largest batch to form now."""
        reach = group.latency.rows_within(self.batch_seconds(group, math.inf, now))
        return group.limited_growth(group.worthwhile_rows(self._sustaining(group, now), self._max_rows, reach))

    def target(self, group: GroupQueue, seconds: float, now: float) -> int:
        """Rows of a worthwhile batch that the arrivals call for and that takes at most so many seconds; at least 1."""
        sustaining, reach = self._sustaining(group, now), group.latency.rows_within(seconds)
        return max(1, min(group.worthwhile_rows(sustaining, self._max_rows, reach), sustaining, reach))

    def batch_seconds(self, group: GroupQueue, without_objective: float, now: float) -> float:
        """Largest time of a batch: two batches in a row keep the objective, since a job may arrive when a batch has just begun.

        It is longer in a flood: most requests are refused then, such as those that arrive early in a batch. `without_objective`: time
        that the share is taken of where there is no objective.
        """
        flood = group.arrivals.per_second(now) * group.latency.expected(self._max_rows) > _FLOOD * self._queue.workers * self._max_rows
        return (without_objective if self._objective is None else self._objective) * (_FLOOD_SHARE if flood else _SHARE)

    def _sustaining(self, group: GroupQueue, now: float) -> int:
        used_by_others = self._queue.busy.per_second(now) - group.busy.per_second(now)
        return group.sustaining_rows(max(0.0, self._queue.workers - used_by_others), now, self._max_rows)
