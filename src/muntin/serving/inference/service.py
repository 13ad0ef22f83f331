"""Inference for both protocols: a request is checked against the model, admitted, computed with others, and answered.

    InferRequest -> lease on a version -> rows of one group -> runner -> labels, scores, tensors -> InferResponse
       404, 400          503                  400               503

A service knows neither HTTP nor gRPC. Its coroutines run on one event loop; batches are computed on the runner's threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature
from muntin.errors import DataError
from muntin.runtime.inputs import Named
from muntin.serving.batching.job import Job, Refusal
from muntin.serving.batching.workers import AgainError, Runner
from muntin.serving.inference.encoding import AnswerEncoder
from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import Group
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.requests import Requests, Wanted
from muntin.serving.inference.shadow import Shadows
from muntin.serving.inference.statistics import Accounts
from muntin.serving.protocol.messages import InferRequest, InferResponse, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.metadata import ModelDescription, Statistics
from muntin.serving.versions.slot import Lease, Slot
from muntin.serving.versions.version import UnknownVersionError
from muntin.serving.worker.opening import NotReadyError

PRIORITY = 2
"""Priority of a request without one; 1 is the most urgent."""


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
    encoded: Any = None
    """Result of `encode`, or None."""


class Service:
    """One named model. `clock`: seconds, the runner's. `objective`: seconds, or None; answers that miss it are counted. `keep`: called
    with the images (B, H, W, C) of answered requests; must not wait."""

    def __init__(
        self,
        slot: Slot,
        runner: Runner,
        executor: Executor,
        *,
        metrics: Metrics,
        objective: float | None = None,
        max_rows: int,
        max_pixels: int,
        clock: Callable[[], float] = time.monotonic,
        keep: Callable[[NDArray[np.uint8]], None] | None = None,
    ) -> None:
        self.slot, self.runner, self.executor, self.metrics = slot, runner, executor, metrics
        self.objective, self.max_rows, self.max_pixels = objective, max_rows, max_pixels
        self._requests = Requests(max_rows, max_pixels)
        self.draining, self.keep = False, keep
        self.clock = clock
        self.shadows = Shadows(slot, executor, metrics)
        self.encoder = AnswerEncoder()
        self._accounts = Accounts(slot, metrics)
        self._mailbox = _Mailbox()

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def ready(self) -> bool:
        """True if a request would be admitted, provided that there is room for it."""
        return self.slot.ready and self.runner.able and not self.draining

    def describe(self, model: str | None, version: str | None) -> ModelDescription:
        """Describe the model by the named version, or the current one. Raises ProtocolError as `lease` does."""
        with self.lease(model or self.name, version, canary=False) as lease:
            signature, name = lease.version.signature, lease.version.name
        ready = tuple(entry.version for entry in self.slot.index() if entry.state == "READY")
        inputs, outputs, max_batch = self._requests.specs(signature)
        return ModelDescription(
            name=self.name,
            versions=(version,) if version else ready or (name,),
            inputs=inputs,
            outputs=outputs,
            max_batch=max_batch,
        )

    def statistics(self, model: str | None, version: str | None) -> list[Statistics]:
        """Statistics of a version, or of all that were asked. Raises ProtocolError for another model, and 404 for an unknown version."""
        if model is not None and model != self.name:
            raise self._unknown(model)
        if version is not None and version not in self._accounts:
            self.lease(self.name, version).release()
        return self._accounts.statistics(self.name, version)

    async def infer(
        self,
        request: InferRequest,
        *,
        model: str,
        version: str | None,
        arrived: float | None = None,
        deadline: float | None = None,
        encode: Callable[[InferResponse], Any] | None = None,
    ) -> Answered:
        """Return the answer. Cancelled, it takes the request back if it still waits.

        `arrived`: when the request's last byte was read, by the clock; None: now. `deadline`: when its client stops waiting, by the clock;
        the earlier of it and the request's own counts. `encode`: makes the bytes to send of a response; of a large one on a thread.

        Raises ProtocolError: 404 for another model or version, 400 for input that the model does not take and for more best classes than
        `CLASSES`, 503 (`RefusedRequestError`) where no version is ready or it cannot be answered in time, 500 where computing it failed.
        """
        arrived = self.clock() if arrived is None else arrived
        lease = self.lease_to_compute(model, version)
        requested, signature = lease.version, lease.version.signature
        inputs, group, wanted, reserved = self._read(request, lease)
        if request.timeout_us is not None:
            deadline = min(arrived + request.timeout_us / 1e6, math.inf if deadline is None else deadline)
        try:
            try:
                answer, work = await self.compute(
                    inputs, group, lease, priority=request.priority or PRIORITY, deadline=deadline, arrived=arrived
                )
            except BaseException:
                self.encoder.release(reserved)
                raise
            if not wanted.known:
                self.encoder.release(reserved)
                reserved = 0
                reserved = self._reserve(self._requests.measured(request, answer))
            respond = partial(self._respond, request, wanted, signature, answer, work, arrived, encode)
            answered = await self.encoder.encode(respond, reserved)
        except BaseException:
            self._accounts.of(requested.name).failed(self.clock() - arrived)
            raise
        if not reserved:  # promises do not include the encoding of large answers
            self.runner.delivered(self.clock() - work.started - work.computed)
        self._count(answered, work, requested=requested.name, rows=group.rows(inputs))
        if self.keep is not None and group.images:
            self.keep(inputs["images"])
        return answered

    def _read(self, request: InferRequest, lease: Lease) -> tuple[Any, Group, Wanted, int]:
        """Return inputs, their group, the outputs to make, and the bytes reserved for a large answer. Releases the lease if it raises."""
        try:
            inputs, group, wanted = self._requests.read(request, lease.version, lease.version.signature)
            return inputs, group, wanted, self._reserve(wanted)
        except BaseException:
            lease.release()
            raise

    def _reserve(self, wanted: Wanted) -> int:
        try:
            return self.encoder.reserve(wanted)
        except RefusedRequestError:
            self.metrics.refused["large answers"] += 1
            raise

    def _count(self, answered: Answered, work: Work, *, requested: str, rows: int) -> None:
        """Count an answer in the statistics of its version and in the metrics. `requested`: name of the version that was leased."""
        if work.version != requested:  # the requested version failed, and another one answered
            self._accounts.of(requested).failed(answered.total)
        self._accounts.of(work.version).answered(
            rows=rows,
            batch_rows=work.batch_rows,
            total=answered.total,
            read=answered.read,
            queued=answered.queued,
            computed=work.computed,
        )
        self.metrics.total.observe(answered.total)
        if self.objective is not None and answered.total > self.objective:
            self.metrics.late.inc()

    def _respond(
        self,
        request: InferRequest,
        wanted: Wanted,
        signature: AnySignature,
        answer: Named,
        work: Work,
        arrived: float,
        encode: Callable[[InferResponse], Any] | None,
    ) -> Answered:
        """Encode an answer, on any thread."""
        response = InferResponse(
            model=self.name,
            version=work.version,
            id=request.id,
            outputs=self._requests.outputs(answer, wanted, signature),
            parameters={"recovered": work.recovered} if work.recovered else {},
        )
        encoded = None if encode is None else encode(response)
        return Answered(
            response=response,
            encoded=encoded,
            read=max(work.admitted - arrived, 0.0),
            queued=max(work.started - work.admitted, 0.0),
            computed=work.computed,
            total=self.clock() - arrived,
            batch_rows=work.batch_rows,
        )

    def lease(self, model: str, version: str | None, *, canary: bool = True) -> Lease:
        """Lease the version that a request names; `canary` as of `Slot.lease`. Raises ProtocolError: 404, or 503 where none is ready."""
        if model != self.name:
            raise self._unknown(model)
        try:
            return self.slot.lease(version or None, canary=canary)
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except NotReadyError as error:
            raise RefusedRequestError(str(error)) from error

    def lease_to_compute(self, model: str, version: str | None) -> Lease:
        """Lease a version to compute with, and count a refusal where none is ready."""
        try:
            return self.lease(model, version)
        except RefusedRequestError:
            self.metrics.refused["no version"] += 1
            raise

    async def compute(
        self,
        inputs: Any,
        group: Group,
        lease: Lease,
        *,
        priority: int = PRIORITY,
        patient: bool = False,
        deadline: float | None = None,
        arrived: float = math.nan,
    ) -> tuple[Any, Work]:
        """Return the answer to inputs of a group. Takes over the lease. Raises as `infer`. `patient`: see `Job`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        rows = group.rows(inputs)
        work = Work(inputs=inputs, lease=lease, admitted=self.clock())
        job = Job(
            group=group,
            rows=rows,
            nbytes=group.nbytes(inputs),
            priority=priority,
            deadline=deadline,
            patient=patient,
            cost=float(group.row_size),
            alone=group.alone,
            payload=work,
            arrived=arrived,
        )

        def done(answer: Any) -> None:
            lease.release()
            self._mailbox.put(future, answer)

        try:
            refusal = self.runner.submit(job, done)
            if refusal is not None:
                raise _error(refusal)
        except BaseException:
            lease.release()
            raise
        try:
            answer = await future
        except asyncio.CancelledError:
            if self.runner.cancel(job):
                lease.release()
            raise
        if isinstance(answer, BaseException | Refusal):
            raise _error(answer)
        self._accounts.count_rows(work.version, rows)
        self.metrics.queue.observe(work.started - work.admitted)
        self.metrics.compute.observe(work.computed)
        self.metrics.batch.observe(work.batch_rows)
        if work.whole is not None:
            loop.call_soon(partial(self.shadows.cast, work, group))  # after the answer
        return answer, work

    def close(self) -> None:
        """End the threads beside the requests. The caller closes the runner and the slot."""
        self.shadows.close()
        self.encoder.close()

    def _unknown(self, model: str) -> ProtocolError:
        return ProtocolError(f"model {shown(model)}: this server has {self.name}", status=404)


class _Mailbox:
    """Passes answers from computing threads to futures of the event loop, which is woken once for the answers of a batch."""

    def __init__(self) -> None:
        self._answers: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._woken = False

    def put(self, future: asyncio.Future[Any], answer: Any) -> None:
        """Set the result of a future, soon. Any thread may call this."""
        self._answers.append((future, answer))
        if not self._woken:  # set before the loop is woken and cleared before it looks: answers put in between are seen
            self._woken = True
            with suppress(RuntimeError):  # the loop was closed: nothing waits for the answer
                future.get_loop().call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._woken = False
        while self._answers:
            future, answer = self._answers.popleft()
            if not future.done():
                future.set_result(answer)


def _error(answer: BaseException | Refusal) -> ProtocolError:
    """Error that a client gets instead of an answer."""
    if isinstance(answer, Refusal):
        return RefusedRequestError(answer.message, retry_after=answer.retry_after or 1.0)
    if isinstance(answer, NotReadyError | AgainError):  # its engine died
        return RefusedRequestError(str(answer))
    error = ProtocolError(str(answer)) if isinstance(answer, DataError) else ProtocolError(f"the model failed: {answer}", status=500)
    error.__cause__ = answer
    return error
