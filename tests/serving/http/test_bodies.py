"""Bodies within bounds, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.serving.config import Bounds
from muntin.serving.http import bodies
from muntin.serving.http.bodies import RECYCLED_BYTES, Body, ClientLeftError
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError

Pieces = list[bytes]


def receiving(pieces: Pieces, *, ends: bool = True) -> Callable[[], Any]:
    """ASGI's `receive` of a body in pieces. `ends`: the last piece says that it is the last."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        if not left:
            return {"type": "http.disconnect"}
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left) or not ends}

    return receive


def body_of(budget: MemoryBudget, length: int | None) -> Body:
    header = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
    return Body({"headers": [header]}, budget)


def read(pieces: Pieces, length: int | None, *, ends: bool = True, **bounds: Any) -> bytes:
    budget = MemoryBudget(Bounds(**bounds))
    body = body_of(budget, length)
    try:
        asyncio.run(body.read(receiving(pieces, ends=ends)))
        assert body.complete
        assert budget.held == sum(map(len, pieces))
        return bytes(body.data)
    finally:
        body.release()
        body.release()
        assert budget.held == 0


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6), st.booleans(), st.booleans())
def test_body_in_any_pieces(pieces: Pieces, announced: bool, ends: bool) -> None:
    whole = b"".join(pieces)
    assert read(pieces, len(whole) if announced else None, ends=ends or not announced) == whole


def test_body_in_recycled_memory() -> None:
    pieces = [bytes([number]) * (RECYCLED_BYTES // 2) for number in range(3)]
    assert read(pieces, 3 * RECYCLED_BYTES // 2) == b"".join(pieces)


def test_empty_body_is_not_received() -> None:
    body = Body({"headers": []}, MemoryBudget(Bounds()))
    asyncio.run(body.read(receiving([b"never asked for"])))
    assert (body.complete, body.data) == (True, b"")


@pytest.mark.parametrize(("pieces", "length"), [([b""], 2000), ([b"x" * 600, b"x" * 600], None)])
def test_body_beyond_its_bound(pieces: Pieces, length: int | None) -> None:
    with pytest.raises(ProtocolError, match="at most 1,024") as caught:
        read(pieces, length, body_bytes=1024)
    assert caught.value.status == 413


def test_bodies_beyond_the_memory_budget() -> None:
    budget = MemoryBudget(Bounds(held_bytes=1024))
    first, second, empty = body_of(budget, 800), body_of(budget, 800), body_of(budget, 0)
    asyncio.run(first.read(receiving([b"x" * 800])))
    with pytest.raises(RefusedRequestError, match="800 bytes"):
        asyncio.run(second.read(receiving([b"x" * 800])))
    asyncio.run(empty.read(receiving([])))
    first.release()
    second.release()
    assert budget.held == 0


@pytest.mark.parametrize("length", [None, 10])
def test_client_that_leaves_within_its_body(length: int | None) -> None:
    with pytest.raises(ClientLeftError):
        read([b"x", b"y"], length, ends=False)


def test_body_that_takes_too_long() -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    body = body_of(MemoryBudget(Bounds(body_seconds=0.01)), 5)
    with pytest.raises(ProtocolError, match=r"within 0\.01 s") as caught:
        asyncio.run(body.read(receive))
    assert caught.value.status == 408


def test_drain_ends_by_bytes_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    async def endless() -> dict[str, Any]:
        await asyncio.sleep(0)
        received.append(1000)
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def silent() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    body = body_of(MemoryBudget(Bounds(body_bytes=1024)), None)
    asyncio.run(body.drain(endless))
    assert sum(received) == 3000
    monkeypatch.setattr(bodies, "DRAIN_S", 0.01)
    asyncio.run(body.drain(silent))
