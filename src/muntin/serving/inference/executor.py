"""Compute a batch with a version's session.

    batch of jobs -> one array (the request's own bytes if it is alone) -> session -> each job's rows of the answer

If the engine finds no memory, the batch is computed in parts (`recovery`). If a version fails, another one computes the batch (`fallback`).
If the kernel ended the engine's process for lack of memory, each request is computed once more, in smaller parts after each death.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.workers import AgainError
from muntin.serving.inference.fallback import compute_somewhere
from muntin.serving.inference.recovery import Parts, Recovery, call, smaller_tile
from muntin.serving.versions.rollout import label_agreement
from muntin.serving.versions.slot import Lease, Slot
from muntin.serving.versions.version import Version
from muntin.serving.worker.opening import Call, OutOfMemoryError

REVIVE_S = 5.0
"""Seconds that a try waits for the restart of an engine: less than a call may take before it counts as one that hangs."""

Sliced = TypeVar("Sliced", NDArray[Any], list[Any])


class Group(NamedTuple):
    """Properties that images must share to be computed in one call. `labels`: labels are requested, and no scores."""

    version: Version
    height: int
    width: int
    labels: bool


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """A request's images (rows, H, W, C), the lease on its version, and how it was computed. Times are seconds of the clock.

    `admitted`: when it joined the queue. `started`: when its batch began; `computed`: seconds that took. `by`: the version that computed
    it. `recovered`: how it was computed for lack of memory, or empty. `parts`: in which it is to be computed. `whole`: images and answers
    of its batch, for a candidate; one request of a batch has it. `within`: seconds after which its batch counts as one that hangs.
    """

    images: NDArray[np.uint8]
    lease: Lease
    admitted: float = 0.0
    started: float = 0.0
    computed: float = 0.0
    batch_rows: int = 0
    by: Version | None = None
    whole: tuple[NDArray[np.uint8], NDArray[Any]] | None = None
    within: float = inf
    parts: Parts = Parts.WHOLE
    recovered: str = ""

    @property
    def version(self) -> str:
        """Name of the version that computed it."""
        return "" if self.by is None else self.by.name


def taken_apart(answer: Sliced, jobs: Iterable[Job]) -> list[Sliced]:
    """Return each job's rows of an answer for all of them, in order."""
    parts, first = [], 0
    for job in jobs:
        parts.append(answer[first : first + job.rows])
        first += job.rows
    return parts


class Executor:
    """Computes batches for a `Runner`, on any of its threads. `clock`: seconds, the batcher's."""

    def __init__(self, slot: Slot, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slot, self._clock = slot, clock
        self._recovery = Recovery(clock)
        self.recoveries = self._recovery.counts

    def __call__(self, batch: Batch) -> Sequence[NDArray[Any]]:
        """Return an answer for each job: labels uint8 (rows, sH, sW) or scores float32 (rows, K, ...), views of one array.

        Raises AgainError if each job should be computed once more.
        """
        works: list[Work] = [job.payload for job in batch.jobs]
        group = batch.group
        assert isinstance(group, Group)
        version, started, parts = group.version, self._clock(), max(work.parts for work in works)
        if parts and version.state != "failed" and not version.liveness.revive(REVIVE_S):
            raise AgainError(f"version {version.name}: its engine was ended for want of memory, and is being begun again")
        images = works[0].images if len(works) == 1 else np.concatenate([work.images for work in works])
        shape = Call((batch.rows, group.height, group.width), group.labels)
        try:
            computed, by = compute_somewhere(
                self._slot,
                version,
                lambda session: self._recovery.compute(session, images, labels=group.labels, parts=parts),
                rows=batch.rows,
                call=shape,
                within=batch.within,
                whole=lambda computed: computed.whole,
            )
        except OutOfMemoryError as error:
            one_image = batch.rows == 1
            if parts == Parts.TILES or (one_image and smaller_tile(version.signature, group.height, group.width) is None):
                raise
            for work in works:
                work.parts = Parts.TILES if one_image or parts == Parts.ROWS else Parts.ROWS
            raise AgainError(str(error)) from error
        seconds = self._clock() - started
        for work, recovered in zip(works, taken_apart(computed.recovered, batch.jobs), strict=True):
            work.started, work.computed, work.batch_rows = started, seconds, batch.rows
            work.by, work.recovered, work.within = by, max(recovered, key=len), batch.within
        if self._slot.shadowed and computed.whole:  # all of the batch: times of single images and of batches differ
            works[0].whole = images, computed.answers
        return taken_apart(computed.answers, batch.jobs)

    def shadow(
        self, candidate: Version, images: NDArray[np.uint8], answer: NDArray[Any], *, labels: bool, beside: Version, within: float = inf
    ) -> None:
        """Have a leased candidate compute the images that `beside` answered, and count how far they agree. `within`: as of `Slot.begin`."""
        if candidate.state == "failed":  # its engine may have been ended, and would be restarted for this
            return
        shape = Call((images.shape[0], images.shape[1], images.shape[2]), labels)
        begun = self._slot.begin(candidate, rows=len(images), within=within)
        observe = partial(self._slot.observe, candidate, beside=beside, rows=len(images), call=shape, begun=begun)
        try:
            again = call(candidate.session, images, labels=labels)
            seconds = self._clock() - begun.at
            observe(agreement=label_agreement(answer, again, candidate.signature, labels=labels), seconds=seconds)
        except OSError:  # this process may open no more files, as in `compute_somewhere`
            pass
        except Exception as error:  # noqa: BLE001 - the slot counts and judges it
            observe(error=error)
        finally:
            self._slot.end(begun)
