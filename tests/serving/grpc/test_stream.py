"""One stream of requests, over a call that tests control. `test_calls` has streams of the service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import pytest

from muntin.serving.config import Bounds
from muntin.serving.grpc.stream import MAX_REQUESTS, ComputeAnswer, InferenceStream
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError


class Call:
    """A call whose client sends some messages, and reads answers while `reads` is set."""

    def __init__(self, *messages: bytes, ends: bool = True) -> None:
        self.messages, self.ends = list(messages), ends
        self.answers: list[bytes] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def read(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        if not self.ends:
            await asyncio.Event().wait()
        return grpc.aio.EOF

    async def write(self, answer: bytes) -> None:
        await self.reads.wait()
        self.answers.append(answer)


def echo(wire: bytes) -> ComputeAnswer:
    async def compute() -> bytes:
        await asyncio.sleep(0)
        return wire

    return compute


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def run(scene: Callable[[MemoryBudget, asyncio.Event], Awaitable[None]], *, idle_seconds: float = 20.0) -> None:
    async def play() -> None:
        ledger = MemoryBudget(Bounds(idle_seconds=idle_seconds))
        await scene(ledger, asyncio.Event())
        assert ledger.held == 0

    asyncio.run(play())


def test_requests_in_the_works_are_bounded() -> None:
    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        call = Call(*[b"x"] * (2 * MAX_REQUESTS))
        call.reads.clear()
        running = asyncio.create_task(InferenceStream(echo, call, ledger, stopping).run())
        await until(lambda: ledger.held == MAX_REQUESTS)
        await asyncio.sleep(0.01)
        assert len(call.messages) == MAX_REQUESTS
        call.reads.set()
        await running
        assert len(call.answers) == 2 * MAX_REQUESTS

    run(scene)


def test_idle_stream() -> None:
    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        call = Call(b"x", ends=False)
        with pytest.raises(ProtocolError, match=r"stood still for 0.05 s") as caught:
            await InferenceStream(echo, call, ledger, stopping).run()
        assert (caught.value.status, call.answers) == (408, [b"x"])

    run(scene, idle_seconds=0.05)


def test_unread_answer_is_no_idle_time() -> None:
    """It counts as held until the client reads it."""

    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        call = Call(bytes(100), ends=False)
        call.reads.clear()
        running = asyncio.create_task(InferenceStream(echo, call, ledger, stopping).run())
        await asyncio.sleep(0.2)
        assert (running.done(), ledger.held) == (False, 100)
        call.reads.set()
        with pytest.raises(ProtocolError):
            await running

    run(scene, idle_seconds=0.05)


def test_shutdown_answers_what_has_arrived() -> None:
    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        computing = asyncio.Event()

        def decode(wire: bytes) -> ComputeAnswer:
            async def compute() -> bytes:
                computing.set()
                await asyncio.sleep(0.02)
                return wire

            return compute

        call = Call(b"x", ends=False)
        running = asyncio.create_task(InferenceStream(decode, call, ledger, stopping).run())
        await computing.wait()
        stopping.set()
        with pytest.raises(RefusedRequestError, match="shutting down"):
            await running
        assert call.answers == [b"x"]

    run(scene)


def test_cancelled_stream_holds_nothing() -> None:
    """grpc cancels a call whose connection ends, and may do so again while the first time is handled."""

    class Slow(Call):
        async def write(self, answer: bytes) -> None:
            self.answers.append(answer)
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()

    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        call = Slow(bytes(100), ends=False)
        running = asyncio.create_task(InferenceStream(echo, call, ledger, stopping).run())
        await until(lambda: bool(call.answers))
        for _ in range(2):
            running.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait((running,), timeout=20)
        assert running.cancelled()

    run(scene)


@pytest.mark.usefixtures("uncollected")
def test_waiting_stream_keeps_no_messages() -> None:
    async def scene(ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        request, answer = [bytes(1000)], [bytes(2000)]

        def decode(wire: bytes) -> ComputeAnswer:
            async def compute() -> bytes:
                return answer[0]

            return compute

        call = Call(request[0], ends=False)
        running = asyncio.create_task(InferenceStream(decode, call, ledger, stopping).run())
        await until(lambda: bool(call.answers))
        call.answers.clear()
        await asyncio.sleep(0.01)
        alone = sys.getrefcount([object()][0]) + 1  # in the list here
        assert [sys.getrefcount(request[0]), sys.getrefcount(answer[0])] == [alone, alone]
        running.cancel()
        await asyncio.wait((running,))

    run(scene)
