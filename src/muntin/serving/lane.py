"""The waiting jobs of one group, in order, with how the group arrived and ran lately."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable

from muntin.serving.job import Job
from muntin.serving.latency import UNKNOWN, Line

MEMORY = 1.0
"""Seconds that rates and peaks are remembered for: they fade by a factor e in each."""
LOAD = 0.8
"""Of an engine's throughput: arrivals below it call for no larger batch."""
PAYS = 1.05
"""A batch that gets through less than this many times more is no gain."""
_EXPLORE = 2  # a batch has at most this many times the rows of the largest one measured, and what was measured tells of no larger one
_ENDLESS = 1 << 62


class Rate:
    """So much a second, over about the last `MEMORY` seconds."""

    __slots__ = ("_value", "at")

    def __init__(self) -> None:
        self._value, self.at = 0.0, 0.0

    def add(self, amount: float, now: float) -> None:
        self._value = self._value * math.exp((self.at - now) / MEMORY) + amount
        self.at = now

    def per_second(self, now: float) -> float:
        return self._value * math.exp((self.at - now) / MEMORY) / MEMORY if self._value else 0.0


class Peak:
    """The highest value of late; it fades as a rate does."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value, self._at = 0.0, 0.0

    def raise_to(self, value: float, now: float) -> None:
        if value >= self.value(now):
            self._value, self._at = value, now

    def value(self, now: float) -> float:
        return self._value * math.exp((self._at - now) / MEMORY) if self._value else 0.0


class Lane:
    """One group. What waits is kept in a sorted list: among thousands of jobs, inserting one moves some kilobytes of pointers."""

    __slots__ = (
        "arrivals",
        "busy",
        "cost",
        "group",
        "jobs",
        "kept",
        "line",
        "lingers",
        "most",
        "outstanding",
        "peak",
        "rows",
        "seconds",
        "tried",
    )

    def __init__(self, group: Hashable) -> None:
        self.group = group
        self.cost: float | None = None
        self.line: Line = UNKNOWN
        self.most = 1
        """Rows of the largest batch that is formed at present."""
        self.jobs: list[tuple[float, int, Job]] = []
        """Standing, ticket, job: in order."""
        self.rows = 0
        self.seconds = 0.0
        """Of engine time that wait here."""
        self.outstanding = 0
        """Rows that wait or run."""
        self.peak = Peak()
        """The most rows that were outstanding at once."""
        self.arrivals = Rate()
        """Rows, refused ones too."""
        self.busy = Rate()
        """Seconds of engine time that were used."""
        self.tried = -math.inf
        """When the last batch went."""
        self.kept = -math.inf
        """When a batch kept the objective."""
        self.lingers: float | None = None
        """Since when a worker has been waiting for more rows."""

    @property
    def known(self) -> bool:
        """Whether promises can rest on the line. One batch does not suffice: a first call may have compiled."""
        return self.line.seen >= 2

    @property
    def head(self) -> Job:
        return self.jobs[0][2]

    @property
    def standing(self) -> tuple[float, int]:
        """Of the head, with its ticket: what lanes are ordered by."""
        standing, ticket, _ = self.jobs[0]
        return standing, ticket

    def insert(self, job: Job) -> None:
        insort(self.jobs, (job.standing, job.ticket, job))
        self.rows += job.rows

    def take(self, indices: list[int]) -> tuple[Job, ...]:
        """Removes the jobs at these places, which are in order."""
        taken = tuple(self.jobs[index][2] for index in indices)
        if indices[-1] == len(indices) - 1:
            del self.jobs[: len(indices)]
        else:
            for index in reversed(indices):
                del self.jobs[index]
        self.rows -= sum(job.rows for job in taken)
        return taken

    def index(self, job: Job) -> int:
        """Where a waiting job is, or where one that has no ticket yet would be."""
        return bisect_left(self.jobs, (job.standing, job.ticket or _ENDLESS))

    def until(self, first: int, rows: int) -> tuple[int, int]:
        """The place after the last job from `first` on that fits into so many rows, and the rows of those; one job fits always."""
        if self.rows == len(self.jobs):
            count = min(rows, len(self.jobs) - first)
            return first + count, count
        total = 0
        for index in range(first, len(self.jobs)):
            more = self.jobs[index][2].rows
            if total and total + more > rows:
                return index, total
            total += more
        return len(self.jobs), total

    def span(self, rows: int) -> float:
        """Seconds of engine time for so many rows, in batches of `most`."""
        full, rest = divmod(rows, self.most)
        return full * self.line.expected(self.most) + (self.line.expected(rest) if rest else 0.0)

    def sustaining(self, engines: float, now: float, max_rows: int) -> int:
        """The least rows of a batch with which `LOAD` of so many engines get through what arrives, at most `max_rows`."""
        line, rate = self.line, self.arrivals.per_second(now)
        spare = engines * LOAD - rate * line.each
        if spare <= 0:
            return max_rows
        return max(1, min(max_rows, math.ceil(rate * max(line.fixed, line.least) / spare)))

    def worth(self, sustaining: int, max_rows: int, reach: int) -> int:
        """Rows that are worth a batch, if that many wait. `reach`: those that batches can have which keep the objective.

        Every row, where the fixed part of a batch outweighs a row: everybody's latency gains. One, where larger batches get no more
        through. In between, a batch delays its first rows for the sake of its last: as many as the arrivals call for.

        That larger batches gain nothing is believed only of sizes that were seen: what a line through single rows and a few pairs says of
        sixteen is mostly noise, and an engine that is believed to gain nothing computes single rows, from which nothing else is learned.
        """
        line = self.line
        if line.least or line.fixed >= line.each:
            return max_rows
        gains = (line.fixed + line.each) * max_rows >= PAYS * (line.fixed + line.each * max_rows)
        return sustaining if gains or min(sustaining, reach) > _EXPLORE * line.firm else 1

    def explored(self, worth: int) -> int:
        """Of the rows that are worth a batch, as many as may be tried: batches grow by steps, so that no promise rests on a wild guess."""
        return min(worth, _EXPLORE * self.line.largest) if self.known else 1
