"""One stream of inference requests: they are computed as they arrive, together, and answered in their order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from muntin.serving.grpc.calls import Context
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError

MAX_REQUESTS = 32
"""Requests of one stream that are computed, or whose answers are not sent yet."""
ComputeAnswer = Callable[[], Awaitable[bytes]]
"""Computes the answer to one request. An error that is foreseen is an answer, too."""


class InferenceStream:
    """Reads requests from a call and writes their answers.

    `decode`: decodes a message. `ledger`: counts answers as held until they are sent. `stopping`: set when the server shuts down.
    """

    def __init__(self, decode: Callable[[bytes], ComputeAnswer], context: Context, ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        self._decode, self._context, self._ledger, self._stopping = decode, context, ledger, stopping
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._pending: set[asyncio.Task[bytes]] = set()
        """Requests that are computed, or whose answers are not sent yet."""
        self._unsent = 0
        """Bytes of computed answers that are not sent yet."""
        self._moved_at = time.monotonic()

    async def run(self) -> None:
        """Answer requests until the client has sent all of them and has its answers. Cancelled, it takes requests back.

        Raises ProtocolError: 408 where nothing arrives for `Bounds.idle_seconds` while nothing is pending, 503 when the server shuts down
        and what has arrived is answered.
        """
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((reading, writing, stopping), return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()
            self._answers.put_nowait(None)
            await writing
            if stopping.done():
                raise RefusedRequestError("the server is shutting down: go on in a stream to another one")
            await reading
        finally:
            self._hold(-self._unsent)
            tasks = [reading, writing, stopping, *self._pending]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            await self._room.acquire()
            if not await self._read_one():
                return

    async def _read_one(self) -> bool:
        """Begin one request; False at the end of the stream. Returns before the next read: no local variable keeps the message."""
        wire = await self._receive()
        if wire is grpc.aio.EOF:
            return False
        task = asyncio.create_task(self._answer(self._decode(wire)))
        self._pending.add(task)
        self._answers.put_nowait(task)
        return True

    async def _receive(self) -> Any:
        idle = self._ledger.bounds.idle_seconds
        reading = asyncio.ensure_future(self._context.read())
        try:
            while not reading.done():
                left = idle if self._pending else self._moved_at + idle - time.monotonic()
                if left <= 0:
                    raise ProtocolError(f"the stream stood still for {idle:g} s", status=408)
                await asyncio.wait((reading,), timeout=left)
            return reading.result()
        finally:
            reading.cancel()

    async def _answer(self, compute: ComputeAnswer) -> bytes:
        answer = await compute()
        self._hold(len(answer))
        return answer

    async def _write(self) -> None:
        while await self._write_one():
            self._moved_at = time.monotonic()
            self._room.release()

    async def _write_one(self) -> bool:
        """Send the next answer; False where there is none any more. Returns before the next wait: no local variable keeps the answer."""
        task = await self._answers.get()
        if task is None:
            return False
        answer = await task
        await self._context.write(answer)
        self._pending.discard(task)
        self._hold(-len(answer))
        return True

    def _hold(self, size: int) -> None:
        self._unsent += size
        self._ledger.held += size
