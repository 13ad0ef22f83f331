"""Inference for both protocols: a request is checked against the model, admitted, computed with others, and answered.

    InferRequest -> lease on a version -> rows of one size -> runner -> labels, scores -> InferResponse
       404, 400          503                 400               503

A service knows neither HTTP nor gRPC. It is called, and calls back, on one event loop; batches are computed on the runner's threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.serving.batching.batcher import Job
from muntin.serving.batching.workers import Runner
from muntin.serving.inference.computation import Computation, Computed
from muntin.serving.inference.encoding import AnswerEncoder
from muntin.serving.inference.executor import Executor, Group, Work
from muntin.serving.inference.mailbox import Mailbox
from muntin.serving.inference.outputs import Wanted, output_names, read_wanted
from muntin.serving.inference.pending_request import Answered, Done, PendingRequest
from muntin.serving.inference.shadow import Shadows
from muntin.serving.protocol.messages import InferRequest, InferResponse, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.metadata import ModelDescription, Statistics, TensorSpec
from muntin.serving.telemetry.accounts import Accounts
from muntin.serving.telemetry.metrics import Metrics
from muntin.serving.versions.slot import Lease, Slot
from muntin.serving.versions.version import UnknownVersionError
from muntin.serving.worker.opening import NotReadyError

__all__ = ["INPUT", "PRIORITY", "Answered", "Cancel", "Service"]

INPUT = "images"
PRIORITY = 2
"""Priority of a request without one; 1 is the most urgent."""

Cancel = Callable[[], object]


class Service:
    """One named model. `clock`: seconds, the runner's. `objective`: seconds, or None; answers that miss it are counted."""

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
    ) -> None:
        self.slot, self.runner, self.executor, self.metrics = slot, runner, executor, metrics
        self.objective, self.max_rows, self.max_pixels = objective, max_rows, max_pixels
        self.draining = False
        self.clock = clock
        self.shadows = Shadows(slot, executor, metrics)
        self.encoder = AnswerEncoder()
        self._accounts = Accounts(slot, metrics)
        self._mailbox: Mailbox | None = None

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def ready(self) -> bool:
        """Whether a request would be admitted, if there is room for it."""
        return self.slot.ready and self.runner.able and not self.draining

    def describe(self, model: str | None, version: str | None) -> ModelDescription:
        """Describe the model by the named version, or the current one. Raises ProtocolError as `lease` does."""
        with self.lease(model or self.name, version, canary=False) as lease:
            signature, name = lease.version.signature, lease.version.name
        ready = tuple(entry.version for entry in self.slot.index() if entry.state == "READY")
        B, K, C = -1, signature.outputs, signature.channels
        scores = (B, K) if signature.task == "classify" else (B, K, -1, -1)
        labels = {"segment": (B, -1, -1), "classify": (B,), "restore": (B, -1, -1, C)}[signature.task]
        first, second = output_names(signature)
        return ModelDescription(
            name=self.name,
            versions=(version,) if version else ready or (name,),
            inputs=(TensorSpec(name=INPUT, datatype="UINT8", shape=(B, -1, -1, C)),),
            outputs=(TensorSpec(name=first, datatype="UINT8", shape=labels), TensorSpec(name=second, datatype="FP32", shape=scores)),
            max_batch=self.max_rows,
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
        """Return the answer. Raises ProtocolError as `submit` does and answers. Cancelled, it takes the request back if it still waits."""
        answered: Answered = await _awaited(
            lambda done: self.submit(request, model=model, version=version, arrived=arrived, deadline=deadline, done=done, encode=encode)
        )
        # `_finished` counted the time until the answer was ready; this coroutine resumes only now.
        self.runner.delivered(answered.started, self.clock() - answered.started - answered.computed)
        return answered

    def submit(
        self,
        request: InferRequest,
        *,
        model: str,
        version: str | None,
        done: Done,
        arrived: float | None = None,
        deadline: float | None = None,
        encode: Callable[[InferResponse], Any] | None = None,
    ) -> Cancel:
        """Ask for an answer. `done` is called once with it, or with a ProtocolError; maybe before this returns.

        `arrived`: when the request's last byte was read, by the clock; None: now. `deadline`: when its client stops waiting, by the clock;
        the earlier of it and the request's own counts. The returned function takes the request back: `done` is not called any more.
        `encode`: makes the bytes to send of a response; of a large one on a thread.

        Raises ProtocolError: 404 for another model or version, 400 for input that the model does not take and for more best classes than
        `CLASSES`, 503 (`RefusedRequestError`) where no version is ready. Answers 503 where it cannot be answered in time, 500 where
        computing it failed.
        """
        arrived = self.clock() if arrived is None else arrived
        lease = self.lease_to_compute(model, version)
        try:
            signature = lease.version.signature
            images = self._images(request, signature)
            wanted = read_wanted(request, signature, images.shape)
            held_bytes = self._reserve(wanted)
        except BaseException:
            lease.release()
            raise
        if request.timeout_us is not None:
            deadline = min(arrived + request.timeout_us / 1e6, math.inf if deadline is None else deadline)
        self._accounts.of(lease.version.name)
        pending = PendingRequest(
            request=request,
            version=lease.version,
            wanted=wanted,
            model=self.name,
            rows=len(images),
            arrived=arrived,
            held_bytes=held_bytes,
            encode=encode,
            done=done,
            encoder=self.encoder,
            accounts=self._accounts,
            metrics=self.metrics,
            objective=self.objective,
            clock=self.clock,
        )
        try:
            cancel = self._start(
                images,
                lease,
                pending.computed,
                labels=wanted.labels,
                priority=request.priority or PRIORITY,
                deadline=deadline,
                arrived=arrived,
            )
        except BaseException:
            self.encoder.release(held_bytes)
            raise
        return partial(pending.cancel, cancel)

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
        images: NDArray[np.uint8],
        lease: Lease,
        *,
        labels: bool,
        priority: int = PRIORITY,
        patient: bool = False,
    ) -> tuple[NDArray[Any], Work]:
        """Return the labels, or the scores, of images (rows, H, W, C). Takes over the lease. Raises as `infer`. `patient`: see `Job`."""
        computed: tuple[NDArray[Any], Work] = await _awaited(
            partial(self._start, images, lease, labels=labels, priority=priority, patient=patient)
        )
        return computed

    def deliver(self) -> None:
        """Deliver the answers that are ready, on the event loop: for callers that keep it busy with many requests at once."""
        if self._mailbox is not None:
            self._mailbox.empty()

    def close(self) -> None:
        """End the threads beside the requests. The caller closes the runner and the slot."""
        self.shadows.close()
        self.encoder.close()

    def _start(
        self,
        images: NDArray[np.uint8],
        lease: Lease,
        done: Computed,
        *,
        labels: bool,
        priority: int,
        deadline: float | None = None,
        arrived: float = math.nan,
        patient: bool = False,
    ) -> Callable[[], bool]:
        """Start computing images, and return `Computation.cancel`."""
        rows, height, width, _ = images.shape
        job = Job(
            group=Group(lease.version, height, width, labels),
            rows=rows,
            nbytes=images.nbytes,
            priority=priority,
            deadline=deadline,
            patient=patient,
            cost=float(height * width),
            payload=Work(images=images, lease=lease),
            arrived=arrived,
        )
        finished = partial(self._finished, rows, labels)
        computation = Computation(job, self.runner, self._current_mailbox(), done=done, finished=finished, clock=self.clock)
        computation.start()
        return computation.cancel

    def _finished(self, rows: int, labels: bool, work: Work, answered_at: float) -> None:
        """Count a job that was computed and answered."""
        self._accounts.count_rows(work.version, rows)
        self.metrics.queue.observe(work.started - work.admitted)
        self.metrics.compute.observe(work.computed)
        self.metrics.batch.observe(work.batch_rows)
        self.runner.delivered(work.started, self.clock() - answered_at)
        self.shadows.cast(work, labels=labels)

    def _current_mailbox(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    def _reserve(self, wanted: Wanted) -> int:
        try:
            return self.encoder.reserve(wanted)
        except RefusedRequestError:
            self.metrics.refused["large answers"] += 1
            raise

    def _images(self, request: InferRequest, signature: Signature) -> NDArray[np.uint8]:
        expected = f"UINT8 (rows, height, width, {signature.channels})"
        if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
            names = ", ".join(shown(tensor.name) for tensor in request.inputs[:4])
            raise ProtocolError(f'inputs {names}: the model has one, "{INPUT}", {expected}')
        tensor = request.inputs[0]
        if tensor.datatype != "UINT8" or len(tensor.shape) != 4 or tensor.shape[3] != signature.channels or 0 in tensor.shape:
            raise ProtocolError(f'input "{INPUT}" is {tensor.datatype} {tensor.shape}: give {expected}, raw pixels, no side of 0')
        rows, height, width, _ = tensor.shape
        if rows > self.max_rows:
            raise ProtocolError(f"{rows} rows: this server computes at most {self.max_rows} at once; send them in several requests")
        if height * width > self.max_pixels:
            raise ProtocolError(f"images of {width}x{height} pixels: this server takes at most {self.max_pixels:,}", status=413)
        return tensor.data

    def _unknown(self, model: str) -> ProtocolError:
        return ProtocolError(f"model {shown(model)}: this server has {self.name}", status=404)


async def _awaited(start: Callable[[Callable[[Any], None]], Cancel]) -> Any:
    """Start something with a callback for its result, and await the result. `start` returns a function that cancels it."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def settle(result: Any) -> None:
        if not future.done():  # it was cancelled, which is raised below
            future.set_result(result)

    cancel = start(settle)
    try:
        result = await future
    except asyncio.CancelledError:
        cancel()
        raise
    if isinstance(result, Exception):
        try:
            raise result
        finally:
            del result, future  # an error holds this frame by its traceback, and with it the request
    return result
