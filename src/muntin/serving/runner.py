"""The live side of a batcher: worker threads that ask it what to do, compute that, and answer.

    submit -> [lock] Batcher.submit -> notify a worker that is idle -> [lock] Batcher.poll -> execute -> [lock] Batcher.done -> answers

Whatever is decided is decided by the batcher, under the one lock, which is never held while something is computed or answered. Answers are
delivered by the thread that computed them, before it asks for more. Jobs whose time passes while all of the workers compute are told by a
thread that sleeps until the first of them may be too late: most jobs are answered before, so it is hardly ever woken.

That thread also finds calls of the engine that do not come back. Where the engine can be interrupted it is, and whoever computes goes on
from there. Otherwise the batch is answered with an error, and another thread takes the place of the one that it keeps. Of these there is a
bound, beyond which the engine is taken for dead: then everything is refused.
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
from muntin.serving.batcher import Batch, Batcher, Job, Refusal, Snapshot

Answer = Any
"""What `execute` gave for a job, a `Refusal`, or an `Exception`."""
Done = Callable[[Answer], None]
Execute = Callable[[Batch], Sequence[Answer]]
"""(batch) -> an answer for each job, in their order; one may be an Exception, for that job alone"""

LOOK_S = 0.02
"""Seconds between two looks for jobs whose time has passed, at the least: who is late hears of it so much later."""
HANGING = 4
"""Threads that hang in an engine at once for which others are begun."""
TRIES = 8
"""Of a job that an AgainError asks for."""
_GRACE_S = 0.5
"""Beyond a batch's time: whoever computes it finds out first, so that what waits for a version that hangs is computed by another one."""


def _cannot(since: float) -> bool:
    return False


class EngineError(MuntinError):
    """The engine broke its contract: another number of answers than of requests, it tried to end the thread that it ran on, or it does not
    come back."""


class AgainError(MuntinError):
    """What was not computed may be, if it is asked once more: whoever computes does it in another way then."""


class _Worker:
    """A thread that computes `batch` since `since`. `due`: when it counts as one that does not come back. `again`: put off once."""

    __slots__ = ("again", "batch", "due", "hangs", "since", "thread")

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.due = math.inf
        self.since = math.inf
        self.hangs = self.again = False
        self.thread = threading.current_thread()  # until it has its own


class Runner:
    """Runs a batcher on `workers` threads, from now until `close`. Any thread may call it.

    `execute` is called by all of the threads at the same time. `clock`: seconds, never going back, the same that deadlines are given in.
    `interrupt(since)` is called when a batch that began then does not come back, to end calls of the engine that do not; True where any was
    ended since: then the batch has as long again, once, for whatever computes it instead.

    Where `execute` raises for a batch of several jobs, each of them is computed once more alone, so that one bad request fails alone.
    Not so for MemoryError, which every job of the batch gets: computing the same rows again would press a machine without memory further.
    A job alone that fails with AgainError is computed again, up to `TRIES` times.
    Raises ValueError for another number of workers than the batcher counts on.
    """

    def __init__(
        self,
        batcher: Batcher,
        execute: Execute,
        *,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        interrupt: Callable[[float], bool] = _cannot,
    ) -> None:
        if workers != batcher.workers:
            raise ValueError(f"workers={workers}: the batcher reckons with {batcher.workers}, give both the same")
        self._batcher, self._execute, self._clock, self._interrupt = batcher, execute, clock, interrupt
        lock = threading.Lock()
        self._changed, self._expiry, self._left = (threading.Condition(lock) for _ in range(3))
        self._done: dict[Job, Done] = {}  # of every job that was admitted and not answered
        self._idle = 0
        self._closing = self._ended = False
        self._looked, self._look_at = -math.inf, math.inf  # when it was looked for what has expired, and will be
        self._timer = threading.Thread(target=self._tell_expired, name="muntin-expiry", daemon=True)
        self._timer.start()
        self._numbers = count()
        self._workers: set[_Worker] = set()  # but for those that hang
        self.hanging = 0
        """Threads that an engine does not come back to."""
        with self._changed:
            for _ in range(workers):
                self._begin_worker()

    def submit(self, job: Job, done: Done) -> None:
        """Hands a job in. `done` is called once with its answer: by a worker, or by this call where the job is refused at once.

        What `done` raises is reported as what a thread raises is (`threading.excepthook`), and ends nothing. Raises ValueError, and will
        not call `done`, for a job that the batcher finds meaningless.
        """
        with self._changed:
            refusal = self._batcher.submit(job, self._clock())
            if refusal is None:
                self._done[job] = done
                if self._idle:
                    self._changed.notify()
                else:
                    self._mind_expiry()
        if refusal is not None:
            _deliver(done, refusal)

    def cancel(self, job: Job) -> bool:
        """Takes back a job that still waits: its answer is a CancelledError, given by this call. False: too late, it is or was answered."""
        with self._changed:
            if not self._batcher.cancel(job):
                return False
            done = self._done.pop(job)
        _deliver(done, CancelledError("the request was taken back"))
        return True

    def delivered(self, batch: object, seconds: float) -> None:
        """An answer went out so long after it was given: who tells of every one gets promises that count with it. `batch`: equal for the
        answers of one."""
        with self._changed:
            self._batcher.delivered(batch, seconds)

    @property
    def able(self) -> bool:
        """Whether there is a thread to compute on that does not hang."""
        return bool(self._workers)

    @property
    def waiting(self) -> int:
        """Jobs that wait to be computed, as of a moment ago."""
        return self._batcher.waiting

    def snapshot(self) -> Snapshot:
        """The batcher's counts."""
        with self._changed:
            return self._batcher.snapshot()

    def close(self, timeout: float | None = None) -> bool:
        """Refuses new jobs, serves what waits, and ends the threads; True once they have ended, but for those that hang.

        After `timeout` seconds what still waits is refused, and False is returned: what is being computed then is answered when it is done.
        """
        own = threading.current_thread()
        with self._changed:
            self._batcher.drain()
            self._closing = True
            self._changed.notify_all()
            workers = [worker for worker in self._workers if worker.thread is not own]
            ended = self._left.wait_for(lambda: all(worker.thread is own for worker in self._workers), timeout)
            given_up = self._taken(self._batcher.discard())
            self._changed.notify_all()
            self._ended = True
            self._expiry.notify()
        _deliver_all(given_up)
        if self._timer is not own:
            self._timer.join()
        for worker in workers:
            if ended and not worker.hangs:
                worker.thread.join()
        return ended

    # ---- the threads

    def _begin_worker(self) -> None:
        """Under the lock."""
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
        """One round: waits for something to do and does it. No local name of it outlives that: an idle thread holds no request."""
        batch, dropped = self._next(worker)
        _deliver_all(dropped)
        if batch is not None:
            return self._compute(worker, batch)
        return bool(dropped)

    def _next(self, worker: _Worker) -> tuple[Batch | None, list[tuple[Done, Answer]]]:
        """What to compute and what to answer; neither: the end."""
        with self._changed:
            while True:
                now = self._clock()
                step = self._batcher.poll(now)
                if step.batch is not None:
                    worker.batch, worker.again = step.batch, False
                    worker.since, worker.due = now, now + step.batch.within + _GRACE_S
                if step.batch is not None or step.dropped:
                    self._mind_expiry(worker.due)
                    return step.batch, self._taken(step.dropped)
                if self._closing and not self._batcher.waiting:
                    return None, []
                self._idle += 1
                self._changed.wait(None if step.wake is None else max(0.0, step.wake - now))
                self._idle -= 1

    def _mind_expiry(self, due: float = math.inf) -> None:
        """Under the lock: sees to it that it is looked when the first job that waits may be too late, and when a batch is overdue."""
        when = max(min(self._batcher.expiry, due), self._looked + LOOK_S)
        if when < self._look_at:
            self._look_at = when
            self._expiry.notify()

    def _tell_expired(self) -> None:
        while self._look():
            pass

    def _look(self) -> bool:
        """Waits until a job may be too late or a batch is overdue, and tells those that are; False: the end. As of `_turn`, no local name
        outlives it."""
        if not self._await_look():
            return False
        with self._changed:
            now = self._clock()
            overdue = [worker.since for worker in self._workers if worker.due <= now and not worker.again]
        interrupted = bool(overdue) and self._interrupt(min(overdue))
        _deliver_all(self._expired(now, interrupted=interrupted))
        return True

    def _await_look(self) -> bool:
        """False: the end."""
        with self._changed:
            while not self._ended and (now := self._clock()) < self._look_at:
                self._expiry.wait(min(self._look_at - now, threading.TIMEOUT_MAX))
            return not self._ended

    def _expired(self, now: float, *, interrupted: bool) -> list[tuple[Done, Answer]]:
        with self._changed:
            self._looked = now
            if interrupted:
                for worker in self._workers:
                    if worker.due <= now and not worker.again and worker.batch is not None:
                        worker.due, worker.again = now + worker.batch.within, True
            dropped = self._taken(self._batcher.expire(now)) + self._give_up_overdue(now)
            due = min((worker.due for worker in self._workers), default=math.inf)
            self._look_at = max(min(self._batcher.expiry, due), now + LOOK_S)
            return dropped

    def _give_up_overdue(self, now: float) -> list[tuple[Done, Answer]]:
        """Under the lock: what is told of batches that do not come back. Others take the places of the threads that compute them."""
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
                with suppress(RuntimeError):  # this process may have no more threads; those that are there go on
                    self._begin_worker()
        if answers and not self._workers:
            answers += self._taken(self._batcher.stick())
        if answers:
            self._left.notify_all()
        return answers

    def _came_back(self, worker: _Worker) -> bool:
        """Under the lock: whether a thread that hung has its place again."""
        self.hanging -= 1
        if len(self._workers) >= self._batcher.workers:
            return False
        worker.hangs = False
        self._workers.add(worker)
        self._batcher.loosen()
        return True

    def _taken(self, refused: Iterable[tuple[Job, Refusal]]) -> list[tuple[Done, Answer]]:
        return [(self._done.pop(job), refusal) for job, refusal in refused]

    def _compute(self, worker: _Worker, batch: Batch) -> bool:
        """False: another thread has taken the place of this one."""
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
        """An answer for each job, and whether all of them came from one call of the engine."""
        answers, error = self._call(batch)
        if error is None:
            return answers, True
        final = len(batch.jobs) == 1 and not isinstance(error, AgainError)
        if final or worker.hangs or self._ended or isinstance(error, MemoryError | EngineError):
            return [error] * len(batch.jobs), False
        return [self._alone(worker, batch, job) for job in batch.jobs], False

    def _alone(self, worker: _Worker, batch: Batch, job: Job) -> Answer:
        for _ in range(TRIES):
            if worker.hangs:  # nobody waits for the rest
                return None
            now = self._clock()
            worker.since, worker.due, worker.again = now, now + batch.within + _GRACE_S, False  # each call has its time
            answers, error = self._call(Batch((job,), batch.group, job.rows, batch.within))
            late = job.deadline is not None and self._clock() >= job.deadline
            if self._ended or late or not isinstance(error, AgainError):
                break
        return answers[0] if error is None else error

    def _call(self, batch: Batch) -> tuple[Sequence[Answer], Exception | None]:
        try:
            answers = self._execute(batch)
            given, wanted = len(answers), len(batch.jobs)
        except Exception as error:  # noqa: BLE001 - it is the answer
            return (), bare(error)
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it, and the thread has others to serve
            return (), EngineError(f"the engine raised {type(error).__name__}, which is not an answer: {error}")
        if given != wanted:
            return (), EngineError(f"the engine gave {given} answers for {wanted} requests: none of them can be told whose it is")
        return answers, None


def _deliver_all(answers: Iterable[tuple[Done, Answer]]) -> None:
    for done, answer in answers:
        _deliver(done, answer)


def _deliver(done: Done, answer: Answer) -> None:
    try:
        done(answer)
    except Exception:  # noqa: BLE001 - reported where the exceptions of threads are; others wait for their answers
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
