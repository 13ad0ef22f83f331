"""What both faces do: a request is held against the model, admitted, computed with others, and answered.

    InferRequest -> lease on a version -> rows of one size -> runner -> labels, scores -> InferResponse
       404, 400          503                 400               503

A service knows neither HTTP nor gRPC. It is called, and calls back, on one event loop; batches are computed on the runner's threads.

Outputs, by task (which of them a request names decides what is computed; none named: all):
    segment    labels UINT8 (B, sH, sW)         scores FP32 (B, K, sH, sW)
    classify   labels UINT8 (B,)                scores FP32 (B, K)
    restore    image UINT8 (B, sH, sW, C)       scores FP32 (B, C, sH, sW)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.serving.account import Account
from muntin.serving.batcher import Job, Refusal
from muntin.serving.description import ModelDescription, Statistics, TensorSpec
from muntin.serving.executor import Executor, Group, Work
from muntin.serving.mailbox import Mailbox
from muntin.serving.metrics import Metrics
from muntin.serving.protocol import InferOutput, InferRequest, InferResponse, ProtocolError, shown
from muntin.serving.runner import Runner
from muntin.serving.slot import Lease, Slot
from muntin.serving.turnstile import Turnstile
from muntin.serving.version import NotReadyError, UnknownVersionError, Version

INPUT = "images"
SHADOWS = 4
"""Shadow computations that may wait; beyond, an answer is not compared."""
INLINE = 1 << 16
"""Numbers of an answer up to which it is put into its form on the event loop; beyond, on a thread, beside which others are answered (but
while its JSON is written, which lets nobody else go on)."""
ENCODERS = 2
"""Answers that are put into form at the same time."""
FORM_BYTES = 1 << 30
"""Of answers that are to be put into form beside the event loop, from their requests' admission until that is done: a request whose answer
would go beyond is refused, unless there is no other."""
CLASSES, LISTED = 1 << 16, 256
"""Best classes of all rows and outputs of an answer together, each a string: what may be asked for, and up to how many are written on the
event loop."""
COPIED = 1 << 20
"""Bytes of an answer that are copied on the event loop at most, where it goes out as it was computed."""
PRIORITY = 2
"""What a request without a priority has, of 1, the most urgent, and more."""


class RefusedRequestError(ProtocolError):
    """A request that is not served now. `retry_after`: seconds after which it may be worth another try.

    `holds`: seconds for which an equal one would be refused as well, as far as can be told.
    """

    def __init__(self, message: str, *, status: int = 503, retry_after: float = 1.0, holds: float = 0.0) -> None:
        super().__init__(message, status=status)
        self.retry_after, self.holds = retry_after, holds


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An answer and how it came about, in seconds: waiting for its batch, computing that, all of it."""

    response: InferResponse
    queued: float
    computed: float
    total: float
    batch_rows: int
    encoded: Any = None
    """What `encode` made of the response, None without one."""


Done = Callable[[Answered | Exception], None]
Cancel = Callable[[], object]


class Service:
    """One model behind a name. `clock`: seconds, the runner's. `objective`: seconds or None; what misses it is counted."""

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
        self.turnstile = Turnstile()
        self._current = slot.current
        self._clock = clock
        self._shadows = ThreadPoolExecutor(max_workers=1, thread_name_prefix="muntin-shadow")
        self._shadowing = 0
        self._encoders = ThreadPoolExecutor(max_workers=ENCODERS, thread_name_prefix="muntin-encode")
        self._forming = 0
        """Bytes, of those that `FORM_BYTES` bounds."""
        self._mailbox: Mailbox | None = None
        self._accounts: dict[str, Account] = {}
        """By version: what it was asked. Only the event loop touches them."""

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def ready(self) -> bool:
        """Whether a request would be admitted, if there is room for it."""
        return self.slot.ready and not self.draining

    def describe(self, model: str | None, version: str | None) -> ModelDescription:
        """The model, by the version that is named or the one that serves. Raises ProtocolError as `lease` does."""
        with self.lease(model or self.name, version) as lease:
            signature, name = lease.version.signature, lease.version.name
        ready = tuple(entry.version for entry in self.slot.index() if entry.state == "ready")
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
        """What each version that was asked anything has done. Raises ProtocolError for another model, 404 for a version never asked."""
        if model is not None and model != self.name:
            raise ProtocolError(f"model {shown(model)}: this server has {self.name}", status=404)
        if version is None:
            current = self.slot.current
            asked = dict.fromkeys((*self._accounts, *(() if current is None else (current.name,))))
            return [self._accounts.get(name, Account()).statistics(self.name, name) for name in asked]
        if version not in self._accounts:
            self.lease(self.name, version).release()
        return [self._accounts.get(version, Account()).statistics(self.name, version)]

    def refusal(self, arrived: float, like: Hashable, *, model: str, version: str | None) -> RefusedRequestError | None:
        """Of a request that is refused whatever is in it, since it was read too late or is `like` one that was refused a moment ago.

        Costs next to nothing: at a flood this is all that most requests are given.
        """
        now, current = self._clock(), self.slot.current
        if current is not self._current:  # what was refused was another version's
            self._current = current
            self.turnstile.open()
        if self.objective is not None and now - arrived >= self.objective:
            self.turnstile.turn_away(like, arrived)
            error = RefusedRequestError("more requests come than can be read in time: try again")
        elif refused := self.turnstile.refused(like, arrived):
            error = RefusedRequestError(refused[1], retry_after=refused[0])
        else:
            return None
        name = version or (None if current is None else current.name)
        if model == self.name and name in self._accounts:
            self._accounts[name].failed(now - arrived)
        return error

    async def infer(
        self,
        request: InferRequest,
        *,
        model: str,
        version: str | None,
        arrived: float | None = None,
        deadline: float | None = None,
        encode: Callable[[InferResponse], Any] | None = None,
        copies: bool = False,
    ) -> Answered:
        """The answer. Raises ProtocolError as `submit` raises and answers. Cancelled, it takes the request back if that still waits."""
        answered: Answered = await _awaited(
            lambda done: self.submit(
                request, model=model, version=version, arrived=arrived, deadline=deadline, done=done, encode=encode, copies=copies
            )
        )
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
        like: Hashable | None = None,
        encode: Callable[[InferResponse], Any] | None = None,
        copies: bool = False,
    ) -> Cancel:
        """Asks for an answer. `done` is called once with it, or with a ProtocolError; maybe before this returns.

        `arrived`: when the request's last byte came, of the clock; None: now. `deadline`: of the clock, until when its client waits; it
        counts where it is before the request's own. The function that is returned takes the request back: `done` is not called any more.
        `like`: equal for requests that differ in their pixels alone (`refusal`). `encode`: makes the response what goes out; for a large
        one on a thread of its own. `copies`: it does not hand out what was computed, but a copy of that.

        Raises ProtocolError: 404 for another model or version, 400 for what the model does not take and for more best classes than
        `CLASSES`, 503 (`RefusedRequestError`) where no version is ready. Answers 503 where it cannot be answered in time, 500 where
        computing it failed.
        """
        arrived = self._clock() if arrived is None else arrived
        lease = self.lease(model, version)
        try:
            signature = lease.version.signature
            images = self._images(request, signature)
            wanted = _wanted(request, signature)
            labels = wanted == ("labels",)
            apart = self._apart(request, images, signature, wanted, labels, copies)
            if request.timeout_us is not None:
                deadline = min(arrived + request.timeout_us / 1e6, math.inf if deadline is None else deadline)
            priority = request.priority or PRIORITY
        except BaseException:
            lease.release()
            raise
        account = self._accounts.setdefault(lease.version.name, Account())
        gone = False

        def computed(found: tuple[NDArray[Any], Work] | Exception) -> None:
            if isinstance(found, Exception):
                self._forming -= apart
                # A candidate's refusal says nothing of the version that most requests are for.
                if like is not None and isinstance(found, RefusedRequestError) and found.holds and lease.version is self.slot.current:
                    self.turnstile.shut(like, arrived + found.holds, arrived + found.retry_after, str(found))
                account.failed(self._clock() - arrived)
                done(found)
                return
            answer, work = found

            def form() -> Answered | Exception:
                if gone:
                    return ProtocolError("nobody waits for it", status=499)
                try:
                    response = InferResponse(
                        model=self.name,
                        version=work.version,
                        id=request.id,
                        outputs=_outputs(answer, wanted, labels, signature),
                        parameters={"recovered": work.recovered} if work.recovered else {},
                    )
                    encoded = None if encode is None else encode(response)
                except Exception as error:  # noqa: BLE001 - it is the answer
                    return error
                queued, total = max(work.started - arrived, 0.0), self._clock() - arrived  # forming it took its time, too
                return Answered(
                    response=response, encoded=encoded, queued=queued, computed=work.computed, total=total, batch_rows=work.batch_rows
                )  # fmt: skip

            def formed(found: Answered | Exception) -> None:
                self._forming -= apart
                if gone or isinstance(found, Exception):
                    account.failed(self._clock() - arrived)
                else:
                    account.answered(
                        rows=len(images),
                        batch_rows=work.batch_rows,
                        total=found.total,
                        queued=work.started - arrived,
                        computed=work.computed,
                    )
                    self.metrics.total.observe(found.total)
                    if self.objective is not None and found.total > self.objective:
                        self.metrics.late.inc()
                if not gone:
                    done(found)

            if apart:
                self._form(form, formed)
            else:
                formed(form())

        unseen = 0 if like is None else self.turnstile.unseen(like, arrived)
        self._forming += apart
        try:
            cancel = self._begin(
                images, lease, labels=labels, priority=priority, deadline=deadline, came=arrived, unseen=unseen, done=computed
            )
        except BaseException:
            self._forming -= apart
            raise

        def take_back() -> None:
            nonlocal gone
            gone = True
            if cancel():
                self._forming -= apart
                account.failed(self._clock() - arrived)

        return take_back

    def _form(self, form: Callable[[], Answered | Exception], done: Done) -> None:
        """Puts a large answer into its form beside the event loop."""
        try:
            forming = asyncio.get_running_loop().run_in_executor(self._encoders, form)
        except RuntimeError:  # the service was closed
            done(RefusedRequestError("the server is shutting down"))
            return

        def formed(found: asyncio.Future[Answered | Exception]) -> None:
            done(RefusedRequestError("the server is shutting down") if found.cancelled() else found.result())

        forming.add_done_callback(formed)

    def lease(self, model: str, version: str | None) -> Lease:
        """A lease on the version that a request names. Raises ProtocolError: 404, or 503 where none is ready."""
        if model != self.name:
            raise ProtocolError(f"model {shown(model)}: this server has {self.name}", status=404)
        try:
            return self.slot.lease(version or None)
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except NotReadyError as error:
            raise RefusedRequestError(str(error)) from error

    async def compute(
        self, images: NDArray[np.uint8], lease: Lease, *, labels: bool, priority: int = PRIORITY, deadline: float | None = None
    ) -> tuple[NDArray[Any], Work]:
        """The labels, or the scores, of images (rows, H, W, C) through the runner. Takes over the lease. Raises as `infer` does."""
        found: tuple[NDArray[Any], Work] = await _awaited(
            partial(self._begin, images, lease, labels=labels, priority=priority, deadline=deadline)
        )
        return found

    def _begin(
        self,
        images: NDArray[np.uint8],
        lease: Lease,
        done: Callable[[tuple[NDArray[Any], Work] | Exception], None],
        *,
        labels: bool,
        priority: int,
        deadline: float | None,
        came: float | None = None,
        unseen: int = 0,
    ) -> Callable[[], bool]:
        """As `compute`. What it returns tells `done` to stay silent: False where that has been called already."""
        rows, height, width, _ = images.shape
        work = Work(images=images, lease=lease)
        job = Job(
            group=Group(lease.version, height, width, labels),
            rows=rows,
            nbytes=images.nbytes,
            priority=priority,
            deadline=deadline,
            came=came,
            cost=float(height * width),
            unseen=unseen,
            payload=work,
        )
        mailbox = self._box()
        silent = False
        given = 0.0

        def settle(answer: Any) -> None:
            nonlocal silent
            if job.ticket:  # it was admitted: a batch ended, or a job that waited was dropped
                self.turnstile.open()
            if silent:
                return
            silent = True
            if isinstance(answer, BaseException | Refusal):
                done(_error(answer))
                return
            self.metrics.rows[work.version] += rows
            self.metrics.queue.observe(work.started - job.arrived)
            self.metrics.compute.observe(work.computed)
            self.metrics.batch.observe(work.batch_rows)
            done((answer, work))
            self.runner.delivered(work.started, self._clock() - given)
            self._shadow(images, answer, labels, work.by)

        def answered(answer: Any) -> None:
            nonlocal given
            given = self._clock()
            lease.release()
            try:
                mailbox.put(settle, answer)
            except RuntimeError:
                if not mailbox.loop.is_closed():  # else it was computed when the time at the end was over, and nobody waits
                    raise

        def cancel() -> bool:
            nonlocal silent
            before, silent = silent, True
            self.runner.cancel(job)
            self.turnstile.open()
            return not before

        try:
            self.runner.submit(job, answered)
        except BaseException:
            lease.release()
            raise
        return cancel

    def deliver(self) -> None:
        """Gives the answers that are there, on the event loop: for whoever keeps it busy with many requests at once."""
        if self._mailbox is not None:
            self._mailbox.empty()

    def _box(self) -> Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    def close(self) -> None:
        """Ends what runs beside the requests. The runner and the slot are the caller's to close."""
        self._shadows.shutdown(wait=True, cancel_futures=True)
        self._encoders.shutdown(wait=True, cancel_futures=True)

    def _images(self, request: InferRequest, signature: Signature) -> NDArray[np.uint8]:
        form = f"UINT8 (rows, height, width, {signature.channels})"
        if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
            names = ", ".join(shown(given.name) for given in request.inputs[:4])
            raise ProtocolError(f'inputs {names}: the model has one, "{INPUT}", {form}')
        given = request.inputs[0]
        if given.datatype != "UINT8" or len(given.shape) != 4 or given.shape[3] != signature.channels or 0 in given.shape:
            raise ProtocolError(f'input "{INPUT}" is {given.datatype} {given.shape}: give {form}, raw pixels, no side of 0')
        rows, height, width, _ = given.shape
        if rows > self.max_rows:
            raise ProtocolError(f"{rows} rows: this server computes at most {self.max_rows} at once; send them in several requests")
        if height * width > self.max_pixels:
            raise ProtocolError(f"images of {width}x{height} pixels: this server takes at most {self.max_pixels:,}", status=413)
        return given.data

    def _apart(
        self, request: InferRequest, images: NDArray[np.uint8], signature: Signature, wanted: tuple[str, ...], labels: bool, copies: bool
    ) -> int:
        """Bytes of the answer that is to be put into form beside the event loop; 0: not beside it.

        Raises ProtocolError for more best classes than `CLASSES`, RefusedRequestError where `FORM_BYTES` wait already.
        """
        rows, height, width, _ = images.shape
        numbers: int = rows if labels else rows * signature.outputs
        if signature.task != "classify":
            numbers *= height * width * signature.scale * signature.scale
        few = True
        for output in request.outputs:
            if output.classification:
                few = self._listed(request, images, signature) <= LISTED
                break
        if few and numbers <= INLINE:
            return 0
        nbytes = numbers if labels else 4 * numbers
        if few and not (copies and nbytes > COPIED) and _as_it_is(request, wanted, labels):
            return 0
        if self._forming and self._forming + nbytes > FORM_BYTES:
            raise RefusedRequestError("large answers fill what this server puts into form: try again, or ask for one output in binary")
        return nbytes

    def _listed(self, request: InferRequest, images: NDArray[np.uint8], signature: Signature) -> int:
        """Best classes that are to be written for a request, at most. Raises ProtocolError for more than `CLASSES`."""
        rows, *row = signature.scores_shape(*images.shape[:3])
        count = sum(rows * min(output.classification or 0, math.prod(row)) for output in request.outputs)
        if count > CLASSES:
            raise ProtocolError(
                f"classification of {rows} rows asks for {count:,} classes: this server writes at most {CLASSES:,} in one answer; "
                "ask for fewer, or for the output itself"
            )
        return count

    def _shadow(self, images: NDArray[np.uint8], answer: NDArray[Any], labels: bool, by: Version | None) -> None:
        lease = self.slot.shadow(by)
        if lease is None:
            return
        if self._shadowing >= SHADOWS:
            lease.release()
            self.metrics.shadow_dropped.inc()
            return
        self._shadowing += 1

        def compute() -> None:
            try:
                with lease:
                    self.executor.shadow(lease.version, images, answer, labels=labels)
            finally:
                self._shadowing -= 1

        self._shadows.submit(compute)


def output_names(signature: Signature) -> tuple[str, ...]:
    """The outputs of a model."""
    return ("image", "scores") if signature.task == "restore" else ("labels", "scores")


def _wanted(request: InferRequest, signature: Signature) -> tuple[str, ...]:
    names = output_names(signature)
    wanted = tuple(output.name for output in request.outputs) or names
    for name in wanted:
        if name not in names:
            raise ProtocolError(f"output {shown(name)}: the model gives {' and '.join(names)}")
    return wanted


def _as_it_is(request: InferRequest, wanted: tuple[str, ...], labels: bool) -> bool:
    """Whether the answer goes out as it was computed: in binary, and nothing made of it."""
    binary = (
        all(output.binary and output.classification is None for output in request.outputs) if request.outputs else request.binary_default
    )
    return binary and (labels or wanted == ("scores",))


def _outputs(answer: NDArray[Any], wanted: tuple[str, ...], labels: bool, signature: Signature) -> tuple[InferOutput, ...]:
    if labels:
        return (InferOutput(name="labels", data=answer),)
    classes = tuple(entry.name for entry in signature.classes)
    found = []
    for name in wanted:
        if name == "scores":
            found.append(InferOutput(name=name, data=answer, labels=classes if signature.task == "classify" else ()))
        elif name == "labels":
            found.append(InferOutput(name=name, data=answer.argmax(axis=1).astype(np.uint8)))
        else:
            found.append(InferOutput(name=name, data=pixels(answer)))
    return tuple(found)


def pixels(scores_BCHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (B, H, W, C) of the scores of a model that restores."""
    rounded = np.clip(np.rint(scores_BCHW), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded.transpose(0, 2, 3, 1))


def _error(answer: BaseException | Refusal) -> ProtocolError:
    """What a client is told of what the runner gave instead of an answer."""
    if isinstance(answer, Refusal):
        return RefusedRequestError(answer.message, retry_after=answer.retry_after or 1.0, holds=answer.holds)
    error = ProtocolError(str(answer)) if isinstance(answer, DataError) else ProtocolError(f"the model failed: {answer}", status=500)
    error.__cause__ = answer
    return error


async def _awaited(begin: Callable[[Callable[[Any], None]], Cancel]) -> Any:
    """What is begun with a function to call when it is done, and gives back one to cancel it, for who can wait."""
    found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def settle(answer: Any) -> None:
        if not found.done():  # it was cancelled, and is about to say so
            found.set_result(answer)

    cancel = begin(settle)
    try:
        answer = await found
    except asyncio.CancelledError:
        cancel()
        raise
    if isinstance(answer, Exception):
        try:
            raise answer
        finally:
            del answer, found  # an error holds this frame by its traceback, and with it what was asked
    return answer
