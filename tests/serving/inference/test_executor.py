"""Batches through sessions: each job gets its rows, also when memory is short or an engine dies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.errors import ArtifactError
from muntin.runtime.session import Session
from muntin.serving.batching.job import Batch, Job
from muntin.serving.batching.workers import AgainError
from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import image_group
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.liveness import Liveness
from muntin.serving.worker.opening import EngineDiedError, OutOfMemoryError
from serving_parts import PixelSession, image_call, random_images


@pytest.fixture
def serving(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Slot, list[Any]]]:
    """`serving(session, ...)`: a slot in which each session has taken over from the one before, and its versions."""

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
        group = image_group(lease.version, rows.shape[1], rows.shape[2], labels=labels)
        jobs.append(Job(group=group, rows=len(rows), payload=Work(inputs={"images": rows}, lease=lease)))
        jobs[-1].arrived = 0.0
    return Batch(tuple(jobs), jobs[0].group, sum(map(len, images)))


@pytest.mark.parametrize("labels", [True, False])
def test_each_job_gets_its_rows(serving: Any, labels: bool) -> None:
    session = PixelSession()
    slot, _ = serving(session)
    images = [random_images(rows, seed) for seed, rows in enumerate((1, 3, 2))]
    batch = batch_of(slot, images, labels=labels)
    answers = Executor(slot)(batch)
    assert session.calls == [(6, 6, 5, 4)]
    for job, rows, answer in zip(batch.jobs, images, answers, strict=True):
        np.testing.assert_array_equal(answer["labels" if labels else "scores"], rows.argmax(3) if labels else rows.transpose(0, 3, 1, 2))
        assert (job.payload.batch_rows, job.payload.version, job.payload.recovered) == (6, "1", "")


def test_single_request_is_not_copied(serving: Any) -> None:
    session = PixelSession()
    slot, _ = serving(session)
    images = random_images(2, 1)
    seen = []
    scores = session.scores
    session.scores = lambda given: seen.append(given) or scores(given)  # type: ignore[method-assign, func-returns-value]
    Executor(slot)(batch_of(slot, [images], labels=True))
    assert seen[0] is images


def test_batch_is_kept_for_a_shadow_once(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot, _ = serving(PixelSession())
    batch = batch_of(slot, [random_images(2, 1), random_images(1, 2)], labels=True)
    Executor(slot)(batch)
    assert [job.payload.whole for job in batch.jobs] == [None, None]
    monkeypatch.setattr(Slot, "shadowed", True)
    Executor(slot)(batch)
    first, second = (job.payload.whole for job in batch.jobs)
    images, answer = first
    assert second is None
    np.testing.assert_array_equal(answer["labels"], images["images"].argmax(3))
    assert len(images["images"]) == 3


def test_times_of_batches_in_one_call(serving: Any) -> None:
    slot, _ = serving(PixelSession(most=60))
    executor = Executor(slot)
    executor(batch_of(slot, [random_images(1, 1), random_images(1, 2)], labels=True))
    executor(batch_of(slot, [random_images(3, 1)], labels=True))  # in rows
    assert slot.current.latencies.calls == (image_call((2, 6, 5), labels=True),)


def test_failure_is_computed_by_the_previous_version(serving: Any) -> None:
    good, new = PixelSession(), PixelSession()
    slot, _ = serving(good, new)
    first, second = (batch_of(slot, [random_images(1, seed)], labels=True) for seed in (1, 2))
    candidate, images, executor = first.group.version, random_images(1, 1), Executor(slot)
    new.error = RuntimeError("engine died")
    for batch in (first, second):  # the version is rolled back after the first: the second is not tried there
        answer, work = executor(batch)[0], batch.jobs[0].payload
        np.testing.assert_array_equal(answer["labels"], work.inputs["images"].argmax(3))
        assert (work.version, len(new.calls), candidate.state) == ("1", 1, "failed")
    executor.shadow(candidate, first.group, {"images": images}, {"labels": images.argmax(3)}, beside=candidate)
    assert len(new.calls) == 1  # its engine may have been ended, and would be restarted for that
    good.error = RuntimeError("this one too")
    with pytest.raises(RuntimeError, match="this one too"):
        executor(batch_of(slot, [random_images(1, 1)], labels=True))


def test_error_of_this_process_counts_against_no_version(serving: Any) -> None:
    """It may open no more files."""
    good, new = PixelSession(), PixelSession()
    slot, _ = serving(good, new)
    new.error = OSError(errno.EMFILE, "Too many open files")
    batch, candidate, images = batch_of(slot, [random_images(1, 1)], labels=True), slot.current, random_images(1, 1)
    executor = Executor(slot)
    executor.shadow(candidate, batch.group, {"images": images}, {"labels": images.argmax(3)}, beside=candidate)
    np.testing.assert_array_equal(executor(batch)[0]["labels"], images.argmax(3))
    assert (len(new.calls), batch.jobs[0].payload.version, slot.current.name) == (2, "1", "2")


# ---- where memory is short ----


def test_recovery_is_reported_for_each_job(serving: Any) -> None:
    slot, _ = serving(PixelSession(most=6000))
    first, others = np.full((1, 130, 96, 4), 7, np.uint8), np.full((2, 130, 96, 4), 131, np.uint8)
    batch = batch_of(slot, [first, others], labels=False)
    answers = Executor(slot)(batch)
    assert [job.payload.recovered for job in batch.jobs] == ["in tiles of 65 pixels"] * 2
    assert [float(answer["scores"].mean()) for answer in answers] == pytest.approx([7, 131])


class Mortal(Liveness, PixelSession):
    """A session whose engine the kernel ends when there is no memory for a call."""

    def __init__(self, **options: Any) -> None:
        Liveness.__init__(self)
        PixelSession.__init__(self, **options)
        self.running = True

    def scores(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            return super().scores(images_BHWC)
        except ArtifactError:
            self.deaths += 1
            raise OutOfMemoryError("its engine has ended") from None

    def revive(self, seconds: float) -> bool:
        return self.running

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and height of the calls since the last time."""
        calls, self.calls = self.calls, []
        return [shape[:2] for shape in calls]  # type: ignore[misc]


def answered(executor: Executor, batch: Batch) -> str:
    """How a batch of one request was computed, tried again after each AgainError."""
    for _ in range(5):
        with suppress(AgainError):
            (answer,) = executor(batch)
            break
    np.testing.assert_allclose(answer["labels"], batch.jobs[0].payload.inputs["images"].argmax(3))
    recovered: str = batch.jobs[0].payload.recovered
    return recovered


def test_rows_after_a_death(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    assert answered(executor, batch_of(slot, [random_images(4, 1)], labels=True)) == "one row at a time"
    assert session.sizes == [(4, 6)] + [(1, 6)] * 4
    assert answered(executor, batch_of(slot, [random_images(4, 3)], labels=True)) == "one row at a time"
    assert session.sizes == [(1, 6)] * 4


def test_smallest_tiles_after_a_second_death(serving: Any) -> None:
    session = Mortal(most=6000)
    slot, _ = serving(session)
    assert answered(Executor(slot), batch_of(slot, [random_images(2, 1, 96, 130)], labels=True)) == "in tiles of 64 pixels"
    assert session.sizes[:2] == [(2, 96), (1, 96)]
    assert session.deaths == 2


def test_jobs_of_a_batch_after_a_death(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [random_images(1, seed) for seed in range(4)], labels=True)
    with pytest.raises(AgainError):
        executor(batch)
    for job in batch.jobs:
        assert answered(executor, Batch((job,), job.group, 1)) == ""
    assert session.sizes == [(4, 6)] + [(1, 6)] * 4


@pytest.mark.parametrize("rows", [1, 3])
def test_third_death_is_an_error(serving: Any, rows: int) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    with pytest.raises(OutOfMemoryError):
        answered(Executor(slot), batch_of(slot, [random_images(rows, 1, 520, 528)], labels=True))
    assert session.deaths == 3


def test_restart_is_awaited(serving: Any) -> None:
    session = Mortal(most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [random_images(4, 1)], labels=True)
    with pytest.raises(AgainError, match="has ended"):
        executor(batch)
    session.running = False
    with pytest.raises(AgainError, match="is being begun again"):
        executor(batch)
    assert session.sizes == [(4, 6)]
    session.running = True
    assert answered(executor, batch) == "one row at a time"


def test_image_without_tiles_is_always_tried(serving: Any) -> None:
    """Two deaths that other calls caused must not shut out the one size of a classifier."""
    session = Mortal(task="classify", most=70)
    slot, _ = serving(session)
    executor = Executor(slot)
    batch = batch_of(slot, [random_images(1, 1, 9, 9)], labels=False)
    for _ in range(3):
        with pytest.raises(OutOfMemoryError):
            executor(batch)
    session.most = 10**9
    executor(batch)
    assert batch.jobs[0].payload.recovered == ""


def test_each_request_survives_one_death(serving: Any) -> None:
    session = PixelSession()
    slot, _ = serving(session)
    executor, batch = Executor(slot), batch_of(slot, [random_images(1, 1)], labels=True)
    session.error = EngineDiedError("the process of its engine has ended")
    with pytest.raises(AgainError, match="has ended"):
        executor(batch)
    with pytest.raises(EngineDiedError):
        executor(batch)
    session.error = None
    assert answered(executor, batch) == ""


def test_request_that_an_engine_was_ended_for(serving: Any) -> None:
    session = PixelSession()
    slot, _ = serving(session)
    session.error = EngineDiedError("ended, because it hung")
    with pytest.raises(EngineDiedError):
        Executor(slot)(replace(batch_of(slot, [random_images(1, 1)], labels=True), within=0.0))
