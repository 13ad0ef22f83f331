"""What both faces do: a request is held against the model, admitted, computed with others, and answered.

    InferRequest -> lease on a version -> rows of one size -> runner -> labels, scores -> InferResponse
       404, 400          503                 400               503

A service knows neither HTTP nor gRPC. It is called, and calls back, on one event loop; batches are computed on the runner's threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError, bare
from muntin.serving.account import Account
from muntin.serving.batcher import Job, Refusal
from muntin.serving.description import ModelDescription, Statistics, TensorSpec
from muntin.serving.executor import Executor, Group, Work
from muntin.serving.forming import Forming, formed_apart
from muntin.serving.mailbox import Mailbox
from muntin.serving.metrics import Metrics
from muntin.serving.opening import NotReadyError
from muntin.serving.outputs import Wanted, make_outputs, output_names, read_wanted
from muntin.serving.protocol import InferRequest, InferResponse, ProtocolError, RefusedRequestError, shown
from muntin.serving.runner import AgainError, Runner
from muntin.serving.shadows import Shadows
from muntin.serving.slot import Lease, Slot
from muntin.serving.turnstile import Turnstile
from muntin.serving.version import UnknownVersionError, Version

INPUT = "images"
PRIORITY = 2
"""What a request without a priority has, of 1, the most urgent, and more."""
GONE = 16
"""Versions that the slot lists no more, of which what they were asked is still told: those that were asked first go first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An answer and how it came about, in seconds: reading the request, waiting for its batch, computing that, all of it. What these leave
    of it is putting the answer into form."""

    response: InferResponse
    read: float
    queued: float
    computed: float
    total: float
    batch_rows: int
    started: float
    """When its batch was, of the clock."""
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
        self.clock = clock
        self.shadows = Shadows(slot, executor, metrics)
        self.forming = Forming()
        self._mailbox: Mailbox | None = None
        self._accounts: dict[str, Account] = {}
        """By version: what it was asked. Only the event loop touches them."""

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def ready(self) -> bool:
        """Whether a request would be admitted, if there is room for it."""
        return self.slot.ready and self.runner.able and not self.draining

    def describe(self, model: str | None, version: str | None) -> ModelDescription:
        """The model, by the version that is named or the current one. Raises ProtocolError as `lease` does."""
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
        now, current = self.clock(), self.slot.current
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
        # `_begin` told it when the answer was ready for whoever waits; that coroutine runs only now.
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
        arrived = self.clock() if arrived is None else arrived
        lease = self.lease_to_compute(model, version)
        try:
            signature = lease.version.signature
            images = self._images(request, signature)
            wanted = read_wanted(request, signature, images.shape)
            held = self._hold(wanted)
        except BaseException:
            lease.release()
            raise
        if request.timeout_us is not None:
            deadline = min(arrived + request.timeout_us / 1e6, math.inf if deadline is None else deadline)
        self.account(lease.version.name)
        asked = _Asked(
            self, request, lease.version, wanted, rows=len(images), arrived=arrived, held=held,
            apart=formed_apart(wanted, copies=copies), like=like, encode=encode, done=done,
        )  # fmt: skip
        try:
            cancel = self._begin(
                images,
                lease,
                labels=wanted.labels,
                priority=request.priority or PRIORITY,
                deadline=deadline,
                came=arrived,
                unseen=0 if like is None else self.turnstile.unseen(like, arrived),
                done=asked.computed,
            )
        except BaseException:
            self.forming.let_go(held)
            raise
        return partial(asked.take_back, cancel)

    def account(self, version: str) -> Account:
        """What a version was asked so far."""
        found = self._accounts.get(version)
        if found is None:
            found = self._accounts[version] = Account()
            self._forget()
        return found

    def _forget(self) -> None:
        """Drops what is counted of versions that the slot lists no more, but of the last `GONE`: a server may see thousands of them."""
        listed = {entry.version for entry in self.slot.index()}
        counts: tuple[MutableMapping[str, Any], ...] = (self._accounts, self.metrics.rows)
        for counted in counts:
            for version in [name for name in counted if name not in listed][:-GONE]:
                del counted[version]

    def lease(self, model: str, version: str | None, *, canary: bool = True) -> Lease:
        """A lease on the version that a request names; `canary` as of `Slot.lease`. Raises ProtocolError: 404, or 503 where none is
        ready."""
        if model != self.name:
            raise ProtocolError(f"model {shown(model)}: this server has {self.name}", status=404)
        try:
            return self.slot.lease(version or None, canary=canary)
        except UnknownVersionError as error:
            raise ProtocolError(str(error), status=404) from error
        except NotReadyError as error:
            raise RefusedRequestError(str(error)) from error

    def lease_to_compute(self, model: str, version: str | None) -> Lease:
        """As `lease`, for what is to be computed: that no version is ready is counted."""
        try:
            return self.lease(model, version)
        except RefusedRequestError:
            self.metrics.refused["no version"] += 1
            raise

    def _hold(self, wanted: Wanted) -> int:
        try:
            return self.forming.hold(wanted)
        except RefusedRequestError:
            self.metrics.refused["large answers"] += 1
            raise

    async def compute(
        self,
        images: NDArray[np.uint8],
        lease: Lease,
        *,
        labels: bool,
        priority: int = PRIORITY,
        deadline: float | None = None,
        patient: bool = False,
    ) -> tuple[NDArray[Any], Work]:
        """The labels, or the scores, of images (rows, H, W, C) through the runner. Takes over the lease. `patient`: without an objective,
        as of a `Job`. Raises as `infer` does."""
        found: tuple[NDArray[Any], Work] = await _awaited(
            partial(self._begin, images, lease, labels=labels, priority=priority, deadline=deadline, patient=patient)
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
        patient: bool = False,
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
            patient=patient,
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
            if work.version not in self.metrics.rows:
                self._forget()
            work.admitted = job.arrived
            self.metrics.rows[work.version] += rows
            self.metrics.queue.observe(work.started - job.arrived)
            self.metrics.compute.observe(work.computed)
            self.metrics.batch.observe(work.batch_rows)
            done((answer, work))
            self.runner.delivered(work.started, self.clock() - given)
            self.shadows.cast(work, labels=labels)

        def answered(answer: Any) -> None:
            nonlocal given
            given = self.clock()
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
        self.shadows.close()
        self.forming.close()

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


class _Asked:
    """One request on its way: computed, put into form, and answered or taken back. On the event loop, but for `_form`."""

    def __init__(
        self,
        service: Service,
        request: InferRequest,
        version: Version,
        wanted: Wanted,
        *,
        rows: int,
        arrived: float,
        held: int,
        apart: bool,
        like: Hashable | None,
        encode: Callable[[InferResponse], Any] | None,
        done: Done,
    ) -> None:
        self._service, self._request, self._version, self._wanted = service, request, version, wanted
        self._rows, self._arrived, self._like, self._encode, self._done = rows, arrived, like, encode, done
        self._held, self._apart = held, apart
        """Bytes of its answer, if that is large, and whether it is put into form beside the event loop."""
        self._gone = False
        """Whether it was taken back."""

    def computed(self, found: tuple[NDArray[Any], Work] | Exception) -> None:
        service = self._service
        if not isinstance(found, Exception):
            if self._apart:
                service.forming.form(partial(self._form, *found), partial(self._formed, found[1]))
            else:
                self._formed(found[1], self._form(*found))
            return
        service.forming.let_go(self._held)
        # A candidate's refusal says nothing of the version that most requests are for.
        if self._like is not None and isinstance(found, RefusedRequestError) and found.holds and self._version is service.slot.current:
            service.turnstile.shut(self._like, self._arrived + found.holds, self._arrived + found.retry_after, str(found))
        self._failed()
        self._done(found)

    def _form(self, answer: NDArray[Any], work: Work) -> Answered | Exception:
        if self._gone:
            return ProtocolError("nobody waits for it", status=499)
        try:
            response = InferResponse(
                model=self._service.name,
                version=work.version,
                id=self._request.id,
                outputs=make_outputs(answer, self._wanted, self._version.signature),
                parameters={"recovered": work.recovered} if work.recovered else {},
            )
            encoded = None if self._encode is None else self._encode(response)
        except (ProtocolError, MemoryError) as error:
            return bare(error)
        except Exception as error:  # noqa: BLE001 - it is the answer, and nobody foresaw it: where it was raised is reported
            return error
        return Answered(
            response=response,
            encoded=encoded,
            read=max(work.admitted - self._arrived, 0.0),
            queued=max(work.started - work.admitted, 0.0),
            computed=work.computed,
            total=self._passed(),  # forming it took its time, too
            batch_rows=work.batch_rows,
            started=work.started,
        )

    def _formed(self, work: Work, found: Answered | Exception) -> None:
        service = self._service
        service.forming.let_go(self._held)
        if self._gone or isinstance(found, Exception):
            self._failed()
        else:
            if work.version != self._version.name:  # which failed, and another one answered
                self._failed()
            service.account(work.version).answered(
                rows=self._rows,
                batch_rows=work.batch_rows,
                total=found.total,
                read=found.read,
                queued=found.queued,
                computed=found.computed,
            )
            service.metrics.total.observe(found.total)
            if service.objective is not None and found.total > service.objective:
                service.metrics.late.inc()
        if not self._gone:
            self._done(found)

    def take_back(self, cancel: Callable[[], bool]) -> None:
        """`cancel`: what `Service._begin` gave; kept here it would make a circle, and images stay until that is collected."""
        self._gone = True
        if cancel():
            self._service.forming.let_go(self._held)
            self._failed()

    def _failed(self) -> None:
        self._service.account(self._version.name).failed(self._passed())

    def _passed(self) -> float:
        """Seconds since it came."""
        return self._service.clock() - self._arrived


def _error(answer: BaseException | Refusal) -> ProtocolError:
    """What a client is told of what the runner gave instead of an answer."""
    if isinstance(answer, Refusal):
        return RefusedRequestError(answer.message, retry_after=answer.retry_after or 1.0, holds=answer.holds)
    if isinstance(answer, NotReadyError | AgainError):  # its engine died
        return RefusedRequestError(str(answer))
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
