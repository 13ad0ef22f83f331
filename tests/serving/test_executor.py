"""Batches through sessions: rows to their owners, and what happens when memory is short or an engine dies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.errors import ArtifactError, MuntinError, VerificationError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import ExecutedLayer, Session
from muntin.serving.batcher import Batch, Job
from muntin.serving.compiler import Compiler
from muntin.serving.executor import SHORT_S, Executor, Group, Shortages, Work, no_memory
from muntin.serving.rollout import Rollout
from muntin.serving.runner import AgainError
from muntin.serving.slot import Slot
from muntin.serving.version import Call, OutOfMemoryError, Version

CLASSES = tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in ("a", "b", "c", "d"))


class Pixels(Session):
    """Scores of a pixel are its channels, so its label is its brightest one. `most`: rows times pixels that there is memory for."""

    def __init__(self, task: str = "segment", most: int = 10**9) -> None:
        super().__init__(signature=Signature(task=task, channels=4, classes=CLASSES), engine="none", precision="f32", threads=1)
        self.most = most
        self.calls: list[tuple[int, ...]] = []
        self.error: Exception | None = None

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.calls.append(images_BHWC.shape)
        if self.error is not None:
            raise self.error
        if images_BHWC.size // 4 > self.most:
            raise ArtifactError("x: the model failed: Exception from src/inference: std::bad_alloc")  # as engines' errors come
        scores = images_BHWC.transpose(0, 3, 1, 2).astype(np.float32)
        return scores.mean((2, 3)) if self.signature.task == "classify" else scores

    def layers(self) -> list[ExecutedLayer]:
        return []


def images_of(rows: int, seed: int, height: int = 6, width: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 4)).astype(np.uint8)


@pytest.fixture
def serving(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Slot, list[Any]]]:
    """`serving(session, ...)`: a slot that has taken one after the other over, and its versions."""

    def make(*sessions: Session) -> tuple[Slot, list[Any]]:
        slot = Slot("m", shelf, rollout=Rollout())
        versions = []
        for number, session in enumerate(sessions, 1):
            shelf.signatures[str(number)] = session.signature
            version = slot.load(Path(str(number)), str(number))
            monkeypatch.setattr(version, "_session", session)
            versions.append(version)
        return slot, versions

    return make


def batch_of(slot: Slot, images: list[NDArray[np.uint8]], *, labels: bool, version: str | None = None) -> Batch:
    jobs = []
    for rows in images:
        lease = slot.lease(version)
        group = Group(lease.version, rows.shape[1], rows.shape[2], labels)
        jobs.append(Job(group=group, rows=len(rows), payload=Work(images=rows, lease=lease)))
        jobs[-1].arrived = 0.0
    return Batch(tuple(jobs), jobs[0].group, sum(map(len, images)))


@pytest.mark.parametrize("labels", [True, False])
def test_every_job_gets_its_own_rows(serving: Any, labels: bool) -> None:
    session = Pixels()
    slot, _ = serving(session)
    images = [images_of(rows, seed) for seed, rows in enumerate((1, 3, 2))]
    batch = batch_of(slot, images, labels=labels)
    answers = Executor(slot)(batch)
    assert session.calls == [(6, 6, 5, 4)]
    for job, rows, answer in zip(batch.jobs, images, answers, strict=True):
        np.testing.assert_array_equal(answer, rows.argmax(3) if labels else rows.transpose(0, 3, 1, 2))
        assert (job.payload.batch_rows, job.payload.version, job.payload.recovered) == (6, "1", "")


def test_a_request_alone_is_computed_from_its_own_bytes(serving: Any) -> None:
    session = Pixels()
    slot, _ = serving(session)
    images = images_of(2, 1)
    seen = []
    session._infer_labels = lambda given: seen.append(given) or given.argmax(3).astype(np.uint8)  # type: ignore[method-assign, func-returns-value]
    Executor(slot)(batch_of(slot, [images], labels=True))
    assert seen[0] is images


def test_without_memory_for_a_batch_its_rows_are_computed_one_by_one(serving: Any) -> None:
    session = Pixels(most=30)
    slot, _ = serving(session)
    images = [images_of(2, 1), images_of(1, 2)]
    batch = batch_of(slot, images, labels=False)
    executor = Executor(slot)
    answers = executor(batch)
    for rows, answer in zip(images, answers, strict=True):
        np.testing.assert_array_equal(answer, rows.transpose(0, 3, 1, 2))
    assert session.calls == [(3, 6, 5, 4)] + [(1, 6, 5, 4)] * 3
    assert {job.payload.recovered for job in batch.jobs} == {"one row at a time"}
    assert (executor.recoveries.rows, executor.recoveries.tiles) == (1, 0)


def test_who_is_computed_whole_is_not_told_what_another_one_of_its_batch_needed(serving: Any) -> None:
    class Moody(Pixels):
        def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            if len(images_BHWC) > 1 or (images_BHWC.max() == 255 and images_BHWC.shape[1] > 20):
                raise MemoryError
            return super()._infer(images_BHWC)

    slot, _ = serving(Moody())
    easy, hard = np.full((1, 30, 34, 4), 7, np.uint8), np.full((1, 30, 34, 4), 255, np.uint8)
    batch = batch_of(slot, [easy, np.concatenate([hard, easy])], labels=False)
    answers = Executor(slot)(batch)
    assert [job.payload.recovered for job in batch.jobs] == ["one row at a time", "in tiles of 17 pixels"]
    assert [float(answer.mean()) for answer in answers] == pytest.approx([7, 131])


@pytest.mark.parametrize("labels", [True, False])
def test_without_memory_for_an_image_it_is_computed_in_tiles(serving: Any, labels: bool) -> None:
    session = Pixels(most=400)
    slot, _ = serving(session)
    images = [images_of(1, 1, 30, 34), images_of(2, 2, 30, 34)]
    batch = batch_of(slot, images, labels=labels)
    executor = Executor(slot)
    answers = executor(batch)
    for rows, answer in zip(images, answers, strict=True):
        wanted = rows.argmax(3) if labels else rows.transpose(0, 3, 1, 2)
        np.testing.assert_allclose(answer, wanted, atol=1e-3)
    assert {job.payload.recovered for job in batch.jobs} == {"in tiles of 17 pixels"}
    assert (executor.recoveries.rows, executor.recoveries.tiles) == (1, 3)
    assert list(slot.current.latencies.calls) == [Call((3, 30, 34), labels)]  # it counts as computed
    assert slot.current.latencies.examples == {}  # but no other version is asked to do it in one call


def test_what_was_too_much_is_not_tried_again_for_a_while(serving: Any) -> None:
    """A try may cost an engine."""
    session = Pixels(most=70)
    slot, _ = serving(session)
    now = 0.0
    executor = Executor(slot, clock=lambda: now)

    def calls_for(rows: int, *, labels: bool = True) -> list[int]:
        session.calls.clear()
        batch = batch_of(slot, [images_of(rows, 1)], labels=labels)
        (answer,) = executor(batch)
        assert answer.shape[0] == rows
        assert batch.jobs[0].payload.recovered == ("" if len(session.calls) == 1 else "one row at a time")
        return [shape[0] for shape in session.calls]

    assert calls_for(4) == [4, 1, 1, 1, 1]
    assert calls_for(4) == [1, 1, 1, 1]
    assert calls_for(5) == [1] * 5
    assert calls_for(3) == [3, 1, 1, 1]  # fewer may fit, and are known not to now
    assert calls_for(3) == [1, 1, 1]
    assert calls_for(2) == [2]
    assert calls_for(3, labels=False) == [3, 1, 1, 1]  # another answer needs other memory
    now = SHORT_S
    session.most = 10**9
    assert calls_for(4) == [4]


class Mortal(Pixels):
    """As one whose engine the kernel ends where there is no memory for a call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.deaths = 0
        self.there = True

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            return super()._infer(images_BHWC)
        except ArtifactError:
            self.deaths += 1
            raise OutOfMemoryError("its engine has ended", process=self.deaths) from None

    def revive(self, seconds: float) -> bool:
        return self.there

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and height of what it was asked since the last time."""
        calls, self.calls = self.calls, []
        return [shape[:2] for shape in calls]  # type: ignore[misc]


def answered(executor: Executor, batch: Batch) -> str:
    """What was done for a batch of one request, that is asked again as long as it is to be."""
    for _ in range(5):
        with suppress(AgainError):
            (answer,) = executor(batch)
            break
    np.testing.assert_allclose(answer, batch.jobs[0].payload.images.argmax(3))
    recovered: str = batch.jobs[0].payload.recovered
    return recovered


def test_after_a_death_for_want_of_memory_a_batch_is_computed_in_rows(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    assert answered(executor, batch_of(slot, [images_of(4, 1)], labels=True)) == "one row at a time"
    assert session.sizes == [(4, 6)] + [(1, 6)] * 4
    assert answered(executor, batch_of(slot, [images_of(4, 2)], labels=True)) == "one row at a time"
    assert session.sizes == [(4, 6)] + [(1, 6)] * 4  # at the first death another call may have taken it
    assert answered(executor, batch_of(slot, [images_of(4, 3)], labels=True)) == "one row at a time"
    assert session.sizes == [(1, 6)] * 4


def test_after_a_second_death_a_batch_is_computed_in_tiles(serving: Any) -> None:
    session = Mortal(most=300)
    slot, _ = serving(session)
    executor = Executor(slot)
    assert answered(executor, batch_of(slot, [images_of(2, 1, 30, 34)], labels=True)) == "in tiles of 17 pixels"
    assert session.sizes[:2] == [(2, 30), (1, 30)]
    assert session.deaths == 2


def test_requests_that_an_engine_died_with_are_each_asked_whole(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [images_of(2, 1), images_of(2, 2)], labels=True)
    with pytest.raises(AgainError):
        executor(batch)
    for job in batch.jobs:
        assert answered(executor, Batch((job,), job.group, 2)) == ""
    assert session.sizes == [(4, 6), (2, 6), (2, 6)]


def test_an_image_that_an_engine_dies_with_in_tiles_too_is_not_answered(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    with pytest.raises(OutOfMemoryError):
        answered(Executor(slot), batch_of(slot, [images_of(1, 1, 30, 34)], labels=True))
    assert session.deaths == 2


def test_an_engine_that_is_not_there_yet_is_waited_for(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [images_of(4, 1)], labels=True)
    with pytest.raises(AgainError, match="has ended"):
        executor(batch)
    session.there = False
    with pytest.raises(AgainError, match="is being begun again"):
        executor(batch)
    assert session.sizes == [(4, 6)]
    session.there = True
    assert answered(executor, batch) == "one row at a time"


def test_what_has_no_parts_is_always_tried(serving: Any) -> None:
    """Two deaths that others brought about must not shut out the one size that a classifier is asked for."""
    session = Mortal(task="classify", most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [images_of(1, 1, 9, 9)], labels=False)
    for _ in range(3):
        with pytest.raises(OutOfMemoryError):
            executor(batch)
    session.most = 10**9
    executor(batch)
    assert batch.jobs[0].payload.recovered == ""


def test_a_death_counts_once_for_two_calls_alike(serving: Any) -> None:
    shortages, session = Shortages(lambda: 0.0), Mortal()
    kind = (True, True)
    for process in (7, 7):
        shortages.died(session, kind, 100, process)
        assert not shortages.too_many(session, kind, 100)
    shortages.died(session, kind, 100, 8)
    assert shortages.too_many(session, kind, 100)
    assert not shortages.too_many(session, kind, 99)
    assert not shortages.too_many(session, (True, False), 100)


def test_where_an_engine_cannot_be_begun_the_call_is_not_to_blame(serving: Any) -> None:
    session = Pixels()
    session.error = VerificationError("its engine ended the process that opened it: signal 9, Killed: out of memory")
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [images_of(4, 1)], labels=True)
    with pytest.raises(VerificationError):
        executor(batch)
    session.error = None
    executor(batch)
    assert batch.jobs[0].payload.recovered == ""


def test_what_was_computed_in_parts_is_no_example_for_another_version(serving: Any) -> None:
    slot, _ = serving(Pixels(most=30))
    noted: list[Call] = []

    class Noting(Compiler):
        def note(self, version: Version, call: Call) -> None:
            noted.append(call)

    executor = Executor(slot, compiler=Noting(SessionOptions()))
    for rows in (1, 3):
        batch = batch_of(slot, [images_of(rows, 1)], labels=True)
        executor(batch)
    assert noted == list(slot.current.latencies.examples) == [Call((1, 6, 5), True)]


def test_a_picture_that_cannot_be_computed_in_parts_is_refused(serving: Any) -> None:
    slot, _ = serving(Pixels("classify", most=20))
    with pytest.raises(MuntinError, match="no memory for one image of 5x6"):
        Executor(slot)(batch_of(slot, [images_of(1, 1)], labels=False))


def test_another_failure_is_the_slots(serving: Any) -> None:
    good, dead = Pixels(), Pixels()
    slot, _ = serving(good, dead)
    dead.error = RuntimeError("engine died")
    batch = batch_of(slot, [images_of(1, 1)], labels=True)
    np.testing.assert_array_equal(Executor(slot)(batch)[0], images_of(1, 1).argmax(3))
    assert batch.jobs[0].payload.version == "1"
    good.error = RuntimeError("this one too")
    with pytest.raises(RuntimeError):
        Executor(slot)(batch_of(slot, [images_of(1, 1)], labels=True))


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 5"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("x"), False),
    ],
)
def test_want_of_memory_is_recognised(error: Exception, short: bool) -> None:
    assert no_memory(error) is short


def test_a_batch_that_a_candidate_may_compute_again_is_kept_whole_once(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, _ = serving(Pixels())
    batch = batch_of(slot, [images_of(2, 1), images_of(1, 2)], labels=True)
    Executor(slot)(batch)
    assert [job.payload.whole for job in batch.jobs] == [None, None]
    monkeypatch.setattr(Slot, "shadowed", True)
    Executor(slot)(batch)
    first, second = (job.payload.whole for job in batch.jobs)
    images, answer = first
    assert second is None
    np.testing.assert_array_equal(answer, images.argmax(3))
    assert len(images) == 3


def test_a_compiler_is_told_what_was_computed(serving: Any) -> None:
    told: list[Any] = []

    class Told(Compiler):
        def note(self, version: Version, call: Call) -> None:
            told.append((version.name, call))

    slot, _ = serving(Pixels())
    Executor(slot, compiler=Told(SessionOptions()))(batch_of(slot, [images_of(2, 1), images_of(1, 2)], labels=True))
    assert told == [("1", Call((3, 6, 5), True))]


def test_without_memory_to_put_a_batch_together_each_request_is_computed_alone(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise MemoryError

    session = Pixels()
    slot, _ = serving(session)
    images = [images_of(2, 1), images_of(1, 2)]
    batch = batch_of(slot, images, labels=True)
    executor = Executor(slot)
    with monkeypatch.context() as patch:
        patch.setattr(np, "concatenate", no_room)
        answers = executor(batch)
    for rows, answer in zip(images, answers, strict=True):
        np.testing.assert_array_equal(answer, rows.argmax(3))
    assert session.calls == [(2, 6, 5, 4), (1, 6, 5, 4)]
    assert {job.payload.recovered for job in batch.jobs} == {"one request at a time"}
    assert executor.recoveries.rows == 1


def test_what_waits_for_a_version_that_was_rolled_back_is_not_asked_of_it(serving: Any) -> None:
    good, dead = Pixels(), Pixels()
    slot, _ = serving(good, dead)
    first, second = (batch_of(slot, [images_of(1, seed)], labels=True) for seed in (1, 2))
    dead.error = RuntimeError("engine died")
    executor = Executor(slot)
    executor(first)
    assert slot.current.name == "1"
    np.testing.assert_array_equal(executor(second)[0], images_of(1, 2).argmax(3))
    assert (second.jobs[0].payload.version, len(dead.calls)) == ("1", 1)


def test_a_candidate_that_was_sent_back_computes_no_shadow_any_more(serving: Any) -> None:
    """Its engine may have been ended, and would be begun again for that."""
    good, dead = Pixels(), Pixels()
    slot, _ = serving(good, dead)
    batch = batch_of(slot, [images_of(1, 1)], labels=True)
    candidate, images = batch.group.version, images_of(1, 1)
    executor = Executor(slot)
    executor.shadow(candidate, images, images.argmax(3), labels=True, beside=candidate)
    assert len(dead.calls) == 1
    dead.error = RuntimeError("engine died")
    executor(batch)
    assert (candidate.state, len(dead.calls)) == ("failed", 2)
    executor.shadow(candidate, images, images.argmax(3), labels=True, beside=candidate)
    assert len(dead.calls) == 2


def test_that_this_process_lacks_files_is_held_against_no_shadow(serving: Any) -> None:
    slot, _ = serving(Pixels(), new := Pixels())
    new.error = OSError(errno.EMFILE, "Too many open files")
    candidate, images = slot.current, images_of(1, 1)
    Executor(slot).shadow(candidate, images, images.argmax(3), labels=True, beside=candidate)
    assert (len(new.calls), candidate.state, candidate.leases) == (1, "ready", 0)


def test_that_this_process_lacks_files_is_held_against_no_version(serving: Any) -> None:
    good, new = Pixels(), Pixels()
    slot, _ = serving(good, new)
    new.error = OSError(errno.EMFILE, "Too many open files")
    batch = batch_of(slot, [images_of(1, 1)], labels=True)
    np.testing.assert_array_equal(Executor(slot)(batch)[0], images_of(1, 1).argmax(3))
    assert (batch.jobs[0].payload.version, slot.current.name) == ("1", "2")
