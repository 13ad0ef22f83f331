"""The time that a request waits for the event loop before its first line runs. Its objective counts that time, too."""

from __future__ import annotations

import asyncio
import time
from math import inf


class LoopLag:
    """Seconds from the scheduling of a callback to its run, measured in each turn of the event loop in which a request arrives."""

    def __init__(self) -> None:
        self._seconds, self._measured_at = 0.0, -inf
        self._measuring = False

    def observe(self) -> float:
        """Return the present lag, and measure it anew. A value is valid for as long as it is itself: then the loop has caught up."""
        now = time.monotonic()
        if not self._measuring:
            self._measuring = True
            asyncio.get_running_loop().call_soon(self._measure, now)
        return self._seconds if now - self._measured_at <= self._seconds else 0.0

    def _measure(self, since: float) -> None:
        self._measuring = False
        self._measured_at = time.monotonic()
        self._seconds = self._measured_at - since
