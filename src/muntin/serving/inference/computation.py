"""One job on its way through the runner: its result, or the error that a client gets, is delivered on the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from muntin.errors import DataError
from muntin.serving.batching.batcher import Job, Refusal
from muntin.serving.batching.workers import AgainError, Runner
from muntin.serving.inference.executor import Work
from muntin.serving.inference.mailbox import Mailbox
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.worker.opening import NotReadyError

Computed = Callable[[tuple[NDArray[Any], Work] | ProtocolError], None]


class Computation:
    """Computes a job whose payload is a `Work`, and releases the lease of that.

    `done` is called once with the answer or an error, `finished` after an answer with the time at which the runner gave it.
    """

    def __init__(
        self,
        job: Job,
        runner: Runner,
        mailbox: Mailbox,
        *,
        done: Computed,
        finished: Callable[[Work, float], None],
        clock: Callable[[], float],
    ) -> None:
        self._job, self._runner, self._mailbox = job, runner, mailbox
        self._done, self._finished, self._clock = done, finished, clock
        self._answered_at = 0.0
        self._over = False
        """Whether `done` was called, or must not be called any more."""

    def start(self) -> None:
        """Submit the job. Raises ValueError for a job that the batcher rejects as invalid."""
        work = self._job.payload
        work.admitted = self._clock()
        try:
            self._runner.submit(self._job, self._answer)
        except BaseException:
            work.lease.release()
            raise

    def cancel(self) -> bool:
        """Prevent the call of `done`, and take the job back if it still waits; False if `done` was called before."""
        before, self._over = self._over, True
        self._runner.cancel(self._job)
        return not before

    def _answer(self, answer: Any) -> None:
        """Take the runner's answer, on any thread."""
        self._answered_at = self._clock()
        self._job.payload.lease.release()
        try:
            self._mailbox.put(self._settle, answer)
        except RuntimeError:
            if not self._mailbox.loop.is_closed():  # else it was computed after the server's end, and nothing waits for it
                raise

    def _settle(self, answer: Any) -> None:
        if self._over:
            return
        self._over = True
        if isinstance(answer, BaseException | Refusal):
            self._done(_error(answer))
            return
        self._done((answer, self._job.payload))
        self._finished(self._job.payload, self._answered_at)


def _error(answer: BaseException | Refusal) -> ProtocolError:
    """Error that a client gets instead of an answer."""
    if isinstance(answer, Refusal):
        return RefusedRequestError(answer.message, retry_after=answer.retry_after or 1.0)
    if isinstance(answer, NotReadyError | AgainError):  # its engine died
        return RefusedRequestError(str(answer))
    error = ProtocolError(str(answer)) if isinstance(answer, DataError) else ProtocolError(f"the model failed: {answer}", status=500)
    error.__cause__ = answer
    return error
