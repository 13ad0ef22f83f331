"""Run a batcher on worker threads: ask it what to do, compute that, and deliver the answers.

    submit -> [lock] Batcher.submit -> notify an idle worker -> [lock] Batcher.poll -> execute -> [lock] Batcher.done -> answers

The batcher decides, under the one lock, which is never held while a batch is computed or an answer delivered. The thread that computed
answers delivers them before it asks for more.

One more thread looks every `LOOK_S` for jobs whose time has passed while all workers compute, and for batches that do not come back. It
interrupts the engine if that is possible, and the worker continues from there. Otherwise the batch is answered with an error, and another
thread takes the worker's place. After `HANGING` such threads the engine counts as dead, and every job is refused.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from itertools import count
from typing import Any

from muntin.errors import MuntinError, bare
from muntin.serving.batching.batcher import Batch, Batcher, Job, Refusal, Snapshot

Answer = Any
"""A job's answer from `execute`, a `Refusal`, or an `Exception`."""
Done = Callable[[Answer], None]
Execute = Callable[[Batch], Sequence[Answer]]
"""(batch) -> an answer for each job, in their order. An answer may be an Exception, for that job alone."""

LOOK_S = 0.02
"""Polling interval for jobs whose time has passed and for batches that hang, seconds."""
HANGING = 4
"""Threads that may hang in an engine at once and are replaced by others."""
TRIES = 8
"""Tries of a job that fails with AgainError."""
_GRACE_S = 0.5
"""Seconds added to a batch's time. The slot, which has the same bound, notices a hanging version first, so that another one computes what
waits for it."""


class EngineError(MuntinError):
    """The engine gave another number of answers than requests, tried to end its thread, or does not come back."""


class AgainError(MuntinError):
    """A job was not computed, but may be if it is tried again: the executor does it in another way then."""


class _Worker:
    """A thread, and the batch that it computes.

    `since`: when the batch, or its present try, began. `due`: when it counts as one that hangs. `extended`: whether `due` was put off,
    once, after an interrupt.
    """

    __slots__ = ("batch", "due", "extended", "hangs", "since", "thread")

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.due = self.since = math.inf
        self.hangs = self.extended = False
        self.thread = threading.current_thread()  # until it has its own

    def begin(self, now: float, within: float) -> None:
        self.since, self.due, self.extended = now, now + within + _GRACE_S, False


class Runner:
    """Runs a batcher on `workers` threads, from now until `close`. Threads may share it.

    `execute` is called by all of the threads at the same time. `clock`: seconds, monotonic, the same that deadlines are given in.
    `interrupt(since)` is called for batches that hang, the first of which began at `since`; it ends calls of the engine, and returns
    whether any was ended since then. Then these batches have their time again, once, for what is computed instead.

    If `execute` raises for a batch of several jobs, each of them is computed again alone, so that one bad request fails alone. A job alone
    that fails with AgainError is tried again, up to `TRIES` times. Raises ValueError if `workers` is not the batcher's.
    """

    def __init__(
        self,
        batcher: Batcher,
        execute: Execute,
        *,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        interrupt: Callable[[float], bool] = lambda since: False,
    ) -> None:
        if workers != batcher.workers:
            raise ValueError(f"workers={workers}: the batcher reckons with {batcher.workers}, give both the same")
        self._batcher, self._execute, self._clock, self._interrupt = batcher, execute, clock, interrupt
        lock = threading.Lock()
        self._changed, self._left = threading.Condition(lock), threading.Condition(lock)
        self._done: dict[Job, Done] = {}  # of every job that was admitted and not answered
        self._idle = 0
        self._closing = False
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="muntin-expiry", daemon=True)
        self._watcher.start()
        self._numbers = count()
        self._workers: set[_Worker] = set()  # without those that hang
        self.hanging = 0
        """Threads that hang in an engine."""
        with self._changed:
            for _ in range(workers):
                self._begin_worker()

    def submit(self, job: Job, done: Done) -> None:
        """Submit a job. `done` is called once with its answer: by a worker, or by this call if the job is refused at once.

        An error of `done` is reported as errors of threads are (`threading.excepthook`). Raises ValueError, and will not call `done`, for a
        job that the batcher finds meaningless.
        """
        with self._changed:
            refusal = self._batcher.submit(job, self._clock())
            if refusal is None:
                self._done[job] = done
                if self._idle:
                    self._changed.notify()
        if refusal is not None:
            _deliver(done, refusal)

    def cancel(self, job: Job) -> bool:
        """Take back a job that waits, and answer it with a CancelledError. Returns False if it is being computed or was answered."""
        with self._changed:
            if not self._batcher.cancel(job):
                return False
            done = self._done.pop(job)
        _deliver(done, CancelledError("the request was taken back"))
        return True

    def delivered(self, batch: object, seconds: float) -> None:
        """Count the seconds from a job's answer until it was sent. Promises include them. `batch`: equal for the answers of one batch."""
        with self._changed:
            self._batcher.delivered(batch, seconds)

    @property
    def able(self) -> bool:
        """Whether a worker does not hang."""
        return bool(self._workers)

    def snapshot(self) -> Snapshot:
        """The batcher's counts."""
        with self._changed:
            return self._batcher.snapshot()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new jobs, compute those that wait, and end the threads. Returns True once they have ended, except those that hang.

        After `timeout` seconds, refuse the jobs that still wait and return False. Jobs that are being computed are answered later.
        """
        own = threading.current_thread()
        with self._changed:
            self._batcher.drain()
            self._closing = True
            self._changed.notify_all()
            workers = [worker for worker in self._workers if worker.thread is not own]
            ended = self._left.wait_for(lambda: all(worker.thread is own for worker in self._workers), timeout)
            refused = self._taken(self._batcher.discard())
            self._changed.notify_all()
        self._ended.set()
        _deliver_all(refused)
        if self._watcher is not own:
            self._watcher.join()
        for worker in workers:
            if ended and not worker.hangs:
                worker.thread.join()
        return ended

    # ---- workers ----

    def _begin_worker(self) -> None:
        """Requires the lock."""
        worker = _Worker()
        worker.thread = threading.Thread(target=self._work, args=(worker,), name=f"muntin-engine-{next(self._numbers)}", daemon=True)
        worker.thread.start()  # it waits for the lock
        self._workers.add(worker)

    def _work(self, worker: _Worker) -> None:
        while self._turn(worker):
            pass
        with self._changed:
            self._workers.discard(worker)
            self._left.notify_all()

    def _turn(self, worker: _Worker) -> bool:
        """Wait for something to do and do it. A method of its own: its local names would keep the last request of an idle thread."""
        batch, dropped = self._next(worker)
        _deliver_all(dropped)
        if batch is not None:
            return self._compute(worker, batch)
        return bool(dropped)

    def _next(self, worker: _Worker) -> tuple[Batch | None, list[tuple[Done, Answer]]]:
        """Return a batch to compute and answers to deliver; neither at the end."""
        with self._changed:
            while True:
                now = self._clock()
                step = self._batcher.poll(now)
                if step.batch is not None:
                    worker.batch = step.batch
                    worker.begin(now, step.batch.within)
                if step.batch is not None or step.dropped:
                    return step.batch, self._taken(step.dropped)
                if self._closing and not self._batcher.waiting:
                    return None, []
                self._idle += 1
                self._changed.wait(None if step.wake is None else max(0.0, step.wake - now))
                self._idle -= 1

    def _compute(self, worker: _Worker, batch: Batch) -> bool:
        """Returns False if another thread has taken the place of this one."""
        started = self._clock()
        answers, learn = self._answers(worker, batch)
        with self._changed:
            worker.batch, worker.due = None, math.inf
            if worker.hangs:  # its jobs were answered
                return self._came_back(worker)
            now = self._clock()
            self._batcher.done(batch, now, now - started if learn and now > started else None)
            dones = [self._done.pop(job) for job in batch.jobs]
            if self._idle:
                self._changed.notify()
        _deliver_all(zip(dones, answers, strict=True))
        return True

    def _answers(self, worker: _Worker, batch: Batch) -> tuple[Sequence[Answer], bool]:
        """Return an answer for each job, and whether all of them came from one call of the engine."""
        answers, error = self._call(batch)
        if error is None:
            return answers, True
        final = len(batch.jobs) == 1 and not isinstance(error, AgainError)
        if final or worker.hangs or self._ended.is_set() or isinstance(error, EngineError):
            return [error] * len(batch.jobs), False
        return [self._alone(worker, batch, job) for job in batch.jobs], False

    def _alone(self, worker: _Worker, batch: Batch, job: Job) -> Answer:
        for _ in range(TRIES):
            if worker.hangs:  # its jobs were answered
                return None
            worker.begin(self._clock(), batch.within)
            answers, error = self._call(Batch((job,), batch.group, job.rows, batch.within))
            late = job.deadline is not None and self._clock() >= job.deadline
            if self._ended.is_set() or late or not isinstance(error, AgainError):
                break
        return answers[0] if error is None else error

    def _call(self, batch: Batch) -> tuple[Sequence[Answer], Exception | None]:
        try:
            answers = self._execute(batch)
            given, expected = len(answers), len(batch.jobs)
        except Exception as error:  # noqa: BLE001 - it is the answer
            return (), bare(error)
        except BaseException as error:  # noqa: BLE001 - the jobs need an answer, and the thread has others to serve
            return (), EngineError(f"the engine raised {type(error).__name__}, which is not an answer: {error}")
        if given != expected:
            return (), EngineError(f"the engine gave {given} answers for {expected} requests: none of them can be told whose it is")
        return answers, None

    # ---- the watcher ----

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        """Answer jobs whose time has passed, and batches that hang and cannot be interrupted."""
        with self._changed:
            now = self._clock()
            overdue = [worker for worker in self._workers if worker.due <= now and not worker.extended]
        interrupted = bool(overdue) and self._interrupt(min(worker.since for worker in overdue))
        with self._changed:
            if interrupted:
                for worker in overdue:
                    if worker.due <= now and worker.batch is not None:
                        worker.due, worker.extended = now + worker.batch.within, True
            answers = self._taken(self._batcher.expire(now)) + self._give_up_overdue(now)
        _deliver_all(answers)

    def _give_up_overdue(self, now: float) -> list[tuple[Done, Answer]]:
        """Return the answers of batches that hang, and have other threads take the places of their workers. Requires the lock."""
        answers: list[tuple[Done, Answer]] = []
        for worker in [worker for worker in self._workers if worker.due <= now]:
            batch, worker.batch, worker.hangs = worker.batch, None, True
            assert batch is not None
            self._workers.remove(worker)
            self.hanging += 1
            self._batcher.done(batch, now, None)
            error = EngineError(f"the engine did not come back within {batch.within:.3g} s")
            answers += [(self._done.pop(job), error) for job in batch.jobs]
            if self.hanging <= HANGING:
                with suppress(RuntimeError):  # this process may have no more threads
                    self._begin_worker()
        if answers and not self._workers:
            answers += self._taken(self._batcher.stick())
        if answers:
            self._left.notify_all()
        return answers

    def _came_back(self, worker: _Worker) -> bool:
        """Return whether a thread that hung takes its place again. Requires the lock."""
        self.hanging -= 1
        if len(self._workers) >= self._batcher.workers:
            return False
        worker.hangs = False
        self._workers.add(worker)
        self._batcher.loosen()
        return True

    def _taken(self, refused: Iterable[tuple[Job, Refusal]]) -> list[tuple[Done, Answer]]:
        return [(self._done.pop(job), refusal) for job, refusal in refused]


def _deliver_all(answers: Iterable[tuple[Done, Answer]]) -> None:
    for done, answer in answers:
        _deliver(done, answer)


def _deliver(done: Done, answer: Answer) -> None:
    try:
        done(answer)
    except Exception:  # noqa: BLE001 - reported as errors of threads are; other jobs wait for their answers
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
