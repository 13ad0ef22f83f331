"""The last so many numbers, in order of size: for percentiles of what was lately."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Window:
    """At most `limit` numbers, the oldest go first. Adding one costs about a microsecond for some hundred."""

    __slots__ = ("_limit", "_ordered", "_recent")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, value: float) -> None:
        self._recent.append(value)
        insort(self._ordered, value)
        if len(self._recent) > self._limit:
            self._remove(self._recent.popleft())

    def drop(self, count: int) -> None:
        """Forgets the newest."""
        for _ in range(min(count, len(self._recent))):
            self._remove(self._recent.pop())

    def largest(self, outliers: int) -> float:
        """The largest number but for so many; fewer than there are."""
        return self._ordered[-1 - outliers]

    def _remove(self, value: float) -> None:
        del self._ordered[bisect_left(self._ordered, value)]
