"""What a candidate makes of images that were answered already, beside the requests: one call after the other, a few waiting.

A candidate may hang. Its thread is left to it, and the next candidate has one of its own.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from muntin.serving.executor import Executor, Work
from muntin.serving.metrics import Metrics
from muntin.serving.slot import Lease, Slot
from muntin.serving.threads import Threads
from muntin.serving.version import Version

SHADOWS = 4
"""Computations that may wait; beyond, an answer is not compared."""
SHADOW_BYTES = 256 << 20
"""Of images and answers that they may hold together, or of a single one: nobody counts them any more, since they were answered."""
JOIN_S = 5.0
"""Seconds that one in progress has when the server ends."""


class Shadows:
    """Called on one thread, the event loop's."""

    def __init__(self, slot: Slot, executor: Executor, metrics: Metrics) -> None:
        self._slot, self._executor, self._metrics = slot, executor, metrics
        self._of: Version | None = None
        self._threads = Threads("muntin-shadow", most=1)
        self._held: list[tuple[Future[None], int]] = []
        """Computations, and the bytes of each."""

    @property
    def pending(self) -> int:
        """Computations of the last candidate that wait or go on."""
        return self._threads.pending

    def cast(self, work: Work, *, labels: bool) -> None:
        """After an answer: has the candidate compute its batch, if there is one and it is its turn."""
        whole, work.whole = work.whole, None
        if whole is None or work.by is None or (lease := self._slot.shadow(work.by)) is None:
            return
        if self._of is not lease.version:
            self._of, self._threads = lease.version, Threads("muntin-shadow", most=1)
        self._held = [(held, count) for held, count in self._held if not held.done()]
        count = sum(array.nbytes for array in whole)
        if self.pending >= SHADOWS or (self._held and count + sum(count for _, count in self._held) > SHADOW_BYTES):
            self._drop(lease)
            return
        shadow = partial(self._executor.shadow, lease.version, *whole, labels=labels, beside=work.by, within=work.within)
        try:
            computed = self._threads.submit(shadow)
        except RuntimeError:  # this process may have no more threads
            self._drop(lease)
            return
        computed.add_done_callback(lambda _: lease.release())
        self._held.append((computed, count))

    def _drop(self, lease: Lease) -> None:
        lease.release()
        self._metrics.shadow_dropped.inc()

    def close(self) -> None:
        """Gives up what waits, and waits for what goes on, but not for an engine that hangs."""
        self._threads.give_up()
        self._threads.join(JOIN_S)
