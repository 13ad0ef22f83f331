"""An HTTP connection that nobody can make the server wait on, or fill its memory through.

uvicorn parses (httptools, the parser of Node.js) and speaks ASGI; what it leaves open is bounded here: how long headers, a body and the
reading of an answer may take, how large headers and a body may be, how many bytes all bodies may hold together, and how many connections
there are. A body is handed to the application in one piece once it is whole: an image of a megabyte would wake it a dozen times otherwise.
Where its length was announced it lies in memory that bodies before it lay in: fresh memory costs a page fault for every 4 KiB.

A client that goes away while its answer is computed cancels the task that waits for it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import numpy as np
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from muntin.runtime.buffers import Buffers
from muntin.serving.config import Bounds

_DIGITS = 15
"""Of a body's length, at most: more than any bound."""


class Ledger:
    """What the connections of one server hold together."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.buffers = Buffers()
        self.held = 0
        """Bytes of bodies that are being received or answered."""
        self.refused: dict[int, int] = {}
        """Requests that no application saw, by status."""


class BoundedConnection(HttpToolsProtocol):
    """One connection. `ledger` is shared by all of a server."""

    def __init__(self, *, ledger: Ledger, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self._ledger, self._bounds = ledger, ledger.bounds
        self._timer: asyncio.TimerHandle | None = None
        self._head: int | None = None
        """Bytes of the headers that are arriving; None where none are."""
        self._body = 0
        """Bytes of the body that is arriving, as far as they have come."""
        self._held: dict[Any, int] = {}
        """By cycle (a request and its answer; several where a client does not wait for answers): what the ledger holds for it."""
        self._running: tuple[Any, asyncio.Task[None]] | None = None
        """The cycle that is being answered."""

    # ---- the transport's events ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._bounds.connections:
            self._refuse(503, f"{self._bounds.connections} connections are open already")
        else:
            self._expect(self._bounds.header_seconds)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._head is not None and not self.transport.is_closing():  # still incomplete
            self._head += len(data)
            if self._head > self._bounds.header_bytes:
                self._refuse_head()
            elif self._timer is None:
                self._expect(self._bounds.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._abandon()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect(self._bounds.body_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "no valid HTTP request")

    # ---- the parser's events ----

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._body = 0, 0

    def on_headers_complete(self) -> None:
        self._head = None
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self._bounds.header_bytes:
            self._refuse_head()
            return
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if len(length) > _DIGITS or int(length) > self._bounds.body_bytes:
            self._refuse(413, f"a body of {length[:_DIGITS].decode()} bytes: at most {self._bounds.body_bytes:,} are taken")
        elif not self._may_hold(int(length)):
            self._refuse(503, "the bodies of other requests fill what this server holds: try again")
        else:
            self._expect(self._bounds.body_seconds)
            super().on_headers_complete()
            self._hold(int(length))
            if int(length):
                cycle: Any = self.cycle
                cycle.whole = self._ledger.buffers.take((int(length),), np.uint8).data
                cycle.receive = partial(_receive, cycle)  # in place of uvicorn's, which copies what came into a new object

    def on_body(self, body: bytes) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        whole = getattr(self.cycle, "whole", None)
        if whole is not None:  # no more than was announced can come: the parser sees to that
            whole[self._body : self._body + len(body)] = body
            self._body += len(body)
            return
        self._body += len(body)
        more = self._body - self._held.get(self.cycle, 0)
        if more > 0:  # in chunks: no length was given
            if self._body > self._bounds.body_bytes:
                self._refuse(413, f"a body of more than {self._bounds.body_bytes:,} bytes")
                return
            if not self._may_hold(more):
                self._refuse(503, "the bodies of other requests fill what this server holds: try again")
                return
            self._hold(more)
        self.cycle.body += body

    def on_message_complete(self) -> None:
        if not self.transport.is_closing():
            self._stop_timer()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._running is not None:
            self._release(self._running[0])
            self._running = None
        super().on_response_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        task = self.loop.create_task(cycle.run_asgi(app))
        self._running = cycle, task
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    # ---- bounds ----

    def _expect(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.flow.write_paused:
            self._abandon()
            self.transport.abort()  # it does not read its answer, and nothing more can be said to it
        elif self._head is None and not self._held:
            self.transport.close()  # it never said a word
        else:
            self._refuse(408, "the request did not arrive in time")

    def _may_hold(self, count: int) -> bool:
        return self._ledger.held + count <= self._bounds.held_bytes

    def _hold(self, count: int) -> None:
        self._held[self.cycle] = self._held.get(self.cycle, 0) + count
        self._ledger.held += count

    def _release(self, cycle: Any) -> None:
        self._ledger.held -= self._held.pop(cycle, 0)

    def _abandon(self) -> None:
        """Nobody reads the answers of this connection any more: what computes them is told, and what they held is free."""
        for cycle in list(self._held):
            self._release(cycle)
        if self._running is not None and not self._running[0].response_complete:
            self._running[0].disconnected = True
            self._running[1].cancel()

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's line and headers are longer than {self._bounds.header_bytes:,} bytes")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer on the connection itself, without the application, and close it."""
        self._stop_timer()
        answering = self._running is not None and self._running[0].response_started
        self._abandon()
        self._ledger.refused[status] = self._ledger.refused.get(status, 0) + 1
        if not answering:  # in the middle of another answer there is no place for this one
            body = b'{"error":"' + reason.encode("ascii", "replace") + b'"}'
            retry = b"retry-after: 1\r\n" if status == 503 else b""
            head = b"content-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n" % (len(body), retry)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


async def _receive(cycle: Any) -> dict[str, Any]:
    """ASGI's `receive` for a request whose body has a place of its own: the body when it is whole, and then what comes after it."""
    if cycle.waiting_for_100_continue and not cycle.transport.is_closing():
        cycle.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        cycle.waiting_for_100_continue = False
    if not cycle.disconnected and not cycle.response_complete:
        cycle.flow.resume_reading()
        await cycle.message_event.wait()
        cycle.message_event.clear()
    if cycle.disconnected or cycle.response_complete:
        return {"type": "http.disconnect"}
    body, cycle.whole = cycle.whole, memoryview(b"")
    return {"type": "http.request", "body": body, "more_body": False}
