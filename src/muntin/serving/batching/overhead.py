"""Time that an answer takes beyond the engine, learned from the answers that were sent.

After a batch ends, a thread wakes up, the answer is encoded, and the event loop is busy with other requests: milliseconds, at a thousand
requests a second on a core that the engine shares. Promises must include this time. For gRPC, which sends by itself, it ends when the loop
gets the answer.
"""

from __future__ import annotations

from muntin.serving.batching.window import Window

_WINDOW = 128  # batches


class Overhead:
    """`seconds`: longest time of the last 128 batches, between `minimum` and `maximum`.

    `maximum` bounds the effect of a very slow answer on the promises to others. Adding one costs about a microsecond.
    """

    def __init__(self, minimum: float, maximum: float) -> None:
        self._minimum, self._maximum = minimum, maximum
        self.seconds = minimum
        self._recent = Window(_WINDOW)
        self._batch: object = None
        self._batch_seconds = 0.0
        """Longest time of the current batch's answers."""

    def add(self, batch: object, seconds: float) -> None:
        """Count an answer that was sent so many seconds after its batch ended. `batch`: equal for the answers of one batch."""
        if batch == self._batch:
            self._batch_seconds = max(self._batch_seconds, seconds)
            return
        if self._batch is not None:
            self._recent.add(self._batch_seconds)
            self.seconds = max(self._minimum, min(self._recent.largest(0), self._maximum))
        self._batch, self._batch_seconds = batch, seconds
