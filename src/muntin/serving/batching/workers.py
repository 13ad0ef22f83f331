"""Run a batcher on worker threads: ask it what to do, compute that, and deliver the answers.

    submit -> [lock] Batcher.submit -> notify an idle worker -> [lock] Batcher.poll -> execute -> [lock] Batcher.done -> answers

The one lock is never held while a batch is computed or an answer delivered.

One more thread looks every `LOOK_S` for jobs whose time has passed while all workers compute, and for batches that hang. It interrupts the
engine if that is possible, and the worker continues from there. Otherwise the batch is answered with an error, and another thread takes the
worker's place. After `HANGING` such threads the engine counts as dead, and every job is refused until one of them returns.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from muntin.errors import MuntinError, bare
from muntin.serving.batching.batcher import Batcher, Snapshot
from muntin.serving.batching.job import Batch, Job, Refusal

BatchAnswer = Any
"""A job's answer from `execute`, a `Refusal`, or an `Exception`."""
Done = Callable[[BatchAnswer], None]
Execute = Callable[[Batch], Sequence[BatchAnswer]]
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
    """The engine tried to end its thread, or does not come back."""


class AgainError(MuntinError):
    """A job was not computed, but may be if it is tried again: the executor does it in another way then."""


@dataclass(slots=True, eq=False)
class _Worker:
    """The batch that a thread computes.

    `since`: when the batch, or its present try, began. `due`: when it counts as hanging. `extended`: whether `due` was put off, once,
    after an interrupt.
    """

    batch: Batch | None = None
    since: float = math.inf
    due: float = math.inf
    extended: bool = False
    hangs: bool = False

    def begin(self, now: float, within: float) -> None:
        self.since, self.due, self.extended = now, now + within + _GRACE_S, False


class Runner:
    """Runs a batcher on its number of worker threads, from now until `close`. Any thread may call it.

    `execute` is called by all of the threads at the same time. `clock`: seconds, monotonic, the same that deadlines are given in.
    `interrupt(since)` is called for batches that hang, the first of which began at `since`; it ends calls of the engine, and returns
    whether any was ended since then. Then these batches have their time again, once, for what is computed instead.

    If `execute` raises for a batch of several jobs, each of them is computed again alone, so that one bad request fails alone. A job alone
    that fails with AgainError is tried again, up to `TRIES` times.
    """

    def __init__(
        self,
        batcher: Batcher,
        execute: Execute,
        *,
        clock: Callable[[], float] = time.monotonic,
        interrupt: Callable[[float], bool] = lambda since: False,
    ) -> None:
        self._batcher, self._execute, self._clock, self._interrupt = batcher, execute, clock, interrupt
        lock = threading.Lock()
        self._changed, self._left = threading.Condition(lock), threading.Condition(lock)
        self._done: dict[Job, Done] = {}  # of every job that was admitted and not answered
        self._closing = False
        self._ended = threading.Event()
        self._workers: set[_Worker] = set()  # without those that hang
        self.hanging = 0
        """Threads that hang in an engine."""
        with self._changed:
            for _ in range(batcher.workers):
                self._begin_worker()
        self._watcher = threading.Thread(target=self._watch, name="muntin-expiry", daemon=True)
        self._watcher.start()

    def submit(self, job: Job, done: Done) -> Refusal | None:
        """Submit a job, or return why it is refused. Unless it is refused, `done` is called once with its answer, on another thread.

        An error of `done` is reported as errors of threads are (`threading.excepthook`).
        """
        with self._changed:
            refusal = self._batcher.submit(job, self._clock())
            if refusal is None:
                self._done[job] = done
                self._changed.notify()
        return refusal

    def cancel(self, job: Job) -> bool:
        """Take back a job that waits: its `done` is not called. Returns False if it is being computed or was answered."""
        with self._changed:
            return self._batcher.cancel(job) and self._done.pop(job) is not None

    def delivered(self, seconds: float) -> None:
        """Count the seconds from the end of a batch until an answer was sent. Promises include them."""
        with self._changed:
            self._batcher.delivered(seconds, self._clock())

    @property
    def able(self) -> bool:
        """True if a worker does not hang."""
        return bool(self._workers)

    def snapshot(self) -> Snapshot:
        """The batcher's counts."""
        with self._changed:
            return self._batcher.snapshot()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new jobs, compute those that wait, and end the threads. Returns True once they have ended, except those that hang.

        After `timeout` seconds, refuse the jobs that still wait and return False. Jobs that are being computed are answered later.
        """
        with self._changed:
            self._batcher.drain()
            self._closing = True
            self._changed.notify_all()
            ended = self._left.wait_for(lambda: not self._workers, timeout)
            refused = self._taken(self._batcher.discard())
            self._changed.notify_all()
        self._ended.set()
        _deliver(refused)
        self._watcher.join()
        return ended

    # ---- workers ----

    def _begin_worker(self) -> None:
        """Requires the lock."""
        worker = _Worker()
        threading.Thread(target=self._work, args=(worker,), name="muntin-engine", daemon=True).start()  # it waits for the lock
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
        _deliver(dropped)
        return bool(dropped) if batch is None else self._compute(worker, batch)

    def _next(self, worker: _Worker) -> tuple[Batch | None, list[tuple[Done, BatchAnswer]]]:
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
                self._changed.wait(None if step.wake is None else max(0.0, step.wake - now))

    def _compute(self, worker: _Worker, batch: Batch) -> bool:
        """Compute a batch and deliver its answers. Returns False if it hung and another thread has taken the place of this one."""
        started = self._clock()
        answers, learn = self._answers(worker, batch)
        with self._changed:
            worker.batch, worker.due = None, math.inf
            if worker.hangs:  # its jobs were answered
                self.hanging -= 1
                if len(self._workers) >= self._batcher.workers:
                    return False
                worker.hangs = False
                self._workers.add(worker)
                self._batcher.loosen()
                return True
            now = self._clock()
            self._batcher.done(batch, now, now - started if learn and now > started else None)
            dones = [self._done.pop(job) for job in batch.jobs]
            self._changed.notify()
        _deliver(zip(dones, answers, strict=True))
        return True

    def _answers(self, worker: _Worker, batch: Batch) -> tuple[Sequence[BatchAnswer], bool]:
        """Return an answer for each job, and whether all of them came from one call of the engine."""
        answers, error = self._call(batch)
        if error is None:
            return answers, True
        final = len(batch.jobs) == 1 and not isinstance(error, AgainError)
        if final or worker.hangs or self._ended.is_set() or isinstance(error, EngineError):
            return [error] * len(batch.jobs), False
        return [self._alone(worker, batch, job) for job in batch.jobs], False

    def _alone(self, worker: _Worker, batch: Batch, job: Job) -> BatchAnswer:
        for _ in range(TRIES):
            if worker.hangs:  # its jobs were answered
                return None
            worker.begin(self._clock(), batch.within)
            answers, error = self._call(Batch((job,), batch.group, job.rows, batch.within))
            late = job.deadline is not None and self._clock() >= job.deadline
            if self._ended.is_set() or late or not isinstance(error, AgainError):
                break
        return answers[0] if error is None else error

    def _call(self, batch: Batch) -> tuple[Sequence[BatchAnswer], Exception | None]:
        try:
            return self._execute(batch), None
        except Exception as error:  # noqa: BLE001 - it is the answer
            return (), bare(error)
        except BaseException as error:  # noqa: BLE001 - the jobs need an answer, and the thread has others to serve
            return (), EngineError(f"the engine raised {type(error).__name__}, which is not an answer: {error}")

    # ---- the watcher ----

    def _watch(self) -> None:
        """Answer jobs whose time has passed, and batches that hang and cannot be interrupted."""
        while not self._ended.wait(LOOK_S):
            with self._changed:
                now = self._clock()
                overdue = [worker for worker in self._workers if worker.due <= now and not worker.extended]
            interrupted = bool(overdue) and self._interrupt(min(worker.since for worker in overdue))
            with self._changed:
                if interrupted:
                    for worker in overdue:
                        if worker.due <= now and worker.batch is not None:
                            worker.due, worker.extended = now + worker.batch.within, True
                answers = self._taken(self._batcher.expire(now))
                for worker in [worker for worker in self._workers if worker.due <= now]:
                    answers += self._replace(worker, now)
                if not self._workers:
                    answers += self._taken(self._batcher.stick())
            _deliver(answers)

    def _replace(self, worker: _Worker, now: float) -> list[tuple[Done, BatchAnswer]]:
        """Return the answers of a batch that hangs, and have another thread take the place of its worker. Requires the lock."""
        batch, worker.batch, worker.hangs = worker.batch, None, True
        assert batch is not None
        self._workers.remove(worker)
        self._left.notify_all()
        self.hanging += 1
        self._batcher.done(batch, now, None)
        if self.hanging <= HANGING:
            with suppress(RuntimeError):  # this process may have no more threads
                self._begin_worker()
        error = EngineError(f"the engine did not come back within {batch.within:.3g} s")
        return [(self._done.pop(job), error) for job in batch.jobs]

    def _taken(self, refused: Iterable[tuple[Job, Refusal]]) -> list[tuple[Done, BatchAnswer]]:
        return [(self._done.pop(job), refusal) for job, refusal in refused]


def _deliver(answers: Iterable[tuple[Done, BatchAnswer]]) -> None:
    for done, answer in answers:
        try:
            done(answer)
        except Exception:  # noqa: BLE001 - reported as errors of threads are; other jobs wait for their answers
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
