"""Compute a batch with a version's session.

    batch of jobs -> joined inputs (the request's own bytes if it is alone) -> session -> each job's rows of the answer

If the engine finds no memory, the batch is computed in parts (`recovery`). If a version fails, another one computes the batch (`fallback`).
If the engine's process dies, each request is computed once more; if the kernel ended it for lack of memory, in smaller parts, and after
another death in the smallest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from muntin.runtime.inputs import Named
from muntin.runtime.session import Session
from muntin.serving.batching.job import Batch
from muntin.serving.batching.workers import AgainError
from muntin.serving.inference.fallback import compute_somewhere
from muntin.serving.inference.groups import Group
from muntin.serving.inference.recovery import Computed, Recovery
from muntin.serving.versions.slot import Lease, Slot
from muntin.serving.versions.version import Version
from muntin.serving.worker.opening import EngineDiedError, OutOfMemoryError

REVIVE_S = 5.0
"""Seconds that a try waits for the restart of an engine: less than a call may take before it counts as one that hangs."""


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """A request's inputs, the lease on its version, and how it was computed. Times are seconds of the clock.

    `admitted`: when it joined the queue. `started`: when its batch began; `computed`: seconds that took. `by`: the version that computed
    it. `recovered`: how it was computed for lack of memory, or empty. `whole`: inputs and answers of its batch, for a candidate; one
    request of a batch has it. `within`: seconds after which its batch counts as one that hangs. `died`: an engine died while it computed
    this, perhaps because of another request; `deaths`: how many died for lack of memory.
    """

    inputs: Named
    lease: Lease
    admitted: float = 0.0
    started: float = 0.0
    computed: float = 0.0
    batch_rows: int = 0
    by: Version | None = None
    whole: tuple[Named, Named] | None = None
    within: float = inf
    recovered: str = ""
    died: bool = False
    deaths: int = 0

    @property
    def version(self) -> str:
        """Name of the version that computed it."""
        return "" if self.by is None else self.by.name


class Executor:
    """Computes batches for a `Runner`, on any of its threads. `clock`: seconds, the batcher's."""

    def __init__(self, slot: Slot, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slot, self._clock = slot, clock
        self._recovery = Recovery(clock)
        self.recoveries = self._recovery.counts

    def __call__(self, batch: Batch) -> Sequence[Named]:
        """Return an answer for each job, a part of one for all.

        Raises AgainError if each job should be computed once more.
        """
        works: list[Work] = [job.payload for job in batch.jobs]
        group: Any = batch.group
        version, started = group.version, self._clock()
        deaths = max(work.deaths for work in works)
        if deaths and version.state != "failed" and not version.liveness.revive(REVIVE_S):
            raise AgainError(f"version {version.name}: its engine was ended for want of memory, and is being begun again")
        inputs = works[0].inputs if len(works) == 1 else group.joined([work.inputs for work in works])
        tried: list[Session] = []

        def compute(session: Session) -> Computed:
            tried.append(session)
            return self._recovery.compute(session, group, inputs, deaths=deaths)

        try:
            computed, by = compute_somewhere(
                self._slot,
                version,
                compute,
                rows=batch.rows,
                call=group.call(batch.rows),
                within=batch.within,
                whole=lambda computed: not computed.recovered,
            )
        except OutOfMemoryError as error:
            if self._recovery.exhausted(tried[0], group, batch.rows):
                raise
            for work in works:
                work.deaths = deaths + 1
            raise AgainError(str(error)) from error
        except EngineDiedError as error:
            if all(work.died for work in works) or self._clock() - started >= batch.within:  # it was ended because this batch hung
                raise
            for work in works:
                work.died = True
            raise AgainError(str(error)) from error
        seconds = self._clock() - started
        for work in works:
            work.started, work.computed, work.batch_rows = started, seconds, batch.rows
            work.by, work.recovered, work.within = by, computed.recovered, batch.within
        if self._slot.shadowed and not computed.recovered:  # all of the batch: times of single rows and of batches differ
            works[0].whole = inputs, computed.answers
        answers: Sequence[Named] = group.apart(computed.answers, batch.jobs)
        return answers

    def shadow(self, candidate: Version, group: Group, inputs: Any, answer: Any, *, beside: Version, within: float = inf) -> None:
        """Have a leased candidate compute the inputs that `beside` answered, and count how far they agree. `within`: as of `Slot.begin`."""
        if candidate.state == "failed":  # its engine may have been ended, and would be restarted for this
            return
        rows, session = group.rows(inputs), candidate.session
        begun = self._slot.begin(candidate, rows=rows, within=within)
        observe = partial(self._slot.observe, candidate, beside=beside, rows=rows, call=group.call(rows), begun=begun)
        try:
            again: Any = group.compute(session, inputs)
            seconds = self._clock() - begun.at
            observe(agreement=group.agreement(answer, again), seconds=seconds)
        except OSError:  # this process may open no more files, as in `compute_somewhere`
            pass
        except Exception as error:  # noqa: BLE001 - the slot counts and judges it
            observe(error=error)
        finally:
            self._slot.end(begun)
