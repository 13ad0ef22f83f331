"""A stream of inference requests, computed together as they arrive and answered in order."""

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
"""Maximum number of requests of one stream in work."""
ComputeAnswer = Callable[[], Awaitable[bytes]]
"""Computes the answer to one request. A ProtocolError is an answer, too."""


class InferenceStream:
    """Reads requests and writes their answers. `ledger`: counts unsent answers. `stopping`: set when the server shuts down."""

    def __init__(self, decode: Callable[[bytes], ComputeAnswer], context: Context, ledger: MemoryBudget, stopping: asyncio.Event) -> None:
        self._decode, self._context, self._ledger, self._stopping = decode, context, ledger, stopping
        self._room = asyncio.Semaphore(MAX_REQUESTS)
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._pending: set[asyncio.Task[bytes]] = set()
        """Requests in work: computed, or with an unsent answer."""
        self._unsent = 0
        """Bytes of unsent answers."""
        self._moved_at = time.monotonic()

    async def run(self) -> None:
        """Answer requests until the end of the stream. Cancelled, it cancels the requests in work.

        Raises ProtocolError: 408 if nothing arrives for `Bounds.idle_seconds` while nothing is in work, 503 when the server shuts down and
        the requests that have arrived are answered.
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
        await self._room.acquire()
        while (wire := await self._receive()) is not grpc.aio.EOF:
            task = asyncio.create_task(self._answer(self._decode(wire)))
            del wire  # not kept while waiting for the next
            self._pending.add(task)
            self._answers.put_nowait(task)
            del task
            await self._room.acquire()

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
        while (task := await self._answers.get()) is not None:
            answer = await task
            await self._context.write(answer)
            self._pending.discard(task)
            self._hold(-len(answer))
            del task, answer  # not kept while waiting for the next
            self._moved_at = time.monotonic()
            self._room.release()

    def _hold(self, size: int) -> None:
        self._unsent += size
        self._ledger.held += size
