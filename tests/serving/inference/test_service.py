"""Encoding of answers beside the event loop, and serving while a version is tried. The answers of the protocols are tested in
`contract`."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.images import encode_png
from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.latency_model import LatencyModel
from muntin.serving.batching.workers import HANGING, Runner
from muntin.serving.http.image_route import ImageRoute
from muntin.serving.inference.encoding import INLINE_NUMBERS
from muntin.serving.inference.executor import Executor
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.service import Service, _Mailbox
from muntin.serving.inference.statistics import UNLISTED
from muntin.serving.protocol.messages import InferInput, InferRequest, ProtocolError, RefusedRequestError
from muntin.serving.versions.rollout import ENOUGH, Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import Version
from serving_parts import on_trial

SIDE = 150
"""Side of an image, pixels, whose scores are encoded on a thread."""
BODY_BYTES = 1 << 20
"""Largest request."""


@contextmanager
def service_of(shelf: Any, rollout: Rollout | None = None, objective: float | None = None) -> Iterator[Service]:
    slot = Slot("m", shelf, rollout=rollout or Rollout())
    slot.load(Path("1"), "1")
    executor = Executor(slot)
    runner = Runner(Batcher(LatencyModel(), objective=objective, max_rows=32, queue_rows=1000, queue_bytes=1 << 30), executor)
    service = Service(slot, runner, executor, metrics=Metrics(), objective=objective, max_rows=32, max_pixels=SIDE**2)
    try:
        yield service
    finally:
        runner.close()
        service.close()
        slot.close()


def request_of(side: int = SIDE) -> InferRequest:
    data = np.zeros((1, side, side, 3), np.uint8)
    return InferRequest(
        id="", inputs=(InferInput(name="images", datatype="UINT8", shape=data.shape, data=data),), outputs=(), parameters={}
    )


def counted(service: Service, version: str = "1") -> tuple[int, int]:
    """Numbers of answered and failed requests of a version."""
    statistics = service.statistics("m", version)[0]
    return statistics.success.count, statistics.fail.count


def test_many_answers_wait_for_encoding(shelf: Any) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            released = threading.Event()
            requests = [
                asyncio.create_task(service.infer(request_of(), model="m", version=None, encode=lambda _: released.wait(60)))
                for _ in range(40)
            ]
            while service.runner.snapshot().finished < len(requests):
                await asyncio.sleep(0.01)
            assert counted(service) == (0, 0)
            released.set()
            answers = await asyncio.gather(*requests)
            assert all(answer.encoded for answer in answers)
            assert counted(service) == (40, 0)

    asyncio.run(ask())


@pytest.mark.parametrize("side", [8, SIDE])
def test_time_of_a_request_includes_encoding(shelf: Any, side: int) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            service.objective = 0.15  # which the engine keeps
            answered = await service.infer(request_of(side), model="m", version=None, encode=lambda _: time.sleep(0.2))
            text = service.metrics.render().decode()
            assert answered.total > 0.2
            assert float(re.findall(r"muntin_request_seconds_sum (\S+)", text)[0]) == answered.total
            assert "muntin_objective_missed_total 1.0" in text
            statistics = service.statistics("m", "1")[0]
            assert statistics.compute_output.ns > 2e8
            assert statistics.success.ns >= statistics.compute_output.ns

    asyncio.run(ask())


def test_times_of_reading_and_waiting(shelf: Any) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            arrived = service.clock() - 5
            answered = await service.infer(request_of(8), model="m", version=None, arrived=arrived)
            assert answered.read >= 5
            assert 0 <= answered.queued < 5
            statistics = service.statistics("m", "1")[0]
            assert statistics.compute_input.ns >= 5e9 > statistics.queue.ns
            parts = (statistics.queue, statistics.compute_input, statistics.compute_infer, statistics.compute_output)
            assert abs(sum(part.ns for part in parts) - statistics.success.ns) <= len(parts)

    asyncio.run(ask())


def test_overhead_includes_encoding_and_resuming(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coroutine of an answer resumes in a later round of the loop, here after 50 ms."""

    async def ask() -> None:
        with service_of(shelf) as service:
            deliveries = list[float]()
            monkeypatch.setattr(service.runner, "delivered", deliveries.append)
            request = asyncio.create_task(service.infer(request_of(8), model="m", version=None, encode=lambda _: time.sleep(0.02)))
            await asyncio.sleep(0)  # until it is admitted
            while service.runner.snapshot().finished < 1:
                time.sleep(0.001)
            time.sleep(0.05)
            answered = await request
            (seconds,) = deliveries
            assert 0.07 <= seconds < answered.total + 0.01

    asyncio.run(ask())


def test_large_answers_are_no_overhead(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            monkeypatch.setattr(service.runner, "delivered", lambda seconds: pytest.fail("it was counted"))
            await service.infer(request_of(), model="m", version=None)

    asyncio.run(ask())


def test_loop_is_woken_once_for_several_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        loop, wakes = asyncio.get_running_loop(), list[Any]()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (wakes.append(call), wake(*call)))
        mailbox, futures = _Mailbox(), [loop.create_future() for _ in range(3)]
        thread = threading.Thread(target=lambda: [mailbox.put(future, number) for number, future in enumerate(futures)])
        thread.start()
        thread.join()
        futures[1].cancel()
        assert [await futures[0], await futures[2]] == [0, 2]
        assert len(wakes) == 1

    asyncio.run(run())


@pytest.mark.parametrize("end", ["answered", "failed", "cancelled"])
def test_large_answers_bounded_before_computing(shelf: Any, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("muntin.serving.inference.encoding.HELD_BYTES", 4 * INLINE_NUMBERS)

    async def ask() -> None:
        with service_of(shelf) as service:
            released = threading.Event()

            def encode(_: Any) -> None:
                released.wait(60)
                if end == "failed":
                    raise ZeroDivisionError

            def infer() -> Any:
                return service.infer(request_of(), model="m", version=None, encode=encode)

            first = asyncio.create_task(infer())  # alone it may go beyond the bound
            while service.runner.snapshot().finished < 1:
                await asyncio.sleep(0.01)
            with pytest.raises(RefusedRequestError, match="fill what this server may hold"):
                await infer()
            assert service.runner.snapshot().admitted == 1
            assert service.metrics.refused == {"large answers": 1}
            if end == "cancelled":
                await asyncio.sleep(0.05)  # until it is being put into form
                first.cancel()
            released.set()
            await service.infer(request_of(8), model="m", version=None)  # which is done on the event loop
            await asyncio.wait([first])
            while service.encoder.held_bytes:
                await asyncio.sleep(0.01)
            assert counted(service) == ((2, 0) if end == "answered" else (1, 1))
            (following,) = await asyncio.gather(infer(), return_exceptions=True)  # there is room again
            assert isinstance(following, ZeroDivisionError) == (end == "failed")

    asyncio.run(ask())


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("side", [8, SIDE])
@pytest.mark.parametrize("fails", ["nothing", "engine", "encoding"])
def test_ended_request_holds_no_images(shelf: Any, side: int, fails: str) -> None:
    """Not even until cycles are collected."""

    def encode(_: Any) -> None:
        if fails == "encoding":
            raise ZeroDivisionError

    async def ask() -> None:
        with service_of(shelf) as service:
            if fails == "engine":
                service.slot.open[0].session._infer = None  # type: ignore[method-assign, assignment]
            request = request_of(side)
            images = weakref.ref(request.inputs[0].data)
            task = asyncio.create_task(service.infer(request, model="m", version=None, encode=encode))
            del request
            await asyncio.wait([task])
            assert (task.exception() is None) == (fails == "nothing")
            del task
            while images() is not None:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(ask(), 30))


@contextmanager
def trying(service: Service) -> Iterator[list[Any]]:
    """Try version 2."""
    with service.slot.lease() as lease:  # a version that nobody asks is not tried against
        service.slot.observe(lease.version, seconds=0.001, rows=1)
    with on_trial(service.slot, "2", ends=True) as outcome:
        yield outcome


def test_candidate_compared_with_current_version(shelf: Any) -> None:
    """Version 2 gives other labels. Requests that it answers itself, as a canary or because they name it, do not count."""
    rollout = Rollout(canary=0.5, shadow=1.0, for_requests=10_000, max_slowdown=math.inf)

    async def ask(service: Service, version: str | None) -> str:
        return (await service.infer(request_of(8), model="m", version=version)).response.version

    async def try_it() -> None:
        with service_of(shelf, rollout) as service, trying(service) as outcome:
            trial = service.slot._routes.trial
            assert trial is not None
            assert {await ask(service, "2") for _ in range(10)} == {"2"}
            answered: list[str] = []
            while not outcome and len(answered) < 500:
                answered.append(await ask(service, None))
                while service.shadows.pending:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0)
            assert "its answers agree by 0.0%" in str(outcome[0])
            assert trial.compared == ENOUGH
            assert "2" in answered

    asyncio.run(try_it())


@pytest.mark.parametrize("side", [8, SIDE])
def test_counts_when_another_version_answers(shelf: Any, side: int) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            service.slot.load(Path("2"), "2").session._infer = None  # type: ignore[method-assign, assignment]
            answered = await service.infer(request_of(side), model="m", version="2")
            assert answered.response.version == "1"
            assert (counted(service, "1"), counted(service, "2")) == ((1, 0), (0, 1))
            (first,), (second,) = service.statistics("m", "1"), service.statistics("m", "2")
            assert (first.inference_count, first.execution_count, first.queue.count) == (1, 1, 1)
            assert (second.inference_count, second.execution_count, second.queue.count) == (0, 0, 0)
            assert second.fail.ns > 0
            assert service.metrics.rows == {"1": 1}

    asyncio.run(ask())


def hang(version: Version) -> threading.Event:
    """Make its engine hang until the returned event is set."""
    free = threading.Event()
    computes = version.session._infer

    def infer(*given: Any) -> Any:
        assert free.wait(60)
        return computes(*given)

    version.session._infer = infer  # type: ignore[method-assign]
    return free


def test_hanging_version_is_sent_back(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_UNKNOWN_S", 0.5)
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_S", 0.5)

    async def ask() -> None:
        with service_of(shelf, Rollout(for_seconds=0.4)) as service:
            free = hang(service.slot.load(Path("2"), "2"))
            requests = [asyncio.create_task(service.infer(request_of(8), model="m", version=None)) for _ in range(5)]
            first, *others = await asyncio.gather(*requests, return_exceptions=True)
            assert isinstance(first, ProtocolError)
            assert first.status == 500
            assert "the engine did not come back" in str(first)
            assert {other.response.version for other in others} == {"1"}  # type: ignore[union-attr]
            assert service.ready
            current = service.slot.current
            assert current is not None
            assert current.name == "1"
            free.set()

    asyncio.run(ask())


def test_not_ready_while_the_engine_hangs(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_UNKNOWN_S", 0.05)
    monkeypatch.setattr("muntin.serving.batching.workers._GRACE_S", 0.0)

    async def ask() -> None:
        with service_of(shelf) as service:
            current = service.slot.current
            assert current is not None
            free = hang(current)
            requests = [asyncio.create_task(service.infer(request_of(8), model="m", version=None)) for _ in range(HANGING + 2)]
            answers = await asyncio.gather(*requests, return_exceptions=True)
            assert {getattr(answer, "status", None) for answer in answers[:-1]} == {500}
            assert isinstance(answers[-1], RefusedRequestError)
            assert not service.ready
            with pytest.raises(RefusedRequestError, match="start the server again"):
                await service.infer(request_of(8), model="m", version=None)
            free.set()
            while not service.ready:
                await asyncio.sleep(0.01)
            assert (await service.infer(request_of(8), model="m", version=None)).response.version == "1"

    asyncio.run(ask())


def test_picture_in_tiles_beside_requests(shelf: Any) -> None:
    """A tile takes longer than the objective allows."""

    async def ask() -> None:
        with service_of(shelf, objective=0.1) as service:
            current = service.slot.current
            assert current is not None
            computes = current.session._infer

            def infer(inputs: Any, *rest: Any) -> Any:
                time.sleep(0.15 if inputs["images"].shape[1] > 8 else 0.002)
                return computes(inputs, *rest)

            current.session._infer = infer  # type: ignore[method-assign]
            pictures, over, answered = ImageRoute(service, body_bytes=BODY_BYTES, tile=32), asyncio.Event(), 0

            async def client() -> None:
                nonlocal answered
                while not over.is_set():
                    try:
                        await service.infer(request_of(8), model="m", version=None)
                    except RefusedRequestError:
                        await asyncio.sleep(0.005)
                    else:
                        answered += 1

            clients = [asyncio.create_task(client()) for _ in range(2)]
            while answered <= 3:
                await asyncio.sleep(0.01)
            answered = 0
            try:
                answer = await asyncio.wait_for(pictures.answer(encode_png(np.zeros((60, 60, 3), np.uint8)), {}), 60)
                assert answer.media_type == "image/png"
                assert answered > 3
            finally:
                over.set()
                await asyncio.gather(*clients)
                await asyncio.to_thread(pictures.close)

    asyncio.run(ask())


def test_picture_names_its_version(shelf: Any, wait_until: Any) -> None:
    """A canary whose engine dies: the current version computes what it was to compute."""
    content = encode_png(np.zeros((8, 8, 3), np.uint8))

    async def ask() -> None:
        with service_of(shelf, Rollout(canary=1.0)) as service, trying(service) as outcome:
            pictures = ImageRoute(service, body_bytes=BODY_BYTES)
            try:
                assert (await pictures.answer(content, {})).version == "2"
                service.slot.lease().version.session._infer = None  # type: ignore[method-assign, assignment]
                assert (await pictures.answer(content, {})).version == "1"
                await asyncio.to_thread(wait_until, lambda: outcome)
            finally:
                await asyncio.to_thread(pictures.close)

    asyncio.run(ask())


def test_refusals_without_a_version_are_counted(shelf: Any) -> None:
    async def ask() -> None:
        with service_of(shelf) as service:
            pictures = ImageRoute(service, body_bytes=BODY_BYTES)
            service.slot.unload()
            for look in (lambda: service.describe(None, None), lambda: service.lease("m", None), lambda: service.statistics("m", "1")):
                with pytest.raises(RefusedRequestError):
                    look()
            assert service.metrics.refused == {}
            with pytest.raises(RefusedRequestError):
                await service.infer(request_of(8), model="m", version=None)
            with pytest.raises(RefusedRequestError):
                await pictures.answer(encode_png(np.zeros((8, 8, 3), np.uint8)), {})
            assert service.metrics.refused == {"no version": 2}
            await asyncio.to_thread(pictures.close)

    asyncio.run(ask())


def test_describe_while_a_version_is_tried(shelf: Any, signature_of: Any) -> None:
    shelf.signatures["2"] = signature_of(classes=("sea", "field", "roof", "road", "tree"))  # one more than version 1
    with service_of(shelf, Rollout(canary=1.0)) as service, trying(service):
        assert [service.describe(None, version).outputs[1].shape[1] for version in (None, "2", "1", None)] == [4, 5, 4, 4]
        with service.lease("m", None) as lease:  # a request to compute is the candidate's
            assert lease.version.name == "2"


def test_statistics_of_old_versions_are_forgotten(shelf: Any) -> None:
    async def ask() -> None:
        with service_of(shelf, Rollout(for_seconds=0)) as service:
            for number in range(2, 60):
                await service.infer(request_of(8), model="m", version=None)
                service.slot.load(Path(str(number)), str(number))
            versions = [item.version for item in service.statistics("m", None)]
            assert versions == [str(number) for number in range(int(versions[0]), 60)]
            assert set(service.metrics.rows) == set(versions) - {"59"}  # which was never asked
            listed = {entry.version for entry in service.slot.index()}
            assert UNLISTED <= len(set(versions) - listed) <= UNLISTED + 2  # one went since the last was asked
            assert b'muntin_rows_total{version="58"} 1.0' in service.metrics.render()
            assert b'version="1"' not in service.metrics.render()

    asyncio.run(ask())
