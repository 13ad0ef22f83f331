"""Bytes that all requests of one server hold together, whatever protocol they use."""

from __future__ import annotations

from collections import Counter

from muntin.runtime.buffers import Buffers
from muntin.serving.config import Bounds


class MemoryBudget:
    """The memory budget of one server, for the event loop only.

    `held`: bytes of the bodies in work, and of large answers being sent. `buffers`: recycled memory for bodies. `refused`: requests refused
    before their body was complete, by HTTP status.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.buffers = Buffers()
        self.held = 0
        self.refused: Counter[int] = Counter()

    def has_room(self, count: int) -> bool:
        """Return whether `count` more bytes may be held. Zero bytes always may."""
        return not count or self.held + count <= self.bounds.held_bytes
