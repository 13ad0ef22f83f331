"""What an answer takes beyond the engine, learned from the answers that went out.

Between the end of a batch and the writing of its last answer lie a thread's waking, encoding, and whatever else the event loop is busy
with: at a thousand requests a second on a core that the engine shares, milliseconds. A promise that counts the engine alone is broken by
them. (Of gRPC, which writes by itself, it is what the loop takes until it is given the answer.)
"""

from __future__ import annotations

from muntin.serving.window import Window

_WINDOW = 128  # batches that it is taken from


class Overhead:
    """`seconds`: within them the answers of the last 128 batches were written; between `least` and `most`.

    `most` bounds what a very slow answer can do to everybody else's promises. Adding one costs about a microsecond.
    """

    __slots__ = ("_batch", "_least", "_longest", "_most", "_recent", "seconds")

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most
        self.seconds = least
        self._recent = Window(_WINDOW)
        self._batch: object = None
        self._longest = 0.0
        """Of the answers of the present batch."""

    def add(self, batch: object, seconds: float) -> None:
        """An answer of a batch was written so many seconds after it was computed. `batch`: equal for answers of one."""
        if batch == self._batch:
            self._longest = max(self._longest, seconds)
            return
        if self._batch is not None:
            self._count(self._longest)
        self._batch, self._longest = batch, seconds

    def _count(self, seconds: float) -> None:
        self._recent.add(seconds)
        self.seconds = max(self._least, min(self._recent.largest(0), self._most))
