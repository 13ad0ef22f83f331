"""What an answer takes beyond the engine, learned from the answers that went out.

Between the end of a batch and the last byte of its answers lie a thread's waking, encoding, and whatever else the event loop is busy with:
at a thousand requests a second on a core that the engine shares, milliseconds. A promise that counts the engine alone is broken by them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_WINDOW = 128  # answers that it is taken from
_OUTLIERS, _OUTLIER = 2, 32  # the longest that do not count: one for so many, up to two


class Overhead:
    """`seconds`: all but two of the last 128 answers kept them; `least` at the least. Adding one costs about a microsecond."""

    __slots__ = ("_least", "_ordered", "_recent", "seconds")

    def __init__(self, least: float) -> None:
        self._least = self.seconds = least
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, seconds: float) -> None:
        """An answer went out so many seconds after the engine was done with it."""
        self._recent.append(seconds)
        insort(self._ordered, seconds)
        if len(self._recent) > _WINDOW:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]
        outliers = min(_OUTLIERS, len(self._recent) // _OUTLIER)
        self.seconds = max(self._least, self._ordered[-1 - outliers])
