"""A candidate's computation of batches that were answered already, beside the requests."""

from __future__ import annotations

from functools import partial

from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import Group
from muntin.serving.inference.metrics import Metrics
from muntin.serving.threads import Threads
from muntin.serving.versions.slot import Lease, Slot

SHADOWS = 2
"""Computations that may run or wait; further batches are not compared. Each holds its inputs and answers, outside the server's bounds."""
JOIN_S = 5.0
"""Seconds that a computation in progress is waited for during shutdown."""


class Shadows:
    """Computes shadows on a thread. Called by the event loop only."""

    def __init__(self, slot: Slot, executor: Executor, metrics: Metrics) -> None:
        self._slot, self._executor, self._metrics = slot, executor, metrics
        self._threads = Threads("muntin-shadow", most=1)

    @property
    def pending(self) -> int:
        """Computations that run or wait."""
        return self._threads.pending

    def cast(self, work: Work, group: Group) -> None:
        """Have the candidate compute an answered batch again, if there is a candidate and the batch belongs to its share."""
        whole, work.whole = work.whole, None
        if whole is None or work.by is None or (lease := self._slot.shadow(work.by)) is None:
            return
        if self.pending >= SHADOWS:
            self._skip(lease)
            return
        shadow = partial(self._executor.shadow, lease.version, group, *whole, beside=work.by, within=work.within)
        try:
            self._threads.submit(shadow).add_done_callback(lambda _: lease.release())
        except RuntimeError:  # no thread is left
            self._skip(lease)

    def _skip(self, lease: Lease) -> None:
        lease.release()
        self._metrics.shadow_dropped.inc()

    def close(self) -> None:
        """Cancel what waits, and wait `JOIN_S` for what runs."""
        self._threads.give_up()
        self._threads.join(JOIN_S)
