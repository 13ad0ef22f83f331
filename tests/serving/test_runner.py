"""A batcher with real threads: every job is answered once, whatever the engine and the callbacks do. Nothing here measures time."""

from __future__ import annotations

import gc
import math
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest

from muntin.serving.batcher import Batch, Batcher, Job, Refusal
from muntin.serving.latency import OVERDUE, OVERDUE_S, OVERDUE_UNKNOWN_S, LatencyModel
from muntin.serving.runner import HANGING, LOOK_S, TRIES, AgainError, Answer, EngineError, Runner

LONG = 30.0
"""Seconds after which something that should happen has failed to."""


def batcher_of(**options: Any) -> Batcher:
    return Batcher(LatencyModel(), **({"objective": None, "max_rows": 8, "queue_rows": 10_000, "queue_bytes": 1 << 30} | options))


def doubled(batch: Batch) -> list[Any]:
    return [2 * job.payload for job in batch.jobs]


@contextmanager
def running(execute: Callable[[Batch], Any] = doubled, *, workers: int = 1, **options: Any) -> Iterator[Runner]:
    runner = Runner(batcher_of(workers=workers, **options), execute, workers=workers)
    try:
        yield runner
    finally:
        assert runner.close(LONG)


class Answers:
    """Waits for answers, and counts them by job."""

    def __init__(self) -> None:
        self.by_job: dict[Job, list[Answer]] = {}
        self._changed = threading.Condition()
        self._count = 0

    def submit(self, runner: Runner, *jobs: Job) -> None:
        for job in jobs:
            runner.submit(job, lambda answer, job=job: self._take(job, answer))  # type: ignore[misc]

    def _take(self, job: Job, answer: Answer) -> None:
        with self._changed:
            self.by_job.setdefault(job, []).append(answer)
            self._count += 1
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, LONG)

    def of(self, job: Job) -> Answer:
        (answer,) = self.by_job[job]
        return answer


class Gate:
    """An engine that computes nothing until it is opened, and says when it was entered."""

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
def test_four_threads_submit_and_every_job_gets_its_own_answer_once(workers: int) -> None:
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


def test_jobs_that_wait_share_a_batch() -> None:
    gate, answers = Gate(), Answers()
    with running(gate) as runner:
        teach(runner)
        jobs = jobs_of(9)
        answers.submit(runner, jobs[0])
        assert gate.entered.acquire(timeout=LONG)
        answers.submit(runner, *jobs[1:])
        gate.open.set()
        answers.wait(9)
    assert [len(batch.jobs) for batch in gate.batches] == [1, 8]


def test_a_refusal_comes_from_the_call_itself() -> None:
    answers = Answers()
    (large,) = jobs_of(1, rows=9)
    with running() as runner:
        answers.submit(runner, large)
        assert isinstance(answers.of(large), Refusal)
        assert answers.of(large).kind == "too large"


def test_a_meaningless_job_is_an_error_of_the_caller() -> None:
    called: list[Answer] = []
    with running() as runner:
        with pytest.raises(ValueError, match="rows=0"):
            runner.submit(Job(group="g", rows=0), called.append)
        assert not runner._done
    assert not called


def teach(runner: Runner) -> None:
    """Batches of several jobs gain, from the first on."""
    for _ in range(3):
        for rows in (1, 2, 4, 8):
            runner._batcher._queue.latencies.observe("g", rows, 0.001 + rows / 1e5)


def answered_together(execute: Callable[[Batch], Any], jobs: list[Job]) -> tuple[Answers, list[Batch]]:
    """The answers of jobs that share one batch, and the batches that were tried for them."""
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


def test_one_bad_request_fails_alone() -> None:
    def execute(batch: Batch) -> list[Any]:
        if any(job.payload == 3 for job in batch.jobs):
            raise RuntimeError("three")
        return doubled(batch)

    jobs = jobs_of(6)
    answers, seen = answered_together(execute, jobs)
    assert [len(batch.jobs) for batch in seen] == [6, 1, 1, 1, 1, 1, 1]
    assert [batch.rows for batch in seen[1:]] == [1] * 6
    assert str(answers.of(jobs[3])) == "three"
    assert [answers.of(job) for job in jobs if job.payload != 3] == [0, 2, 4, 8, 10]


def test_no_memory_is_everybodys_error_and_nothing_is_computed_again() -> None:
    def execute(batch: Batch) -> list[Any]:
        raise MemoryError("full")

    jobs = jobs_of(3)
    answers, seen = answered_together(execute, jobs)
    assert len(seen) == 1
    assert all(isinstance(answers.of(job), MemoryError) for job in jobs)


@pytest.mark.parametrize("count", [1, 2])
def test_what_asks_for_it_is_computed_again_alone(count: int) -> None:
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
    for job in jobs[1:]:  # it has an end
        assert str(answers.of(job)) == "once more"
        assert len(seen) == 3 + TRIES


@pytest.mark.parametrize("given", [[], [1], [1, 2, 3, 4]])
def test_a_wrong_number_of_answers_is_everybodys_error(given: list[int]) -> None:
    jobs = jobs_of(3)
    answers, seen = answered_together(lambda batch: given, jobs)
    assert len(seen) == 1
    for job in jobs:
        assert isinstance(answers.of(job), EngineError)
        assert f"{len(given)} answers for 3 requests" in str(answers.of(job))


def test_no_answers_at_all_is_an_error_for_each() -> None:
    jobs = jobs_of(2)
    answers, _ = answered_together(lambda batch: None, jobs)
    assert all(isinstance(answers.of(job), TypeError) for job in jobs)


def test_an_engine_that_wants_to_end_the_process_ends_nothing() -> None:
    def execute(batch: Batch) -> list[Any]:
        raise SystemExit(3)

    jobs = jobs_of(2)
    answers, _ = answered_together(execute, jobs)
    assert all("SystemExit" in str(answers.of(job)) for job in jobs)


def test_an_answer_may_be_an_exception_for_one_job() -> None:
    jobs = jobs_of(3)
    error = ValueError("mine")
    answers, seen = answered_together(lambda batch: [0, error, 2], jobs)
    assert len(seen) == 1
    assert [answers.of(job) for job in jobs] == [0, error, 2]


def test_a_callback_that_raises_is_reported_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def raises(answer: Answer) -> None:
        raise KeyError("callback")

    answers = Answers()
    bad, good = jobs_of(2)
    with running() as runner:
        runner.submit(bad, raises)
        answers.submit(runner, good)
        answers.wait(1)
        runner.submit(Job(group="g", rows=9), raises)
    assert answers.of(good) == 2
    assert [entry.exc_type for entry in reported] == [KeyError, KeyError]


def test_a_failed_batch_is_not_learned() -> None:
    answers = Answers()

    def execute(batch: Batch) -> list[Any]:
        raise RuntimeError

    with running(execute) as runner:
        answers.submit(runner, *jobs_of(5))
        answers.wait(5)
        assert runner._batcher._queue.latencies.line("g") is None


def test_what_waits_can_be_taken_back_and_what_runs_cannot() -> None:
    gate, answers = Gate(), Answers()
    first, second, third = jobs_of(3)
    with running(gate) as runner:
        answers.submit(runner, first)
        assert gate.entered.acquire(timeout=LONG)
        answers.submit(runner, second, third)
        assert runner.cancel(second)
        assert isinstance(answers.of(second), CancelledError)
        assert not runner.cancel(second)
        assert not runner.cancel(first)
        gate.open.set()
        answers.wait(3)
        assert not runner.cancel(third)
    assert (answers.of(first), answers.of(third)) == (0, 4)


def test_it_says_how_many_wait() -> None:
    gate, answers = Gate(), Answers()
    with running(gate) as runner:
        answers.submit(runner, *jobs_of(3))
        assert gate.entered.acquire(timeout=LONG)
        assert runner.waiting == 2
        gate.open.set()
        answers.wait(3)
        assert runner.waiting == 0


def test_taking_back_at_random_answers_everybody_once() -> None:
    generator = random.Random(0)  # noqa: S311 - no secret
    answers = Answers()
    jobs = jobs_of(2000)
    with running(workers=2) as runner:
        for number, job in enumerate(jobs):
            answers.submit(runner, job)
            if generator.random() < 0.5:
                runner.cancel(jobs[generator.randrange(number + 1)])
        answers.wait(len(jobs))
    kinds = Counter(type(answers.of(job)) for job in jobs)
    assert set(kinds) <= {int, CancelledError}
    assert all(answers.of(job) == 2 * job.payload for job in jobs if isinstance(answers.of(job), int))


def test_dropped_jobs_are_told() -> None:
    """On a clock that jumps beyond their time while the engine is busy."""
    now = [0.0]
    gate, answers = Gate(), Answers()
    runner = Runner(batcher_of(objective=1.0), gate, clock=lambda: now[0])
    first, second = jobs_of(2)
    answers.submit(runner, first)
    assert gate.entered.acquire(timeout=LONG)
    answers.submit(runner, second)
    now[0] = 5.0
    gate.open.set()
    answers.wait(2)
    assert answers.of(first) == 0
    assert answers.of(second).kind == "late"
    assert runner.close(LONG)


def test_a_job_whose_time_passes_while_every_engine_is_busy_is_told_then() -> None:
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


def test_nobody_is_woken_for_what_does_not_expire() -> None:
    """A thousand jobs that are answered in time, on a clock that stands still: one of them sets the time of the first look."""
    runner = Runner(batcher_of(objective=1.0), doubled, clock=lambda: 0.0)
    woken, notify = [0], runner._expiry.notify

    def counted(n: int = 1) -> None:
        woken[0] += 1
        notify(n)

    runner._expiry.notify = counted  # type: ignore[method-assign]
    answers = Answers()
    for job in jobs_of(1000):
        answers.submit(runner, job)
    answers.wait(1000)
    assert woken[0] <= 1
    assert runner._looked == -math.inf
    assert runner.close(LONG)
    assert not runner._timer.is_alive()


def test_a_flood_of_late_jobs_is_looked_at_now_and_then() -> None:
    """Each expires earlier than the one before it: a look for each would cost more than it tells."""
    now, gate, answers = [1000.0], Gate(), Answers()
    runner = Runner(batcher_of(), gate, clock=lambda: now[0])
    looks: list[float] = []
    expire = runner._batcher.expire
    runner._batcher.expire = lambda at: looks.append(at) or expire(at)  # type: ignore[method-assign, func-returns-value]
    answers.submit(runner, *jobs_of(1))
    assert gate.entered.acquire(timeout=LONG)
    for number in range(100):
        now[0] += LOOK_S / 20
        answers.submit(runner, *jobs_of(1, deadline=now[0] + LOOK_S / (20 + number)))
        time.sleep(0.001)
    assert len(looks) <= 100 / 20 + 1
    gate.open.set()
    now[0] += 1
    assert runner.close(LONG)


def test_closing_serves_what_waits_and_refuses_what_comes() -> None:
    gate, answers = Gate(), Answers()
    runner = Runner(batcher_of(), gate)
    jobs = jobs_of(5)
    answers.submit(runner, *jobs)
    assert gate.entered.acquire(timeout=LONG)
    closed: list[bool] = []
    closing = threading.Thread(target=lambda: closed.append(runner.close(LONG)))
    closing.start()
    while not runner._closing:
        time.sleep(0)
    (late,) = jobs_of(1)
    answers.submit(runner, late)
    assert answers.of(late).kind == "draining"
    gate.open.set()
    closing.join(LONG)
    assert closed == [True]
    assert [answers.of(job) for job in jobs] == [0, 2, 4, 6, 8]
    assert runner.close(0.0)


def test_closing_gives_up_what_waits_after_its_time_and_still_answers_what_runs() -> None:
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


def test_an_idle_worker_holds_no_request() -> None:
    class Payload:
        pass

    payload = Payload()
    gone = weakref.ref(payload)
    answered = threading.Event()
    with running(lambda batch: [None] * len(batch.jobs)) as runner:
        runner.submit(Job(group="g", payload=payload), lambda answer: answered.set())
        del payload
        assert answered.wait(LONG)
        answers = Answers()
        answers.submit(runner, *jobs_of(1))  # by its answer, the first one's round is over
        answers.wait(1)
        gc.collect()
        assert gone() is None


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("count", [1, 2])
def test_of_a_batch_that_failed_nothing_is_kept_with_its_error(count: int) -> None:
    """Not even until cycles are collected: where an engine dies, many fail at once."""

    class Payload:
        pass

    def fail(batch: Batch) -> list[Any]:
        held = [job.payload for job in batch.jobs]
        if held == [None]:
            return [None]
        raise RuntimeError("the engine is broken") from ValueError(f"{len(held)} jobs")

    gate, answers, payloads = Gate(fail), Answers(), [Payload() for _ in range(count)]
    gone, errors = [weakref.ref(payload) for payload in payloads], list[Answer]()
    with running(gate) as runner:
        answers.submit(runner, Job(group="g", payload=None))
        assert gate.entered.acquire(timeout=LONG)
        for payload in payloads:  # one batch
            runner.submit(Job(group="g", payload=payload), errors.append)
        del payload
        payloads.clear()
        gate.open.set()
        answers.submit(runner, Job(group="h", payload=None))  # by its answer their round is over
        answers.wait(2)
        gate.batches.clear()
        assert [str(error) for error in errors] == ["the engine is broken"] * count
        end = time.monotonic() + LONG
        while any(one() for one in gone) and time.monotonic() < end:
            time.sleep(0.001)  # the thread that computed them lets go of them afterwards
        assert not any(one() for one in gone)


def test_the_batcher_has_to_reckon_with_as_many_workers() -> None:
    with pytest.raises(ValueError, match="workers=2"):
        Runner(batcher_of(), doubled, workers=2)


# ---- engines that do not come back


class Hangs:
    """An engine that hangs with jobs whose payload is "hang" until it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def __call__(self, batch: Batch) -> list[Any]:
        if any(job.payload == "hang" for job in batch.jobs):
            assert self.free.wait(LONG)
        return [job.payload for job in batch.jobs]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that do not come back within a moment count as such that never do."""
    monkeypatch.setattr("muntin.serving.latency.OVERDUE_UNKNOWN_S", 0.05)
    monkeypatch.setattr("muntin.serving.latency.OVERDUE_S", 0.05)
    monkeypatch.setattr("muntin.serving.runner._GRACE_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_does_not_come_back_is_answered_and_others_go_on(workers: int) -> None:
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
def test_where_no_thread_can_take_its_place_who_waits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine, answers = Hangs(), Answers()
    with running(engine) as runner:
        hung, waiting = Job(group="g", payload="hang"), Job(group="waits")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            answers.submit(runner, hung, waiting)
            answers.wait(2)
        assert isinstance(answers.of(hung), EngineError)
        assert answers.of(waiting).kind == "stuck"
        engine.free.set()
        while not runner.able:
            time.sleep(0.001)
        (good,) = jobs_of(1)
        answers.submit(runner, good)
        answers.wait(3)
        assert answers.of(good) == 0


@pytest.mark.usefixtures("impatient")
def test_an_engine_that_never_comes_back_is_told_and_may_still_come_back() -> None:
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
def test_closing_does_not_wait_for_what_does_not_come_back() -> None:
    engine, answers = Hangs(), Answers()
    runner = Runner(batcher_of(), engine)
    answers.submit(runner, Job(group="g", payload="hang"), *jobs_of(2))
    assert runner.close(LONG)
    answers.wait(3)
    engine.free.set()


def test_a_batch_has_far_more_time_than_it_ever_took() -> None:
    batcher = batcher_of()
    batcher.submit(Job(group="new"), 0.0)
    batch = batcher.poll(0.0).batch
    assert batch is not None
    assert batch.within == OVERDUE_UNKNOWN_S
    batcher.done(batch, 5.0, 5.0)
    for _ in range(2):
        batcher.submit(Job(group="new"), 10.0)
        batch = batcher.poll(10.0).batch
        assert batch is not None
        batcher.done(batch, 15.0, 5.0)
    assert batch.within > OVERDUE * 5.0
    for _ in range(3):
        batcher._queue.latencies.observe("quick", 1, 0.01)
    batcher.submit(Job(group="quick"), 20.0)
    batch = batcher.poll(20.0).batch
    assert batch is not None
    assert batch.within == OVERDUE_S
