"""A batcher with real threads: every job is answered once, whatever the engine and the callbacks do."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.job import Batch, Job, Refusal
from muntin.serving.batching.latency_model import LatencyModel
from muntin.serving.batching.workers import HANGING, TRIES, AgainError, BatchAnswer, EngineError, Runner

LONG = 30.0
"""Seconds after which a test fails."""


def batcher_of(**options: Any) -> Batcher:
    return Batcher(LatencyModel(), **({"objective": None, "max_rows": 8, "queue_rows": 10_000, "queue_bytes": 1 << 30} | options))


def doubled(batch: Batch) -> list[Any]:
    return [2 * job.payload for job in batch.jobs]


@contextmanager
def running(execute: Callable[[Batch], Any] = doubled, *, workers: int = 1, **options: Any) -> Iterator[Runner]:
    runner = Runner(batcher_of(workers=workers, **options), execute)
    try:
        yield runner
    finally:
        assert runner.close(LONG)


class Answers:
    """Collects answers by job."""

    def __init__(self) -> None:
        self.by_job: dict[Job, list[BatchAnswer]] = {}
        self._changed = threading.Condition()
        self._count = 0

    def submit(self, runner: Runner, *jobs: Job) -> None:
        for job in jobs:
            refusal = runner.submit(job, lambda answer, job=job: self._take(job, answer))  # type: ignore[misc]
            if refusal is not None:
                self._take(job, refusal)

    def _take(self, job: Job, answer: BatchAnswer) -> None:
        with self._changed:
            self.by_job.setdefault(job, []).append(answer)
            self._count += 1
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, LONG)

    def of(self, job: Job) -> BatchAnswer:
        (answer,) = self.by_job[job]
        return answer


class Gate:
    """An engine that computes nothing until `open` is set."""

    def __init__(self, execute: Callable[[Batch], Any] = doubled) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.batches: list[Batch] = []
        self._execute = execute

    def __call__(self, batch: Batch) -> Any:
        self.batches.append(batch)
        self.entered.release()
        assert self.open.wait(LONG)
        return self._execute(batch)


def jobs_of(count: int, **fields: Any) -> list[Job]:
    return [Job(**({"group": "g", "payload": number} | fields)) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_of_several_threads_are_answered_once(workers: int) -> None:
    answers = Answers()
    jobs = [Job(group=number % 3, rows=1 + number % 2, priority=number % 2, payload=number) for number in range(2000)]
    with running(workers=workers) as runner:

        def submit(quarter: list[Job]) -> None:
            for job in quarter:
                answers.submit(runner, job)

        threads = [threading.Thread(target=submit, args=(jobs[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers.wait(len(jobs))
    assert all(answers.of(job) == 2 * job.payload for job in jobs)
    snapshot = runner.snapshot()
    assert (snapshot.admitted, snapshot.finished, snapshot.waiting_jobs, snapshot.running_batches) == (2000, 2000, 0, 0)
    assert not runner._done


def test_refused_job() -> None:
    (large,) = jobs_of(1, rows=9)
    with running() as runner:
        refusal = runner.submit(large, lambda answer: pytest.fail("it was answered"))
        assert isinstance(refusal, Refusal)
        assert refusal.kind == "too large"
        assert not runner._done


def teach(runner: Runner) -> None:
    """Make batches of several jobs worthwhile from the first on."""
    for _ in range(3):
        for rows in (1, 2, 4, 8):
            runner._batcher._queue.latencies.observe("g", rows, 0.001 + rows / 1e5)


def answered_together(execute: Callable[[Batch], Any], jobs: list[Job]) -> tuple[Answers, list[Batch]]:
    """Answers of jobs that share a batch, and the batches tried for them."""
    first, *_ = jobs_of(1)
    seen: list[Batch] = []
    gate = Gate(lambda batch: [None] if batch.jobs[0] is first else (seen.append(batch), execute(batch))[1])
    answers = Answers()
    with running(gate) as runner:
        teach(runner)
        answers.submit(runner, first)
        assert gate.entered.acquire(timeout=LONG)
        answers.submit(runner, *jobs)
        gate.open.set()
        answers.wait(1 + len(jobs))
    assert runner.snapshot().finished == 1 + len(jobs)
    return answers, seen


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_bad_request_fails_alone(kind: type[Exception]) -> None:
    def execute(batch: Batch) -> list[Any]:
        if any(job.payload == 3 for job in batch.jobs):
            raise kind("three")
        return doubled(batch)

    jobs = jobs_of(6)
    answers, seen = answered_together(execute, jobs)
    assert [len(batch.jobs) for batch in seen] == [6, 1, 1, 1, 1, 1, 1]
    assert str(answers.of(jobs[3])) == "three"
    assert [answers.of(job) for job in jobs if job.payload != 3] == [0, 2, 4, 8, 10]


@pytest.mark.parametrize("count", [1, 2])
def test_again_error_is_tried_alone(count: int) -> None:
    tries = 0

    def execute(batch: Batch) -> list[Any]:
        nonlocal tries
        tries += 1
        if len(batch.jobs) > 1 or tries < 3 or batch.jobs[0].payload == 1:
            raise AgainError("once more")
        return doubled(batch)

    jobs = jobs_of(count)
    answers, seen = answered_together(execute, jobs)
    assert answers.of(jobs[0]) == 0
    assert [[job.payload for job in batch.jobs] for batch in seen[:3]] == [list(range(count)), [0], [0]]
    for job in jobs[1:]:
        assert str(answers.of(job)) == "once more"
        assert len(seen) == 3 + TRIES


MINE = ValueError("mine")


def exits(batch: Batch) -> list[Any]:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("execute", "expected"),
    [
        (exits, ["raised SystemExit, which is not an answer"] * 3),
        (lambda batch: [0, MINE, 2], ["0", "mine", "2"]),  # for one job
    ],
)
def test_other_answers_of_the_engine(execute: Callable[[Batch], Any], expected: list[str]) -> None:
    jobs = jobs_of(3)
    answers, seen = answered_together(execute, jobs)
    assert len(seen) == 1
    assert all(text in str(answers.of(job)) for job, text in zip(jobs, expected, strict=True))


def test_callback_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def raises(answer: BatchAnswer) -> None:
        raise KeyError("callback")

    answers = Answers()
    bad, good = jobs_of(2)
    with running() as runner:
        runner.submit(bad, raises)
        answers.submit(runner, good)
        answers.wait(1)
    assert answers.of(good) == 2
    assert [entry.exc_type for entry in reported] == [KeyError]


def test_cancel_of_waiting_and_running_jobs() -> None:
    gate, answers = Gate(), Answers()
    first, second, third = jobs_of(3)
    with running(gate) as runner:
        answers.submit(runner, first)
        assert gate.entered.acquire(timeout=LONG)
        answers.submit(runner, second, third)
        assert runner.cancel(second)
        assert not runner.cancel(second)
        assert not runner.cancel(first)
        gate.open.set()
        answers.wait(2)
        assert not runner.cancel(third)
    assert second not in answers.by_job
    assert (answers.of(first), answers.of(third)) == (0, 4)


def test_random_cancels_or_answers() -> None:
    generator = random.Random(0)  # noqa: S311 - no secret
    answers, cancelled = Answers(), set[Job]()
    jobs = jobs_of(2000)
    with running(workers=2) as runner:
        for number, job in enumerate(jobs):
            answers.submit(runner, job)
            if generator.random() < 0.5 and runner.cancel(other := jobs[generator.randrange(number + 1)]):
                assert other not in cancelled
                cancelled.add(other)
        answers.wait(len(jobs) - len(cancelled))
    assert set(answers.by_job) == set(jobs) - cancelled
    assert all(answers.of(job) == 2 * job.payload for job in answers.by_job)


def test_late_jobs_while_every_worker_is_busy() -> None:
    gate, answers = Gate(), Answers()
    with running(gate, workers=2) as runner:
        busy, waiting = jobs_of(2, group="a"), jobs_of(3, group="b", deadline=time.monotonic() + 0.3)
        for job in busy:
            answers.submit(runner, job)
            assert gate.entered.acquire(timeout=LONG)
        answers.submit(runner, *waiting)
        answers.wait(3)  # with the gate closed
        assert [answers.of(job).kind for job in waiting] == ["late"] * 3
        assert time.monotonic() > waiting[0].deadline  # type: ignore[operator]
        gate.open.set()
        answers.wait(5)
        assert [answers.of(job) for job in busy] == [0, 2]


def test_close_computes_waiting_jobs() -> None:
    gate, answers = Gate(), Answers()
    runner, jobs, (late,) = Runner(batcher_of(), gate), jobs_of(5), jobs_of(1)
    answers.submit(runner, *jobs)
    assert gate.entered.acquire(timeout=LONG)
    closing = threading.Thread(target=runner.close)
    closing.start()
    while not runner._closing:
        time.sleep(0)
    answers.submit(runner, late)
    assert answers.of(late).kind == "draining"
    gate.open.set()
    closing.join(LONG)
    assert [answers.of(job) for job in jobs] == [0, 2, 4, 6, 8]
    assert runner.close(0.0)


def test_close_refuses_waiting_jobs_after_its_timeout() -> None:
    gate, answers = Gate(), Answers()
    runner = Runner(batcher_of(), gate)
    jobs = jobs_of(3)
    answers.submit(runner, *jobs)
    assert gate.entered.acquire(timeout=LONG)
    assert not runner.close(0.0)
    assert [answers.of(job).kind for job in jobs[1:]] == ["draining", "draining"]
    assert jobs[0] not in answers.by_job
    gate.open.set()
    answers.wait(3)
    assert answers.of(jobs[0]) == 0
    assert runner.close(LONG)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fails", [True, False])
def test_idle_workers_and_errors_hold_no_request(count: int, fails: bool) -> None:
    """Not even until cycles are collected: many fail at once when an engine dies."""

    class Payload:
        pass

    def execute(batch: Batch) -> list[Any]:
        held = [job.payload for job in batch.jobs]
        if held != [None] and fails:
            raise RuntimeError("the engine is broken") from ValueError(f"{len(held)} jobs")
        return [None] * len(held)

    gate, answers, payloads = Gate(execute), Answers(), [Payload() for _ in range(count)]
    gone, results = [weakref.ref(payload) for payload in payloads], list[BatchAnswer]()
    with running(gate) as runner:
        answers.submit(runner, Job(group="g", payload=None))
        assert gate.entered.acquire(timeout=LONG)
        for payload in payloads:  # one batch
            runner.submit(Job(group="g", payload=payload), results.append)
        del payload
        payloads.clear()
        gate.open.set()
        answers.submit(runner, Job(group="h", payload=None))  # after its answer, the batch before it is over
        answers.wait(2)
        gate.batches.clear()
        assert [str(result) for result in results] == ["the engine is broken" if fails else "None"] * count
        end = time.monotonic() + LONG
        while any(one() for one in gone) and time.monotonic() < end:
            time.sleep(0.001)  # the thread that computed them drops them afterwards
        assert not any(one() for one in gone)


# ---- engines that hang ----


class Hangs:
    """An engine that hangs with jobs whose payload is "hang", until `free` is set."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def __call__(self, batch: Batch) -> list[Any]:
        if any(job.payload == "hang" for job in batch.jobs):
            assert self.free.wait(LONG)
        return [job.payload for job in batch.jobs]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches count as hanging after a moment."""
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_UNKNOWN_S", 0.05)
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_S", 0.05)
    monkeypatch.setattr("muntin.serving.batching.workers._GRACE_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("workers", [1, 2])
def test_hanging_batch_is_answered_and_others_go_on(workers: int) -> None:
    engine, answers = Hangs(), Answers()
    with running(engine, workers=workers) as runner:
        hung = Job(group="g", payload="hang")
        following = jobs_of(3)
        answers.submit(runner, hung, *following)
        answers.wait(4)
        assert isinstance(answers.of(hung), EngineError)
        assert str(answers.of(hung)) == "the engine did not come back within 0.05 s"
        assert [answers.of(job) for job in following] == [0, 1, 2]
        assert runner.able
        assert len(runner._workers) == workers
        snapshot = runner.snapshot()
        assert (snapshot.running_batches, snapshot.finished) == (0, 4)
        engine.free.set()
        while runner.hanging:
            time.sleep(0.001)
        assert len(runner._workers) == workers  # its place was taken
        answers.submit(runner, *jobs_of(2))
        answers.wait(6)
    assert len(answers.by_job[hung]) == 1


@pytest.mark.usefixtures("impatient")
def test_engine_that_hangs_in_every_thread() -> None:
    engine, answers = Hangs(), Answers()
    with running(engine) as runner:
        hung = [Job(group=number, payload="hang") for number in range(HANGING + 1)]
        waiting = Job(group="waits")
        answers.submit(runner, *hung, waiting)
        answers.wait(HANGING + 2)
        assert all(isinstance(answers.of(job), EngineError) for job in hung)
        assert answers.of(waiting).kind == "stuck"
        assert not runner.able
        (refused,) = jobs_of(1)
        answers.submit(runner, refused)
        assert answers.of(refused).kind == "stuck"
        assert runner.snapshot().refused["stuck"] == 1
        engine.free.set()
        while not runner.able:
            time.sleep(0.001)
        (good,) = jobs_of(1)
        answers.submit(runner, good)
        answers.wait(HANGING + 4)
        assert answers.of(good) == 0
        while runner.hanging:
            time.sleep(0.001)
        assert len(runner._workers) == 1


@pytest.mark.usefixtures("impatient")
def test_close_does_not_wait_for_hanging_threads() -> None:
    engine, answers = Hangs(), Answers()
    runner = Runner(batcher_of(), engine)
    answers.submit(runner, Job(group="g", payload="hang"), *jobs_of(2))
    assert runner.close(LONG)
    answers.wait(3)
    engine.free.set()
