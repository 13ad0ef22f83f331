"""The application as ASGI sees it: what it refuses, what it counts, what it writes down, what it lets go of."""

from __future__ import annotations

import asyncio
import gzip
import weakref
from typing import Any

import pytest

from muntin.serving.http.exchange import WHOLE_BYTES
from muntin.serving.http.inference import INLINE
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError

INFER = "/v2/models/m/infer"


def test_inference(harness: Any, infer_body: bytes) -> None:
    made = harness()
    status, headers, body = asyncio.run(made.ask(INFER, infer_body))
    assert (status, headers["content-type"], int(headers["content-length"])) == (200, "application/json", len(body))
    assert dict(made.service.metrics.requests) == {("http", "answered"): 1}
    (entry,) = made.log.entries
    assert (entry["status"], entry["sent"], entry["client"], entry["answered"] is not None) == (200, len(body), "1.2.3.4", True)
    assert (made.budget.held, made.app.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (ProtocolError("no such model", status=404), 404, "wrong"),
        (RefusedRequestError("too many", retry_after=3.2), 503, "refused"),
        (ZeroDivisionError("a secret"), 500, "failed"),
    ],
)
def test_error_of_the_service(harness: Any, infer_body: bytes, error: Exception, status: int, outcome: str) -> None:
    made, reported = harness(), []
    made.service.error = error

    async def run() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        return await made.ask(INFER, infer_body)

    answered, headers, body = asyncio.run(run())
    assert (answered, headers.get("retry-after")) == (status, "4" if status == 503 else None)
    assert b"secret" not in body
    assert reported == ([error] if status == 500 else [])
    assert dict(made.service.metrics.requests) == {("http", outcome): 1}


def test_refusal_before_the_body_is_read(harness: Any) -> None:
    made = harness(body_bytes=1024)
    status, headers, _ = asyncio.run(made.ask(INFER, bytes(1000), bytes(1000), headers=[(b"content-length", b"2000")]))
    assert (status, headers["connection"]) == (413, "close")
    assert dict(made.budget.refused) == {413: 1}
    assert made.log.entries[0]["status"] == 413
    assert made.service.requests == 0


def test_requests_beyond_the_bound(harness: Any, infer_body: bytes) -> None:
    made = harness(connections=1)
    made.service.seconds = 0.2

    async def run() -> list[int]:
        first = asyncio.create_task(made.ask(INFER, infer_body))
        await asyncio.sleep(0.01)
        others = [await made.ask(INFER, infer_body), await made.ask("/v2/health/ready", method="GET")]
        return [answer[0] for answer in (await first, *others)]

    assert asyncio.run(run()) == [200, 503, 200]


def test_client_that_leaves(harness: Any, infer_body: bytes) -> None:
    made = harness()
    made.service.seconds = 60
    assert asyncio.run(made.ask(INFER, infer_body, stays=False))[0] == 0
    assert made.service.cancelled == 1
    assert dict(made.service.metrics.requests) == {("http", "cancelled"): 1}
    assert made.log.entries[0]["status"] == 499


def test_cut(harness: Any, infer_body: bytes) -> None:
    made = harness()
    made.service.seconds = 60

    async def run() -> Any:
        task = asyncio.create_task(made.ask(INFER, infer_body))
        await asyncio.sleep(0.01)
        assert made.app.cut() == 1
        return await task

    status, _, body = asyncio.run(run())
    assert (status, b"shutting down" in body) == (503, True)


@pytest.mark.parametrize("size", [100, INLINE + 1])
def test_packed_bodies_one_at_a_time(harness: Any, infer_body: bytes, size: int) -> None:
    made = harness()
    packed = gzip.compress(infer_body + b" " * size, compresslevel=0)

    async def run() -> list[Any]:
        return await asyncio.gather(*(made.ask(INFER, packed, headers=[(b"content-encoding", b"gzip")]) for _ in range(20)))

    assert {answer[0] for answer in asyncio.run(run())} == {200}
    made.app.close()


def test_packed_body_that_waits_too_long(harness: Any, infer_body: bytes) -> None:
    made = harness()
    made.service.objective = 1e-9
    packed = gzip.compress(infer_body + b" " * INLINE, compresslevel=0)
    status, _, body = asyncio.run(made.ask(INFER, packed, headers=[(b"content-encoding", b"gzip")]))
    assert (status, b"in time" in body) == (503, True)
    made.app.close()


def test_large_answer_goes_in_pieces(harness: Any) -> None:
    from muntin.serving.http.exchange import Exchange

    made, sizes = harness(), []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sizes.append((len(message["body"]), message["more_body"], made.budget.held))

    async def run() -> None:
        exchange = Exchange({}, send, made.budget)
        await exchange.reply(200, [], bytes(2 * WHOLE_BYTES + 5))

    asyncio.run(run())
    held = 2 * WHOLE_BYTES + 5
    assert sizes == [(WHOLE_BYTES, True, held), (WHOLE_BYTES, True, held), (5, False, held)]
    assert made.budget.held == 0


@pytest.mark.usefixtures("uncollected")
def test_memory_of_a_refused_body(harness: Any) -> None:
    class Bytes(bytearray):
        pass

    made = harness()
    body = Bytes(b"{}")
    gone = weakref.ref(body)
    assert asyncio.run(made.ask(INFER, body))[0] == 400
    del body
    assert gone() is None
