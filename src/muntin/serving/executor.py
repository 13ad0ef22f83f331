"""A batch through a version's session: rows put together, computed, taken apart; and what is done where memory is short.

    batch of jobs -> one array (the request's own bytes where it is alone) -> session -> a share of the answer for each job

Where the engine finds no memory for a batch, its rows are computed one at a time, and where that fails too, in tiles: what was done is
said in the answers and counted. The kernel may also end the engine's process for it, as Linux does in place of refusing. Where no other
version can compute the batch then, each of its requests is asked for once more when the engine is there again, and in smaller parts after
each death. Whatever else an engine raises is held against its version where another one, which the slot names, can compute the batch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError, MuntinError, VerificationError
from muntin.runtime import Session, predict
from muntin.runtime.memory import no_memory
from muntin.serving.batcher import Batch, Job
from muntin.serving.compiler import Compiler
from muntin.serving.opening import Call, EngineDiedError, NotReadyError, OutOfMemoryError
from muntin.serving.rollout import label_agreement
from muntin.serving.runner import AgainError
from muntin.serving.slot import Lease, Slot
from muntin.serving.version import Begun, Version

TILE = 512
"""Pixels of the side of the tiles that an image is computed in when there is no memory for it in one piece."""
SHORT_S = 60.0
"""What was too much for the memory is not tried again before: each try may cost an engine, and seconds to begin another one."""
SUSPECTS = 16
"""Calls that are remembered for having been computed when an engine was ended for want of memory."""
REVIVE_S = 5.0
"""What an engine that was ended so is waited for at a time: less than a call may take before it counts as one that hangs."""
WHOLE, ALONE, ROWS, TILES = range(4)
"""How a request is to be computed: with others or alone, one row at a time, in tiles."""
NOT_THE_CALLS = (EngineDiedError, NotReadyError, VerificationError)
"""Errors that are no call's fault, whatever their words: an engine that cannot be begun has no memory, too."""
_Kind = tuple[bool, bool]
"""Labels; one image."""

Answer = TypeVar("Answer")
Sliced = TypeVar("Sliced", NDArray[Any], list[Any])


class Group(NamedTuple):
    """What has to be equal for images to be computed in one call. `labels`: labels are wanted, and no scores."""

    version: Version
    height: int
    width: int
    labels: bool


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """A request's images (rows, H, W, C) and the lease on its version; once computed, how that went. Times are seconds of the clock."""

    images: NDArray[np.uint8]
    lease: Lease
    admitted: float = 0.0
    """When it joined the queue."""
    started: float = 0.0
    """When its batch began to be computed."""
    computed: float = 0.0
    """How long that took."""
    batch_rows: int = 0
    by: Version | None = None
    """The version that computed it: another one than the lease's where that failed."""
    whole: tuple[NDArray[np.uint8], NDArray[Any]] | None = None
    """Of its batch all images and all of the answer, for a candidate to compute once more; one request of a batch has it."""
    within: float = inf
    """Seconds after which its batch would have counted as one that does not come back."""
    way: int = WHOLE
    """In which it is to be computed: in smaller parts after each death of an engine for want of memory."""
    recovered: str = ""
    """What was done for want of memory; empty: nothing."""

    @property
    def version(self) -> str:
        """Name of the version that computed it."""
        return "" if self.by is None else self.by.name


def taken_apart(answer: Sliced, jobs: Iterable[Job]) -> list[Sliced]:
    """Each job's rows of what was computed for all of them, in order."""
    parts, first = [], 0
    for job in jobs:
        parts.append(answer[first : first + job.rows])
        first += job.rows
    return parts


@dataclass(kw_only=True)
class Recoveries:
    """How often memory was short, and what was done: rows one at a time, an image in tiles."""

    rows: int = 0
    tiles: int = 0


class Shortages:
    """Which calls found no memory within the last `SHORT_S`: as many pixels are too many. `clock`: seconds.

    Kept by session, and apart for scores and labels, and for one image and several.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._least: WeakKeyDictionary[Session, dict[_Kind, tuple[int, float]]] = WeakKeyDictionary()
        self._died: WeakKeyDictionary[Session, OrderedDict[tuple[_Kind, int], tuple[int, float]]] = WeakKeyDictionary()

    def refused(self, session: Session, kind: _Kind, pixels: int) -> None:
        """There was none for so many pixels in one call."""
        if pixels < self._known(session, kind):
            self._least.setdefault(session, {})[kind] = pixels, self._clock()

    def died(self, session: Session, kind: _Kind, pixels: int, process: int) -> None:
        """The engine's `process` was ended for want of it in such a call. The second process counts: at the first it may have been a call
        beside it that took too much."""
        now, died = self._clock(), self._died.setdefault(session, OrderedDict())
        before, when = died.pop((kind, pixels), (process, now))
        if before != process and now - when < SHORT_S:
            self.refused(session, kind, pixels)
            return
        died[kind, pixels] = process, now
        if len(died) > SUSPECTS:
            died.popitem(last=False)

    def too_many(self, session: Session, kind: _Kind, pixels: int) -> bool:
        """Whether a call of so many pixels is not to be tried now."""
        return pixels >= self._known(session, kind)

    def _known(self, session: Session, kind: _Kind) -> float:
        least, noted = self._least.get(session, {}).get(kind, (inf, 0.0))
        return least if self._clock() - noted < SHORT_S else inf


class Executor:
    """Computes batches for a `Runner`, on any of its threads. `clock`: seconds, the batcher's.

    `compiler`: is told of every batch, to compile for the sizes that come often.
    """

    def __init__(self, slot: Slot, *, compiler: Compiler | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.recoveries = Recoveries()
        self._slot, self._clock = slot, clock
        self._shortages = Shortages(clock)
        self._compiler = compiler

    def __call__(self, batch: Batch) -> Sequence[NDArray[Any]]:
        """An answer for each job: labels uint8 (rows, sH, sW) or scores float32 (rows, K, ...), views of one array."""
        works: list[Work] = [job.payload for job in batch.jobs]
        group = batch.group
        assert isinstance(group, Group)
        started, way = self._clock(), max(work.way for work in works)
        if way and group.version.state != "failed" and not group.version.session.revive(REVIVE_S):
            raise AgainError(f"version {group.version.name}: its engine was ended for want of memory, and is being begun again")
        images = _together(works)
        call = Call((batch.rows, group.height, group.width), group.labels)
        try:
            (answers, said), version = compute_somewhere(
                self._slot,
                group.version,
                lambda session: self._compute_for(batch.jobs, session, images, labels=group.labels, way=way),
                rows=batch.rows,
                call=call,
                within=batch.within,
                whole=lambda found: not any(found[1]),
            )
        except OutOfMemoryError as error:
            alone = len(works) == batch.rows == 1
            if way == TILES or (alone and not _has_tiles(group.version.signature, group.height, group.width)):
                raise
            for work in works:
                work.way = TILES if alone or way == ROWS else (ROWS if len(works) == 1 else ALONE)
            raise AgainError(str(error)) from error
        computed, whole = self._clock() - started, not any(said)
        if self._compiler is not None and whole:
            self._compiler.note(version, call)
        for work, rows in zip(works, taken_apart(said, batch.jobs), strict=True):
            work.started, work.computed, work.batch_rows = started, computed, batch.rows
            work.by, work.recovered, work.within = version, max(rows, key=len), batch.within
        if not isinstance(answers, np.ndarray):
            return answers
        if self._slot.shadowed and images is not None and whole:  # the whole of it: single images take their time otherwise than batches do
            works[0].whole = images, answers
        return taken_apart(answers, batch.jobs)

    def shadow(
        self, candidate: Version, images: NDArray[np.uint8], answer: NDArray[Any], *, labels: bool, beside: Version, within: float = inf
    ) -> None:
        """Has a candidate, which the caller has a lease on, compute what `beside` answered, and tells the slot how far both agree.

        `within`: as of `Slot.begin`. Of one that was sent back meanwhile nothing more is asked.
        """
        if candidate.state == "failed":  # its engine may have been ended, and would be begun again for this
            return
        call = Call((images.shape[0], images.shape[1], images.shape[2]), labels)
        begun = self._slot.begin(candidate, rows=len(images), within=within)
        observe = partial(self._slot.observe, candidate, beside=beside, rows=len(images), call=call, begun=begun)
        try:
            again = _call(candidate.session, images, labels=labels)
        except OSError:  # this process lacks files then, as in `compute_somewhere`
            pass
        except Exception as error:  # noqa: BLE001 - the slot counts it, and judges
            observe(agreement=None, seconds=self._clock() - begun.at, error=error)
        else:
            seconds = self._clock() - begun.at
            observe(agreement=label_agreement(answer, again, candidate.signature, labels=labels), seconds=seconds)
        finally:
            self._slot.end(begun)

    def _compute_for(
        self, jobs: Sequence[Job], session: Session, images: NDArray[np.uint8] | None, *, labels: bool, way: int
    ) -> tuple[NDArray[Any] | list[NDArray[Any]], list[str]]:
        """The answer to all of the jobs' images; to each job's, where there was no memory to put them together."""
        if images is not None:
            return self._compute(session, images, labels=labels, way=way)
        self.recoveries.rows += 1
        parts = [self._compute(session, job.payload.images, labels=labels, way=way) for job in jobs]
        return [answer for answer, _ in parts], [said or "one request at a time" for _, rows in parts for said in rows]

    def _compute(self, session: Session, images: NDArray[np.uint8], *, labels: bool, way: int) -> tuple[NDArray[Any], list[str]]:
        """The answer, and of each row what was done for want of memory. `way`: to begin with."""
        kind, pixels = (labels, len(images) == 1), images.size // images.shape[3]
        height, width = images.shape[1:3]
        parts = len(images) > 1 or _has_tiles(session.signature, height, width)
        small = way >= (TILES if len(images) == 1 else ROWS) or self._shortages.too_many(session, kind, pixels)
        if not (parts and small):
            try:
                return _call(session, images, labels=labels), [""] * len(images)
            except OutOfMemoryError as error:
                self._shortages.died(session, kind, pixels, error.process)
                raise
            except Exception as error:
                if isinstance(error, NOT_THE_CALLS) or not no_memory(error):
                    raise
                self._shortages.refused(session, kind, pixels)
        if len(images) > 1:
            self.recoveries.rows += 1
            rows = [self._compute(session, images[n : n + 1], labels=labels, way=way) for n in range(len(images))]
            return np.concatenate([row for row, _ in rows]), [said or "one row at a time" for _, (said,) in rows]
        if not parts:
            raise MuntinError(f"no memory for one image of {width}x{height}: send smaller ones, or try again later")
        self.recoveries.tiles += 1
        tile = min(TILE, (max(height, width) + 1) // 2)
        answer = predict(session, images[0], tile=tile, output="labels" if labels else "scores")
        return answer[None], [f"in tiles of {tile} pixels"]


def _has_tiles(signature: Signature, height: int, width: int) -> bool:
    """Whether one image can be computed in parts."""
    return signature.task != "classify" and max(height, width) > 1


def _together(works: Sequence[Work]) -> NDArray[np.uint8] | None:
    """The images of all of them; None where there is no memory for that."""
    if len(works) == 1:
        return works[0].images
    try:
        return np.concatenate([work.images for work in works])
    except MemoryError:
        return None


def compute_somewhere(
    slot: Slot,
    version: Version,
    work: Callable[[Session], Answer],
    *,
    rows: int,
    call: Call | None = None,
    within: float = inf,
    whole: Callable[[Answer], bool] = lambda answer: True,
) -> tuple[Answer, Version]:
    """`work(session)` of a version that the caller has a lease on, or of one that can where this one fails; and which one did.

    Counts it (`Slot.observe`). A failure counts against a version only if another one could compute the same: what none can is the
    images' fault, and a client must not be able to send a version back with them. Nor does an OSError: this process lacks files then.
    `within`: as of `Slot.begin`; a version that hangs, or was sent back since, is not asked where there is another one. `whole`: whether
    an answer came from one call. Raises what `work` raised first, and DataError at once.
    """
    failures: list[tuple[Begun, Exception]] = []

    def count(failures: list[tuple[Begun, Exception]]) -> None:
        for failed, error in failures:
            if isinstance(error, OSError):
                continue
            slot.observe(failed.version, rows=rows, error=error, call=call, begun=failed)

    try:
        with ExitStack() as held:
            while (slot.hangs(version) or version.state == "failed") and (lease := slot.fallback(version)) is not None:
                version = held.enter_context(lease).version
            while True:
                begun = slot.begin(version, rows=rows, within=within)
                try:
                    answer = work(version.session)
                except DataError:
                    raise
                except Exception as error:  # noqa: BLE001 - it is raised below, if no other version can
                    failures.append((begun, error))
                else:
                    slot.observe(version, seconds=slot.clock() - begun.at, rows=rows, call=call, begun=begun, whole=whole(answer))
                    count(failures)
                    return answer, version
                finally:
                    slot.end(begun)
                lease = slot.fallback(version)
                if lease is None:
                    break
                version = held.enter_context(lease).version
        count(failures[-1:])
        raise failures[0][1]
    finally:
        failures.clear()  # an error holds this frame by its traceback, and with it the images


def _call(session: Session, images: NDArray[np.uint8], *, labels: bool) -> NDArray[Any]:
    return session.labels(images) if labels else session(images)
