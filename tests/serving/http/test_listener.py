"""granian under the application, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from muntin.errors import DataError
from muntin.serving.http.listener import SPARE, HttpListener


class Served:
    """An application on a port, on a loop of its own."""

    def __init__(self, app: Any, **options: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        options = {"connections": 8, "idle_seconds": 5.0, "tls": None} | options
        self.listener = self.call(self._made(app, options))
        self.call(self.listener.start())

    async def _made(self, app: Any, options: dict[str, Any]) -> HttpListener:
        return HttpListener(app, ["127.0.0.1"], self.port, **options)

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def stop(self, app: Any, seconds: float = 5.0) -> int:
        deadline = time.monotonic() + seconds
        count: int = self.call(self.listener.stop(lambda: app.in_flight, app.cut, lambda: max(0.0, deadline - time.monotonic())))
        return count

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[Served]:
    served = Served(app, **options)
    try:
        yield served
        served.stop(app, 0.0)
    finally:
        served.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Served, bytes], socket.socket]]:
    """`connect(served, data)`: a connection that has sent the data."""
    opened: list[socket.socket] = []

    def make(served: Served, data: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
        opened.append(client)
        client.sendall(data)
        return client

    yield make
    for client in opened:
        client.close()


def everything(client: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    received = b""
    while piece := client.recv(1 << 16):
        received += piece
    return received


GET = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n%s\r\n"
LAST = GET % b"Connection: close\r\n"


def infer(body: bytes, more: bytes = b"") -> bytes:
    return b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n" % (more, len(body)) + body


def test_requests_on_one_connection_in_order(harness: Any, connect: Any, infer_body: bytes) -> None:
    made = harness()
    with listening(made.app) as served:
        answer = everything(connect(served, GET % b"" + infer(infer_body) + LAST))
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert made.service.requests == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 600_000 + b"\r\n\r\n", b"431"),
        (b"POST /v2 HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"499"),
    ],
)
def test_request_that_is_no_http(harness: Any, connect: Any, request_bytes: bytes, status: bytes) -> None:
    made = harness()
    with listening(made.app) as served:
        answer = everything(connect(served, request_bytes))
        if status == b"499":  # the application was reading its body
            assert made.log.entries[0]["status"] == 499
        else:
            assert answer.startswith(b"HTTP/1.1 " + status)
        assert everything(connect(served, LAST)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"GET /v2 HTTP/1.1\r\nHost", GET % b""])
def test_connection_without_complete_headers_is_closed(harness: Any, connect: Any, sent: bytes) -> None:
    with listening(harness().app, idle_seconds=0.5) as served:
        everything(connect(served, sent))


def test_refusal_is_read_while_the_body_is_sent(harness: Any, connect: Any) -> None:
    made = harness(body_bytes=1 << 20)
    with listening(made.app) as served:
        client = connect(served, b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n")
        for _ in range(20):
            client.sendall(bytes(100_000))
        assert b"413 Payload Too Large" in everything(client)


def test_client_that_asks_before_it_sends(harness: Any, connect: Any, infer_body: bytes) -> None:
    with listening(harness(body_bytes=1024).app) as served:
        client = connect(served, infer(infer_body, b"Expect: 100-continue\r\nConnection: close\r\n")[: -len(infer_body)])
        assert client.recv(100).startswith(b"HTTP/1.1 100 Continue")
        client.sendall(infer_body)
        assert everything(client).startswith(b"HTTP/1.1 200")
        refused = connect(served, b"POST /v2 HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9999\r\n\r\n")
        assert everything(refused).startswith(b"HTTP/1.1 413")


def test_connections_beyond_the_bound_wait(harness: Any, connect: Any) -> None:
    with listening(harness().app, connections=1, idle_seconds=1) as served:
        for _ in range(1 + SPARE):
            connect(served, b"")
        assert everything(connect(served, LAST)).startswith(b"HTTP/1.1 200")  # once the others were closed for doing nothing


def test_client_that_leaves_is_not_computed_for(harness: Any, connect: Any, infer_body: bytes, wait_until: Any) -> None:
    made = harness()
    made.service.seconds = 30
    with listening(made.app) as served:
        client = connect(served, infer(infer_body))
        wait_until(lambda: made.service.requests)
        client.close()
        wait_until(lambda: made.service.cancelled)


@pytest.mark.parametrize(("seconds", "cut"), [(20.0, 0), (0.0, 1)])
def test_stop_waits_for_requests_in_flight(
    harness: Any, connect: Any, infer_body: bytes, wait_until: Any, seconds: float, cut: int
) -> None:
    made = harness()
    made.service.seconds = 60 if cut else 0.5
    served = Served(made.app)
    client = connect(served, infer(infer_body))
    wait_until(lambda: made.service.requests)
    assert served.stop(made.app, seconds) == cut
    assert everything(client).startswith(b"HTTP/1.1 503" if cut else b"HTTP/1.1 200")
    with pytest.raises(ConnectionRefusedError):
        connect(served, b"")
    served.close()


def test_address_that_cannot_be_had(harness: Any) -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            listener = HttpListener(harness().app, ["127.0.0.1"], port, connections=1, idle_seconds=1, tls=None)
            with pytest.raises(DataError, match=rf"127\.0\.0\.1:{port}.*--http-port"):
                await listener.start()

    asyncio.run(run())
