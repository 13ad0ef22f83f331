"""One HTTP request and its answer: sending, the access log, and watching for a client that leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from muntin.serving.http.bodies import ClientLeftError, Message, Receive, Scope, Send
from muntin.serving.inference.service import Answered
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.telemetry.access_log import AccessLog

LEFT = 499
"""Status of a request whose client left before the answer, as in nginx."""
WHOLE_BYTES = 1 << 20
"""Maximum bytes passed to the server in one piece. A client that reads slowly holds one piece outside the memory budget."""
WATCH_AFTER_S = 0.05
"""Seconds after which a client is watched for leaving: watching costs more than most answers."""


class Exchange:
    """`began`: monotonic time at which this process began to handle the request. `lag`: seconds that it waited for that.

    `status`: 0 until the answer starts. `sent`: bytes of its body.
    """

    def __init__(self, scope: Scope, send: Send, budget: MemoryBudget, *, lag: float = 0.0) -> None:
        self.scope = scope
        self._send, self._budget = send, budget
        self._task = asyncio.current_task()
        self.began, self._lag = time.monotonic(), lag
        self.status, self.sent = 0, 0
        self.client_left = False
        self.request_id = ""
        self.answered: Answered | None = None

    def arrived(self, *, whole_at_once: bool) -> float:
        """Monotonic time at which the request was complete. Call it once the body was read. `whole_at_once`: it came in one piece."""
        return (self.began if whole_at_once else time.monotonic()) - self._lag

    async def send(self, message: Message) -> None:
        """Send an ASGI message. Raises ClientLeftError if a large answer is not read for `Bounds.body_seconds`."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            await self._send(message)
            return
        body = bytes(message.get("body", b""))
        self.sent += len(body)
        if len(body) <= WHOLE_BYTES:
            await self._send({"type": "http.response.body", "body": body, "more_body": message.get("more_body", False)})
        else:
            await self._send_pieces(memoryview(body))

    async def _send_pieces(self, body: memoryview) -> None:
        self._budget.held += len(body)
        try:
            for start in range(0, len(body), WHOLE_BYTES):
                end = start + WHOLE_BYTES
                async with asyncio.timeout(self._budget.bounds.body_seconds):
                    await self._send({"type": "http.response.body", "body": bytes(body[start:end]), "more_body": end < len(body)})
        except TimeoutError as error:
            self.client_left = True
            raise ClientLeftError from error
        finally:
            self._budget.held -= len(body)

    async def reply(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer."""
        await self.send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
        await self.send({"type": "http.response.body", "body": body})

    @contextmanager
    def watched(self, receive: Receive) -> Iterator[None]:
        """Cancel the block when the client closes its connection, from `WATCH_AFTER_S` on. The body must have been read."""
        watcher: asyncio.Task[None] | None = None

        def begin() -> None:
            nonlocal watcher
            watcher = asyncio.create_task(self._watch(receive))

        timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, begin)
        try:
            yield
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] == "http.request":
            pass
        if not self.status:
            self.client_left = True
            self.cancel()

    def cancel(self) -> None:
        """End the computation of the answer."""
        if self._task is not None:
            self._task.cancel()

    def write(self, log: AccessLog) -> None:
        """Write the line of the access log."""
        client = self.scope.get("client")
        log.write(
            face="http", client=client[0] if client else "", method=self.scope["method"], path=self.scope["path"], status=self.status,
            sent=self.sent, seconds=time.monotonic() - self.began, request_id=self.request_id, answered=self.answered,
        )  # fmt: skip
