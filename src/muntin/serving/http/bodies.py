"""Reads bodies of HTTP requests within limits: announced length, bytes received, bytes that all requests hold, seconds.

A body of known length is written into recycled memory: fresh memory costs a page fault for every 4 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import numpy as np

from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.protocol.tensors import Buffer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RECYCLED_BYTES = 1 << 17
"""Smallest body that is written into recycled memory."""
DRAIN_S = 2.0
"""Seconds for which the rest of a refused body is read and dropped: closing earlier resets the connection and loses the answer."""


class ClientLeftError(Exception):
    """The client closed its connection before the answer."""


class Body:
    """One request's body.

    `data` counts in the memory budget until `release`. `complete`: True once all of it is read; `at_once`: in one piece.
    """

    __slots__ = ("_budget", "_held", "_length", "at_once", "complete", "data")

    def __init__(self, scope: Scope, budget: MemoryBudget) -> None:
        self._budget = budget
        self._held = 0
        self._length = _announced_length(scope)
        self.data: Buffer = b""
        self.complete = self.at_once = self._length == 0

    async def read(self, receive: Receive) -> None:
        """Read the whole body into `data`.

        Raises ProtocolError: 413 for more than `Bounds.body_bytes`, announced or received, 408 for one that takes longer than
        `Bounds.body_seconds`, 503 if the memory budget is used up. Raises ClientLeftError if the client leaves before its end.
        """
        length, bounds = self._length, self._budget.bounds
        if length is not None and length > bounds.body_bytes:
            raise _too_large(length, bounds.body_bytes)
        if self.complete:
            return
        try:
            async with asyncio.timeout(bounds.body_seconds):
                await (self._read_chunks(receive) if length is None else self._read_length(receive, length))
        except TimeoutError as error:
            raise ProtocolError(f"the body did not arrive within {bounds.body_seconds:g} s", status=408) from error
        self.complete = True

    async def _read_length(self, receive: Receive, length: int) -> None:
        chunk, _ = await self._next(receive)
        if len(chunk) == length:
            self.data, self.at_once = chunk, True
            return
        recycled = length >= RECYCLED_BYTES
        data = self._budget.buffers.take((length,), np.uint8).data if recycled else memoryview(bytearray(length))
        at = 0
        while True:
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
            if at == length:
                self.data = data
                return
            chunk, more = await self._next(receive)
            if not more and not chunk:
                raise ClientLeftError

    async def _read_chunks(self, receive: Receive) -> None:
        chunks: list[bytes] = []
        more = True
        while more:
            chunk, more = await self._next(receive)
            chunks.append(chunk)
            if self._held > self._budget.bounds.body_bytes:
                raise _too_large(self._held, self._budget.bounds.body_bytes)
        self.data = b"".join(chunks)

    async def _next(self, receive: Receive) -> tuple[bytes, bool]:
        """Return (next piece of the body, True if more may follow)."""
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeftError
        chunk: bytes = message.get("body", b"")
        if not self._budget.has_room(len(chunk)):
            raise RefusedRequestError(f"all requests together hold {self._budget.held:,} bytes, the most that this server takes: try again")
        self._held += len(chunk)
        self._budget.held += len(chunk)
        return chunk, message.get("more_body", False)

    async def drain(self, receive: Receive) -> None:
        """Read and drop the rest of a refused body, for at most `DRAIN_S` and twice `Bounds.body_bytes`."""
        left = 2 * self._budget.bounds.body_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
                    left -= len(message.get("body", b""))

    def release(self) -> None:
        """Take the body out of the memory budget. Idempotent."""
        self._budget.held -= self._held
        self._held = 0
        self.data = b""


def _announced_length(scope: Scope) -> int | None:
    """Return the bytes of the body, None for a chunked one. The HTTP parser has checked both headers."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0


def _too_large(size: int, most: int) -> ProtocolError:
    return ProtocolError(f"a body of {size:,} bytes or more: this server takes at most {most:,} (--max-body)", status=413)
