"""The short way of inference: where it goes wrong in ways that nobody foresaw, and what a flood gets of it."""

from __future__ import annotations

import asyncio
import gc
import gzip
import io
import json
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from muntin.serving import http
from muntin.serving.access_log import AccessLog
from muntin.serving.batcher import Batch, Batcher
from muntin.serving.executor import Executor
from muntin.serving.http import HttpFace
from muntin.serving.json_codec import decode_request
from muntin.serving.latency import LatencyModel
from muntin.serving.metrics import Metrics
from muntin.serving.protocol import Limits, ProtocolError, RefusedRequestError
from muntin.serving.rollout import Rollout
from muntin.serving.runner import Runner
from muntin.serving.service import Service
from muntin.serving.slot import Slot

HEAD = json.dumps(
    {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": 3}}]}
).encode()
SCOPE: dict[str, Any] = {
    "type": "http", "method": "POST", "path": "/v2/models/m/infer",
    "headers": [(b"inference-header-content-length", b"%d" % len(HEAD))],
}  # fmt: skip


class Broken:
    """A service with a fault in it: at once, or in what it answers."""

    def __init__(self, *, at_once: bool) -> None:
        self.metrics, self.at_once = Metrics(), at_once

    def refusal(self, arrived: float, like: Any, **_: Any) -> None:
        return

    def deliver(self) -> None:
        return

    def submit(self, request: Any, *, done: Any, **_: Any) -> Any:
        if self.at_once:
            raise ZeroDivisionError("a secret")
        done(ZeroDivisionError("a secret"))
        return lambda: None


@pytest.mark.parametrize("at_once", [True, False])
def test_a_fault_is_answered_and_reported_and_goes_no_further(at_once: bool) -> None:
    async def run() -> tuple[list[Any], list[BaseException], Broken]:
        replies: list[Any] = []
        reported: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        service = Broken(at_once=at_once)
        face = HttpFace(cast(Any, service), cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
        face.begin(SCOPE, HEAD + b"abc", 0.0, lambda *reply: replies.append(reply))()  # the client goes, and changes nothing any more
        return replies, reported, service

    replies, reported, service = asyncio.run(run())
    ((status, _, parts),) = replies
    assert status == 500
    assert b"secret" not in b"".join(parts)
    assert len(reported) == 1
    assert dict(service.metrics.requests) == {("http", "failed"): 1}


# ---- packed bodies


class Asked(Broken):
    """A service that has no such model, and knows how many bodies it was asked about."""

    objective: float | None = None

    def __init__(self) -> None:
        super().__init__(at_once=False)
        self.count = 0

    def submit(self, request: Any, *, done: Any, **_: Any) -> Any:
        self.count += 1
        done(ProtocolError("there is no such model", status=404))
        return lambda: None


@pytest.mark.parametrize("large", [False, True])
def test_packed_bodies_are_unpacked_however_many_come_at_once(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []  # how many were unpacked, and not asked about
    inflate = http._inflated

    def unpack(*given: Any) -> Any:
        found = inflate(*given)
        waiting.append(len(waiting) + 1 - service.count)
        return found

    async def run() -> None:
        face = HttpFace(cast(Any, service), cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
        replies: list[int] = []
        goes = [face.begin(scope, body, time.monotonic(), lambda status, *_: replies.append(status)) for _ in range(40)]
        if large:
            assert not replies
            goes[20]()
        while len(replies) < 40 - large:
            await asyncio.sleep(0.001)
        assert set(replies) == {404}
        assert len(waiting) == 40 - large
        face.close()

    head = HEAD + b" " * (http.SMALL if large else 0)
    scope = SCOPE | {"headers": [(b"inference-header-content-length", b"%d" % len(head)), (b"content-encoding", b"gzip")]}
    body = gzip.compress(head + b"abc", compresslevel=0)
    service = Asked()
    with monkeypatch.context() as patch:
        patch.setattr(http, "_inflated", unpack)
        asyncio.run(run())
    assert max(waiting) == 1


def test_a_packed_body_that_waits_too_long_or_until_the_end_is_refused() -> None:
    async def run(*, closed: bool) -> list[int]:
        face = HttpFace(cast(Any, service), cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
        replies: list[int] = []
        if closed:
            face.close()
        for _ in range(3):
            face.begin(scope, body, time.monotonic(), lambda status, *_: replies.append(status))
        while len(replies) < 3:
            await asyncio.sleep(0.001)
        face.close()
        return replies

    scope = SCOPE | {"headers": [(b"content-encoding", b"deflate")]}
    body = zlib.compress(bytes(http.SMALL + 1))
    service = Asked()
    assert asyncio.run(run(closed=True)) == [503] * 3
    service.objective = 0.0
    assert asyncio.run(run(closed=False)) == [503] * 3
    assert service.count == 0


# ---- a flood

ENGINE_S, OBJECTIVE_S = 0.02, 0.1


@contextmanager
def slow_service(shelf: Any) -> Iterator[tuple[Service, Runner]]:
    """A model whose batches, of one row, take 20 ms."""
    slot = Slot("m", shelf, rollout=Rollout())
    slot.load(Path("1"), "1")
    executor = Executor(slot)

    def execute(batch: Batch) -> Any:
        time.sleep(ENGINE_S)
        return executor(batch)

    batcher = Batcher(LatencyModel(), objective=OBJECTIVE_S, max_rows=1, queue_rows=1000, queue_bytes=1 << 20)
    runner = Runner(batcher, execute)
    service = Service(slot, runner, executor, metrics=Metrics(), objective=OBJECTIVE_S, max_rows=1, max_pixels=100)
    try:
        yield service, runner
    finally:
        runner.close()
        service.close()
        slot.close()


@pytest.mark.parametrize("known", [False, True])  # the head: a connection then asks for a refusal before it begins anything
def test_a_flood_is_refused_without_being_read_and_every_request_is_counted(shelf: Any, known: bool) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, runner):
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            replies: Counter[int] = Counter()
            sent = 0
            scope = dict(SCOPE)
            if known:
                face.learn(scope)

            def send(body: bytes = HEAD + b"abc") -> None:
                nonlocal sent
                sent += 1
                if (answer := face.refusal(scope, memoryview(body), time.monotonic())) is not None:
                    assert known
                    assert (b"retry-after", b"1") in answer[1]
                    replies.update([answer[0]])
                    return
                face.begin(scope, body, time.monotonic(), lambda status, headers, parts: replies.update([status]))

            for _ in range(3):  # one after the other: the model's time is learned
                send()
                while sum(replies.values()) < sent:
                    await asyncio.sleep(0.001)
            assert set(replies) == {200}
            began = time.monotonic()
            while time.monotonic() < began + 0.5:
                for _ in range(20):
                    send()
                await asyncio.sleep(0.001)
            other = HEAD.replace(b"UINT8", b"UINT9")
            face.begin({**SCOPE, "headers": [(b"inference-header-content-length", b"%d" % len(other))]}, other + b"abc", time.monotonic(),
                       lambda status, headers, parts: replies.update([status]))  # fmt: skip
            while sum(replies.values()) < sent + 1:
                await asyncio.sleep(0.001)
            refused = runner.snapshot().refused["late"]
            assert set(replies) == {200, 503, 400}
            assert replies[400] == 1  # what is wrong is said, flood or no flood
            assert 5 < replies[200] < 40  # the engine was busy
            assert refused + runner.snapshot().dropped + service.turnstile.count == replies[503]
            assert service.turnstile.count > 2 * refused
            assert service.metrics.requests["http", "refused"] == replies[503]
            (statistics,) = service.statistics("m", None)
            assert statistics.fail.count == replies[503]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("more", "tokens", "log"),
    [((b"content-encoding", b"gzip"), (), None), ((b"authorization", b"Bearer no"), ("yes",), None), ((b"a", b"b"), (), AccessLog())],
)
def test_nothing_is_refused_at_once_that_is_wrong_or_written_down(
    shelf: Any, more: tuple[bytes, bytes], tokens: tuple[str, ...], log: AccessLog | None
) -> None:
    with slow_service(shelf) as (service, _):
        face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=tokens, log=log)
        scope = {**SCOPE, "headers": [*SCOPE["headers"], more]}
        face.learn(scope)
        assert face.refusal(scope, memoryview(HEAD), time.monotonic() - OBJECTIVE_S) is None
        other, plain = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None), dict(SCOPE)
        other.learn(plain)
        answer = other.refusal(plain, memoryview(HEAD), time.monotonic() - OBJECTIVE_S)
        assert answer is not None
        assert answer[0] == 503


def test_what_was_read_after_its_objective_is_refused_unread(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, _):
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            replies: list[Any] = []
            face.begin(SCOPE, b"nonsense", time.monotonic() - OBJECTIVE_S, lambda *reply: replies.append(reply))
            ((status, headers, parts),) = replies
            assert status == 503
            assert (b"retry-after", b"1") in headers
            assert b"than can be read in time" in b"".join(parts)

    asyncio.run(run())


def test_what_a_candidate_refuses_is_not_refused_by_the_version_that_serves(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, runner):
            request = decode_request(HEAD + b"abc", len(HEAD), Limits())
            candidate = service.slot.lease().version
            for _ in range(3):
                await service.infer(request, model="m", version=None)
            service.slot.load(Path("2"), "2")
            assert service.slot.current is not candidate
            errors: list[Any] = []
            for _ in range(30):
                service.submit(request, model="m", version="1", done=errors.append, like="like this")
                while not runner.snapshot().running_batches:  # with a worker free a refusal holds for nobody
                    await asyncio.sleep(0.0005)
            assert any(isinstance(error, RefusedRequestError) and error.holds for error in errors)
            assert service.turnstile.refused("like this", time.monotonic()) is None
            assert runner.snapshot().refused["late"] > 0

    asyncio.run(run())


def test_what_one_version_refused_is_asked_of_the_next(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, _):
            service.turnstile.shut("like this", time.monotonic() + 60, time.monotonic() + 60, "too slow")
            error = service.refusal(time.monotonic(), "like this", model="m", version=None)
            assert error is not None
            assert str(error) == "too slow"
            assert 59 < error.retry_after <= 60
            service.slot.load(Path("2"), "2")
            assert service.refusal(time.monotonic(), "like this", model="m", version=None) is None

    asyncio.run(run())


def test_a_job_that_is_dropped_or_whose_client_has_gone_opens_the_turnstile(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, runner):
            request = decode_request(HEAD + b"abc", len(HEAD), Limits())
            await service.infer(request, model="m", version=None)
            answers: list[Any] = []
            take_back = service.submit(request, model="m", version=None, done=answers.append)
            while not runner.snapshot().running_batches:
                await asyncio.sleep(0.0005)
            take_back()  # too late: it runs
            service.turnstile.shut("like this", time.monotonic() + 60, time.monotonic() + 60)
            while service.turnstile.refused("like this", time.monotonic()):
                await asyncio.sleep(0.0005)
            assert answers == []

    asyncio.run(asyncio.wait_for(run(), 30))


def test_answers_go_out_while_the_loop_refuses(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, _):
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            replies: list[int] = []
            scope = dict(SCOPE)
            face.learn(scope)
            face.begin(scope, HEAD + b"abc", time.monotonic(), lambda status, headers, parts: replies.append(status))
            end = time.monotonic() + 10
            while not replies and time.monotonic() < end:  # the loop never gets its turn
                face.refusal(scope, memoryview(HEAD), time.monotonic() - OBJECTIVE_S)
                time.sleep(0.001)
            assert replies == [200]
            face.begin(scope, HEAD + b"abc", time.monotonic(), lambda status, headers, parts: replies.append(status))
            while len(replies) < 2 and time.monotonic() < end:
                face.begin(scope, b"nonsense", time.monotonic(), lambda status, headers, parts: None)
                time.sleep(0.001)
            assert replies == [200, 200]

    asyncio.run(run())


# ---- clients that leave, versions that are not there


class Silent(Broken):
    """A service that does not answer."""

    def submit(self, request: Any, *, done: Any, **_: Any) -> Any:
        return lambda: None


def test_an_inference_whose_client_leaves_is_written_down_as_such() -> None:
    stream, service = io.BytesIO(), Silent(at_once=False)
    log = AccessLog(stream)

    async def leave() -> None:
        face = HttpFace(cast(Any, service), cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=log)
        face.begin(SCOPE, HEAD + b"abc", time.monotonic(), lambda *_: None)()

    asyncio.run(leave())
    log.close()
    assert dict(service.metrics.requests) == {("http", "cancelled"): 1}
    line = json.loads(stream.getvalue())
    assert (line["path"], line["status"], line["sent"]) == ("/v2/models/m/infer", 499, 0)


def test_an_image_without_json_that_no_version_can_compute_is_counted(shelf: Any) -> None:
    async def run() -> None:
        with slow_service(shelf) as (service, _):
            service.slot.unload()
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            replies: list[int] = []
            scope = SCOPE | {"headers": [(b"inference-header-content-length", b"0")]}
            face.begin(scope, b"abc", time.monotonic(), lambda status, headers, parts: replies.append(status))
            assert replies == [503]
            assert service.metrics.refused == {"no version": 1}

    asyncio.run(run())


@pytest.mark.usefixtures("uncollected")
def test_of_an_inference_that_is_over_nothing_stays_until_garbage_is_collected(shelf: Any) -> None:
    def inferences() -> list[Any]:
        return [found for found in gc.get_objects() if type(found) is http._Inference]

    async def run() -> None:
        with slow_service(shelf) as (service, _):
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            replies: list[int] = []
            for body in (HEAD + b"abc", b"nonsense", HEAD + b"abc"):
                count = len(replies) + 1
                face.begin(dict(SCOPE), body, time.monotonic(), lambda status, headers, parts: replies.append(status))
                while len(replies) < count:
                    await asyncio.sleep(0.001)
            face.begin(dict(SCOPE), HEAD + b"abc", time.monotonic(), lambda *_: None)()  # its client has gone
            assert replies == [200, 400, 200]
            while service.runner.snapshot().waiting_jobs:
                await asyncio.sleep(0.001)
            await asyncio.sleep(2 * ENGINE_S)
            assert not inferences()

    asyncio.run(run())


@pytest.mark.usefixtures("uncollected")
def test_a_refusal_holds_no_body(shelf: Any) -> None:
    """The turnstile's, of a head that is not known yet: it is raised, and an error holds the frames that it was raised through."""

    class Body(bytearray):
        """What can be looked for."""

    async def run() -> None:
        with slow_service(shelf) as (service, _):
            face = HttpFace(service, cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
            refused = RefusedRequestError("as others", holds=1.0)
            service.refusal = lambda *_, **__: refused  # type: ignore[method-assign]
            replies: list[int] = []
            body = Body(HEAD + b"abc")
            kept = weakref.ref(body)
            face.begin(dict(SCOPE), body, time.monotonic(), lambda status, headers, parts: replies.append(status))
            del body
            assert replies == [503]
            refused = RefusedRequestError("another one")
            assert kept() is None

    asyncio.run(run())


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("wrong", ["broken", "too large"])
def test_a_packed_body_that_is_refused_is_not_kept(wrong: str) -> None:
    """Nor what it was unpacked to: neither is counted any more."""

    class Body(bytearray):
        """What can be looked for."""

    async def run() -> None:
        most = Limits(body_bytes=1 << 20, elements=1 << 20)
        face = HttpFace(cast(Any, Asked()), cast(Any, None), cast(Any, None), limits=most, tokens=(), log=None)
        replies: list[int] = []
        body = Body(bytes(2 * http.SMALL_PACKED) if wrong == "broken" else gzip.compress(bytes(2 << 20), compresslevel=0))
        kept = weakref.ref(body)
        scope = SCOPE | {"headers": [(b"content-encoding", b"gzip")]}
        face.begin(scope, body, time.monotonic(), lambda status, *_: replies.append(status))
        del body
        while not replies:
            await asyncio.sleep(0.001)
        assert replies == [400 if wrong == "broken" else 413]
        face.close()  # its thread has let go of it then
        await asyncio.sleep(0)
        assert kept() is None

    asyncio.run(run())


@pytest.mark.parametrize("value", [b"gzip ", b" gzip"])
def test_blanks_around_a_header_are_none_of_its_own(value: bytes) -> None:
    head = http._read_head(SCOPE | {"headers": [(b"inference-header-content-length", b" 12\t"), (b"content-encoding", value)]})
    assert (head.length, head.encoded) == (12, True)
