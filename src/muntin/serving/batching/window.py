"""A sliding window of numbers that is kept sorted, for recent percentiles."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Window:
    """The last `limit` numbers. Adding one costs about a microsecond for a few hundred."""

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
        """Remove the newest `count` numbers."""
        for _ in range(min(count, len(self._recent))):
            self._remove(self._recent.pop())

    def largest(self, outliers: int) -> float:
        """Largest number after leaving out the `outliers` largest; there must be more numbers than outliers."""
        return self._ordered[-1 - outliers]

    def _remove(self, value: float) -> None:
        del self._ordered[bisect_left(self._ordered, value)]
