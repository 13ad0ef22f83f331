"""A request from its admission to its answer: computed, encoded, and answered or taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.typing import NDArray

from muntin.errors import bare
from muntin.serving.inference.encoding import AnswerEncoder
from muntin.serving.inference.executor import Work
from muntin.serving.inference.outputs import Wanted, make_outputs
from muntin.serving.protocol.messages import InferRequest, InferResponse, ProtocolError
from muntin.serving.telemetry.accounts import Accounts
from muntin.serving.telemetry.metrics import Metrics
from muntin.serving.versions.version import Version


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An answer with its times in seconds: reading the request, waiting for its batch, computing that batch, and the total. The rest of the
    total is encoding."""

    response: InferResponse
    read: float
    queued: float
    computed: float
    total: float
    batch_rows: int
    started: float
    """Start of its batch, seconds of the clock."""
    encoded: Any = None
    """Result of `encode`, or None."""


Done = Callable[[Answered | Exception], None]


@dataclass(kw_only=True, slots=True, eq=False)
class PendingRequest:
    """Runs on the event loop, except `_encode`. `arrived`: seconds of the clock. `objective`: seconds, or None."""

    request: InferRequest
    version: Version
    wanted: Wanted
    model: str
    rows: int
    arrived: float
    held_bytes: int
    """Bytes reserved for a large answer, which is encoded on a thread; 0: it is small."""
    encode: Callable[[InferResponse], Any] | None
    done: Done
    encoder: AnswerEncoder
    accounts: Accounts
    metrics: Metrics
    objective: float | None
    clock: Callable[[], float]
    _cancelled: bool = field(default=False, init=False)

    def computed(self, result: tuple[NDArray[Any], Work] | ProtocolError) -> None:
        """Encode and deliver what was computed, or deliver the error."""
        if isinstance(result, ProtocolError):
            self.encoder.release(self.held_bytes)
            self._count_failure()
            self.done(result)
        elif self.held_bytes:
            self.encoder.encode_on_thread(partial(self._encode, *result), partial(self._deliver, result[1]))
        else:
            self._deliver(result[1], self._encode(*result))

    def cancel(self, cancel_computation: Callable[[], bool]) -> None:
        """Take the request back. The computation is not kept here: the reference cycle would keep images until it is collected."""
        self._cancelled = True
        if cancel_computation():
            self.encoder.release(self.held_bytes)
            self._count_failure()

    def _encode(self, answer: NDArray[Any], work: Work) -> Answered | Exception:
        if self._cancelled:
            return ProtocolError("the client has gone", status=499)
        try:
            response = InferResponse(
                model=self.model,
                version=work.version,
                id=self.request.id,
                outputs=make_outputs(answer, self.wanted, self.version.signature),
                parameters={"recovered": work.recovered} if work.recovered else {},
            )
            encoded = None if self.encode is None else self.encode(response)
        except (ProtocolError, MemoryError) as error:
            return bare(error)
        except Exception as error:  # noqa: BLE001 - it is the answer; an unexpected one keeps its traceback for the report
            return error
        return Answered(
            response=response,
            encoded=encoded,
            read=max(work.admitted - self.arrived, 0.0),
            queued=max(work.started - work.admitted, 0.0),
            computed=work.computed,
            total=self._elapsed(),  # includes the encoding
            batch_rows=work.batch_rows,
            started=work.started,
        )

    def _deliver(self, work: Work, answer: Answered | Exception) -> None:
        self.encoder.release(self.held_bytes)
        if self._cancelled or isinstance(answer, Exception):
            self._count_failure()
        else:
            if work.version != self.version.name:  # the requested version failed, and another one answered
                self._count_failure()
            self.accounts.of(work.version).answered(
                rows=self.rows,
                batch_rows=work.batch_rows,
                total=answer.total,
                read=answer.read,
                queued=answer.queued,
                computed=answer.computed,
            )
            self.metrics.total.observe(answer.total)
            if self.objective is not None and answer.total > self.objective:
                self.metrics.late.inc()
        if not self._cancelled:
            self.done(answer)

    def _count_failure(self) -> None:
        self.accounts.of(self.version.name).failed(self._elapsed())

    def _elapsed(self) -> float:
        """Seconds since it arrived."""
        return self.clock() - self.arrived
