"""Connections: sizes that lie, clients that are slow or gone, and what is held meanwhile. Raw sockets against a real server."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from muntin.errors import DependencyError
from muntin.serving.config import Bounds, ServeConfig
from muntin.serving.connection import SPARE, Answer, Receiver, Reply, check_uvicorn
from muntin.serving.ledger import Ledger, Pulse, Waits
from muntin.serving.server import Server, _loop_factory

BOUNDS = Bounds(
    body_bytes=100_000, header_bytes=2048, held_bytes=250_000, connections=8, header_seconds=0.8, body_seconds=0.8, idle_seconds=30
)


LARGE, MEDIUM = 64 << 20, b"x" * 20_000
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


class Echo:
    """Answers a body's length and its first bytes; /slow when it is told to, /large with many megabytes. By ASGI, or without it."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.begun: list[str] = []
        self.cancelled = 0
        self.refusals: list[tuple[str, str, str, int]] = []
        self.full = b"nothing"
        """What a body begins with that is refused at once."""

    def learn(self, scope: Any) -> None:
        scope["learned"] = True

    def refusal(self, scope: Any, body: memoryview, came: float) -> Answer | None:
        assert 0 <= time.monotonic() - came < 1
        assert scope["learned"]
        return (503, [(b"retry-after", b"1")], [b"fu", b"ll"]) if bytes(body).startswith(self.full) else None

    def essential(self, target: bytes) -> bool:
        return target == b"/health"

    def takes(self, scope: Any) -> bool:
        return True

    def refused(self, client: str, method: str, path: str, status: int, sent: int) -> None:
        self.refusals.append((client, method, path, status))

    def barred(self, scope: Any) -> Answer | None:
        return (401, [(b"www-authenticate", b"Bearer")], [b"who ", b"are you"]) if scope["path"] == "/barred" else None

    def begin(self, scope: Any, body: Any, came: float, reply: Reply) -> Callable[[], object]:
        assert 0 <= time.monotonic() - came < 1
        self.begun.append(scope["path"])
        if scope["path"] == "/large":
            reply(200, [], [b"x" * (LARGE // 2), b"x" * (LARGE // 2)])
            return lambda: None
        if scope["path"] == "/medium":
            reply(200, [], [MEDIUM])
            return lambda: None
        if scope["path"] == "/row":
            reply(200, [], [b"row: ", np.zeros((2, 100_000), np.uint8)[1:].reshape(-1).data])
            return lambda: None
        if scope["path"] != "/slow":
            reply(200, [], [answer(body)])
            return lambda: None
        task = asyncio.get_running_loop().create_task(self._reply_slowly(body, reply))
        return task.cancel

    async def _reply_slowly(self, body: Any, reply: Reply) -> None:
        try:
            while not self.release.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
        else:
            reply(200, [], [answer(body)])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["path"] == "/early":
                self.begun.append(scope["path"])
                await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body", "body": b""})
                return
            message = await receive()
            assert not message.get("more_body")
            self.begun.append(scope["path"])
            while scope["path"] == "/slow" and not self.release.is_set():
                await asyncio.sleep(0.005)
            body = {"/large": b"x" * LARGE, "/medium": MEDIUM}.get(scope["path"]) or answer(message["body"])
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
            await send({"type": "http.response.body", "body": body})
        except asyncio.CancelledError:
            self.cancelled += 1


def answer(body: Any) -> bytes:
    return json.dumps([len(body), bytes(body[:9]).decode(errors="replace")]).encode()


@dataclass(frozen=True, kw_only=True)
class Served:
    port: int
    app: Echo
    ledger: Ledger
    server: uvicorn.Server
    direct: bool

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, *pieces: bytes) -> bytes:
        """What comes back until the server closes, or the answer is whole."""
        with closing(self.connect()) as client:
            for piece in pieces:
                client.sendall(piece)
            return read(client)


def read(client: socket.socket) -> bytes:
    found = b""
    while True:
        try:
            piece = client.recv(65536)
        except ConnectionResetError:
            return found
        if not piece:
            return found
        found += piece
        last = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, gap, body = last.partition(b"\r\n\r\n")
        if gap and b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n":
            return found


@pytest.fixture(params=["asgi", "direct"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    app, ledger = Echo(), Ledger(BOUNDS)
    http: Any = partial(Receiver, ledger=ledger, direct=app if request.param == "direct" else None)
    config = uvicorn.Config(
        app, http=http, ws="none", lifespan="off", log_config=None, access_log=False, interface="asgi3", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield Served(port=port, app=app, ledger=ledger, server=server, direct=request.param == "direct")
        app.release.set()
        server.should_exit = True
        thread.join()


def post(body: bytes, path: str = "/", *, length: int | None = None, more: bytes = b"") -> bytes:
    size = len(body) if length is None else length
    return b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n" % (path.encode(), size, more) + body


def test_another_uvicorn_is_told_before_it_answers_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    check_uvicorn()
    monkeypatch.delattr(HttpToolsProtocol, "_start_asgi_task")
    with pytest.raises(DependencyError, match=rf"uvicorn {uvicorn.__version__} has no _start_asgi_task.*\[serve\]"):
        Server("nowhere", ServeConfig())


def test_a_body_arrives_in_one_piece_however_it_was_sent(served: Served) -> None:
    whole = post(b"muntin " * 10_000)
    assert read_json(served.ask(whole)) == [70_000, "muntin mu"]
    assert read_json(served.ask(*(whole[n : n + 7919] for n in range(0, len(whole), 7919)))) == [70_000, "muntin mu"]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"mun", b"tin" * 5000, b"!")) + b"0\r\n\r\n"
    for coding in (b"chunked", b"Chunked "):
        chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: %s\r\n\r\n" % coding + chunks
        assert read_json(served.ask(chunked)) == [15_004, "muntintin"]
    wait(lambda: served.ledger.held == 0)


def test_several_requests_on_one_connection_are_answered_in_order(served: Served) -> None:
    with closing(served.connect()) as client:
        for number in range(3):
            client.sendall(post(b"%d" % number))
            assert read_json(read(client)) == [1, str(number)]
        client.sendall(post(b"a") + post(b"b") + post(b"c" * 5))  # without waiting for answers
        found = b""
        while found.count(b"HTTP/1.1 200") < 3 or not found.endswith(b"]"):
            found += client.recv(65536)
    assert [found.index(text) for text in (b'[1, "a"]', b'[1, "b"]', b'[5, "ccccc"]')] == sorted(
        found.index(text) for text in (b'[1, "a"]', b'[1, "b"]', b'[5, "ccccc"]')
    )
    wait(lambda: served.ledger.held == 0)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b"", length=100_001), 413),
        (post(b"", length=10**14), 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffffffffffffffffff\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            + (b"c350\r\n" + b"x" * 50_000 + b"\r\n" + b"c351\r\n" + b"x" * 50_001),
            413,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + OFFER + b"\r\n", 400),
        (post(b"hello", more=b"host: a\r\n"), 400),
        (b"POST / HTTP/1.0\r\nHost: a\r\nHost: b\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 300_000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n", 408),
        (post(b"too little", length=50), 408),
    ],
)
def test_what_is_wrong_or_never_ends_is_refused(served: Served, request_: bytes, status: int) -> None:
    answer = served.ask(request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}
    wait(lambda: served.ledger.held == 0)
    assert served.app.begun == []
    assert read_json(served.ask(post(b"fine"))) == [4, "fine"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b"", length=100_001), 413),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 431),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"NONSENSE\r\n\r\n", 400),
        (post(b"x" * 99_000, "/other"), 503),
    ],
)
def test_who_is_refused_on_a_connection_that_was_answered_before_is_told(served: Served, request_: bytes, status: int) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"first"))
        assert read_json(read(client)) == [5, "first"]
        if status == 503:
            served.ledger.held += BOUNDS.held_bytes
        client.sendall(request_)
        answered = read(client)
    assert answered.startswith(b"HTTP/1.1 %d " % status), answered
    assert served.app.begun == ["/"]


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (b"NONSENSE\r\n\r\n", ("", "", 400)),
        (b"", ("", "", 0)),
        (post(b"", "/large?a=b", length=100_001), ("POST", "/large", 413)),
        (b"GET /a%20b HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", ("GET", "/a%20b", 431)),
        (b"PUT /slow HTTP/1.1\r\n", ("PUT", "/slow", 408)),
        (post(b"too little", "/a%20b", length=50), ("POST", "/a b", 408)),
    ],
)
def test_what_the_connection_refuses_is_told(served: Served, request_: bytes, asked: tuple[str, str, int]) -> None:
    if not served.direct:
        pytest.skip("nobody is told")
    served.ask(request_)
    assert served.app.refusals == ([("127.0.0.1", *asked)] if asked[2] else [])


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://host:8000/a%20b?c=http://d", "/a b"),
        (b"http://host:8000", "/"),
        (b"HTTP://host/", "/"),
        (b"http://host?c=d", "/"),
        (b"/a://b", "/a://b"),
    ],
)
def test_a_target_may_name_its_host(served: Served, target: bytes, path: str) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nfine" % target
    with closing(served.connect()) as client:
        for _ in range(3):  # also where the same head has come before
            client.sendall(head)
            assert read_json(read(client)) == [4, "fine"]
    assert served.app.begun == [path] * 3


@pytest.mark.parametrize("times", [0, 3])
@pytest.mark.parametrize("reset", [False, True])
def test_who_leaves_before_the_request_has_come_is_told(served: Served, times: int, reset: bool) -> None:
    if not served.direct:
        pytest.skip("nobody is told")
    with closing(served.connect()) as client:
        for _ in range(times):  # a head that is known comes another way
            client.sendall(post(b"x" * 50, "/a%20b"))
            read(client)
        client.sendall(post(b"too little", "/a%20b", length=50))
        time.sleep(0.1)
        assert served.app.refusals == []
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait(lambda: served.app.refusals == [("127.0.0.1", "POST", "/a b", 499)])
    with closing(served.connect()) as client:
        client.sendall(post(b"x" * 50, "/a%20b"))
        read(client)
    time.sleep(0.1)
    assert len(served.app.refusals) == 1


def test_only_the_older_protocol_knows_no_host(served: Served) -> None:
    assert read_json(served.ask(b"POST / HTTP/1.0\r\nContent-Length: 4\r\n\r\nfine")) == [4, "fine"]


def test_a_header_that_trickles_in_is_cut_off(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"first"))
        assert read_json(read(client)) == [5, "first"]
        began = time.monotonic()
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(b"GET / HTTP/1.1\r\n"[:1] if time.monotonic() == began else b"G")
                time.sleep(0.05)
    assert read_json(served.ask(post(b"fine"))) == [4, "fine"]


def test_who_connects_and_says_nothing_is_let_go(served: Served) -> None:
    with closing(served.connect()) as client:
        assert client.recv(100) == b""


def test_bodies_together_are_bounded(served: Served) -> None:
    with closing(served.connect()) as one, closing(served.connect()) as two:
        for client in (one, two):
            client.sendall(post(b"x" * 99_000, "/slow"))
        wait(lambda: len(served.app.begun) == 2)
        assert served.ledger.held == 198_000
        answer = served.ask(post(b"x" * 99_000))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        served.app.release.set()
        assert read_json(read(one))[0] == read_json(read(two))[0] == 99_000
    wait(lambda: served.ledger.held == 0)
    assert served.ledger.refused == {503: 1}


def test_what_is_only_announced_shuts_nobody_out(served: Served) -> None:
    clients = [served.connect() for _ in range(BOUNDS.connections - 1)]
    for client in clients:
        client.sendall(post(b"x", length=BOUNDS.body_bytes))
    wait(lambda: served.ledger.held == len(clients))
    assert read_json(served.ask(post(b"y" * 99_000)))[0] == 99_000
    for client in clients:
        assert b" 408 " in read(client)
        client.close()
    wait(lambda: served.ledger.held == 0)


def test_a_refusal_is_read_by_who_is_still_sending(served: Served) -> None:
    whole = post(b"x" * (BOUNDS.body_bytes + 50_000))
    for pieces in ([whole], [whole[n : n + 5000] for n in range(0, len(whole), 5000)]):
        answer = served.ask(*pieces)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b'bytes: at most 100,000 are taken"}')
    wait(lambda: not served.server.server_state.connections)


def test_a_request_that_is_barred_by_its_headers_is_answered_without_its_body(served: Served) -> None:
    if not served.direct:
        pytest.skip("an application hears of a request with its body")
    answer = served.ask(post(b"x", "/barred", length=90_000))
    assert answer.startswith(b"HTTP/1.1 401 ") and answer.endswith(b"who are you")
    assert b"connection: close" in answer
    assert not served.app.begun and not served.ledger.held and not served.ledger.known
    with closing(served.connect()) as client:  # behind another: its body has come, and the connection goes on
        client.sendall(post(b"first", "/slow") + post(b"second", "/barred") + post(b"third"))
        wait(lambda: served.app.begun)
        served.app.release.set()
        found = b""
        while b'[5, "third"]' not in found:
            piece = client.recv(65536)
            assert piece, found
            found += piece
        assert found.index(b"first") < found.index(b"who are you") < found.index(b"third")


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_early_answer_is_read_by_who_is_still_sending(served: Served, more: bytes, chunked: bool) -> None:
    """An application may answer before it has read a body."""
    if served.direct:
        pytest.skip("the short way answers no body that is not there")
    body = b"x" * 90_000
    whole = post(body, "/early", more=more)
    if chunked:
        whole = b"POST /early HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (more, len(body), body)
    with closing(served.connect()) as client:
        client.sendall(whole[:1000])
        wait(lambda: served.app.begun)
        for n in range(1000, len(whole), 10_000):
            client.sendall(whole[n : n + 10_000])
            time.sleep(0.01)
        assert b" 404 " in read(client)
        if more:
            assert client.recv(100) == b""
        else:
            client.sendall(post(b"again"))
            assert read_json(read(client)) == [5, "again"]
    wait(lambda: not served.server.server_state.connections)
    assert not served.ledger.held


def test_a_connection_stays_open_behind_an_early_answer(served: Served) -> None:
    if served.direct:
        pytest.skip("the short way answers no body that is not there")
    with closing(served.connect()) as client:
        client.sendall(post(b"", "/early", length=50_000))
        assert b" 404 " in read(client)
        client.sendall(b"x" * 25_000)
        time.sleep(0.05)
        client.sendall(b"x" * 25_000)
        time.sleep(1.5 * BOUNDS.header_seconds)
        client.sendall(post(b"again"))
        assert read_json(read(client)) == [5, "again"]


def test_for_nothing_there_is_always_room() -> None:
    ledger = Ledger(BOUNDS)
    ledger.held = BOUNDS.held_bytes + 1  # by answers, which nobody asks for room for
    assert ledger.has_room(0)
    assert not ledger.has_room(1)


def test_empty_lines_keep_no_connection_open(served: Served) -> None:
    """A parser passes over them before a request."""
    with closing(served.connect()) as client:
        client.sendall(post(b"first"))
        assert read_json(read(client)) == [5, "first"]
        client.sendall(b"\r\n")
        began = time.monotonic()
        assert client.recv(100) == b""
        assert time.monotonic() - began < BOUNDS.idle_seconds / 2


@pytest.mark.parametrize("how", ["chunks", "length", "known"])
def test_of_a_body_that_breaks_off_nothing_is_kept(served: Served, how: str) -> None:
    """Nor until the cyclic collector comes: a connection and its requests are circles."""
    if how == "known":
        served.ask(post(b"x" * 5000))
    with closing(served.connect()) as client:
        if how == "chunks":
            client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1388\r\n" + b"x" * 4000)
        else:
            client.sendall(post(b"x" * 4000, length=5000))
        wait(lambda: served.ledger.held >= 4000)
        (connection,) = served.server.server_state.connections
        cycle: Any = connection.cycle  # type: ignore[union-attr]
    wait(lambda: not served.server.server_state.connections)
    assert len(cycle.body) == len(cycle.whole) == 0
    assert not served.ledger.held


EXTENDED = b"1;a=bcdefghijklmnopqrst\r\nx\r\n"


@pytest.mark.parametrize(
    "ending", [b"0\r\n" + b"a: b\r\n" * 20_000, b"0\r\na: " + b"b" * 100_000, b"1;" + b"a" * 100_000, EXTENDED * 20_000]
)
def test_what_comes_beside_the_chunks_is_bounded(served: Served, ending: bytes) -> None:
    answer = served.ask(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", ending)
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    single = b"".join(b"1\r\nx\r\n" for _ in range(30_000)) + b"0\r\na: b\r\n\r\n"  # the most that chunks need
    assert read_json(served.ask(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + single))[0] == 30_000


def test_connections_are_bounded(served: Served) -> None:
    clients = [served.connect() for _ in range(BOUNDS.connections)]
    wait(lambda: len(served.server.server_state.connections) == BOUNDS.connections)
    for body in (b"", b"x" * 90_000):
        assert served.ask(post(body)).startswith(b"HTTP/1.1 503 ")  # and it is read, whatever was still on its way
    with closing(served.connect()) as client:
        client.sendall(post(b"", "/health"))
        assert (b" 200 " in read(client)) == served.direct
        assert client.recv(100) == b""  # others may want the place
    wait(lambda: len(served.server.server_state.connections) == BOUNDS.connections)
    with closing(served.connect()) as client:
        wait(lambda: len(served.server.server_state.connections) == BOUNDS.connections + 1)
        clients.pop().close()
        wait(lambda: len(served.server.server_state.connections) == BOUNDS.connections)
        for text in (b"fine", b"again"):  # there is room for it now
            client.sendall(post(text))
            assert read_json(read(client)) == [len(text), text.decode()]
        clients += [served.connect() for _ in range(SPARE + 1)]
        wait(lambda: len(served.server.server_state.connections) == BOUNDS.connections + SPARE)
        with closing(served.connect()) as last:
            assert read(last).startswith(b"HTTP/1.1 503 ")
    for client in clients:
        client.close()
    wait(lambda: not served.server.server_state.connections)
    assert read_json(served.ask(post(b"fine"))) == [4, "fine"]


def test_who_goes_away_is_not_computed_for(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"x" * 1000, "/slow"))
        wait(lambda: served.app.begun)
    wait(lambda: served.app.cancelled == 1)
    wait(lambda: served.ledger.held == 0)


def test_who_does_not_read_its_answer_is_cut_off(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"", "/large"))
        wait(lambda: served.app.begun)
        wait(lambda: not served.server.server_state.connections)


@contextmanager
def narrow(served: Served) -> Iterator[tuple[socket.socket, asyncio.Transport]]:
    """A client of which the system keeps little on either side, and the server's end of it."""
    with closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", served.port))
        wait(lambda: served.server.server_state.connections)
        transport = next(iter(served.server.server_state.connections)).transport
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield client, transport


def test_answers_that_are_not_read_count_in_what_is_held(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"", "/large"))
        wait(lambda: served.ledger.held > LARGE // 2)
        assert served.ledger.held <= LARGE + 1000
        assert b" 503 " in served.ask(post(b"other"))
        assert b" 200 " in served.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # which holds nothing
    wait(lambda: served.ledger.held == 0)
    with narrow(served) as (client, transport):
        transport.set_write_buffer_limits(high=1000)  # few bytes are many, so that they are read in time on any machine
        asked, found = 0, b""
        while not served.ledger.held:
            client.sendall(post(b"", "/medium"))
            asked += 1
            time.sleep(0.02)
        while found.count(MEDIUM) < asked:
            piece = client.recv(65536)
            assert piece, len(found)
            found += piece
        wait(lambda: served.ledger.held == 0)
        client.sendall(post(b"again"))
        assert read_json(read(client)) == [5, "again"]


def test_nothing_is_computed_for_who_has_not_read_the_answer_before(served: Served) -> None:
    """It would count in nothing that is held, and there may be one for each connection."""
    with narrow(served) as (client, _):
        client.sendall(post(b"", "/large"))
        wait(lambda: served.ledger.held > LARGE // 2)
        client.sendall(post(b"", "/medium"))
        time.sleep(0.2)
        assert served.app.begun == ["/large"]
        left = LARGE
        while left > 0:
            left -= len(client.recv(1 << 20))
        wait(lambda: served.app.begun == ["/large", "/medium"])


@pytest.mark.parametrize("leaves", [100_000, 100])
def test_who_does_not_read_keeps_the_answer_to_all_of_a_batch(served: Served, leaves: int) -> None:
    if not served.direct:
        pytest.skip("what goes by ASGI is copied")
    with narrow(served) as (client, _):
        client.sendall(post(b"", "/row"))
        left, found = 100_000 - leaves, b""
        while left > len(found):
            found += client.recv(min(1000, left - len(found)))
        wait(lambda: served.ledger.held == 200_005 or leaves == 100)
        while not found.endswith(bytes(100_000)):
            assert served.ledger.held in (0, 200_005)
            found += client.recv(65536)
        wait(lambda: not served.ledger.held)


def test_who_reads_its_answer_slowly_gets_all_of_it(served: Served) -> None:
    if not served.direct:
        pytest.skip("the application gives no answer of such a size")
    with narrow(served) as (client, _):
        client.sendall(post(b"", "/row"))
        began, found = time.monotonic(), b""
        while not found.endswith(bytes(100_000)):
            time.sleep(BOUNDS.body_seconds / 8)
            piece = client.recv(3000)
            assert piece, len(found)
            found += piece
        assert time.monotonic() - began > 3 * BOUNDS.body_seconds
    wait(lambda: not served.ledger.held)


def test_who_reads_slowly_makes_room_for_others(served: Served) -> None:
    if not served.direct:
        pytest.skip("the application gives no answer of such a size")
    with narrow(served) as (client, _):
        client.sendall(post(b"", "/row"))
        wait(lambda: served.ledger.held == 200_005)
        assert b" 503 " in served.ask(post(b"x" * 60_000))  # it has not had its time yet
        began = time.monotonic()
        while time.monotonic() - began < 1.5 * BOUNDS.body_seconds:
            time.sleep(BOUNDS.body_seconds / 8)
            assert client.recv(3000)
        assert served.ledger.held == 200_005
        assert b" 200 " in served.ask(post(b"x" * 40_000))  # for which there is room beside it
        wait(lambda: served.ledger.held == 200_005)
        assert b" 200 " in served.ask(post(b"x" * 60_000))
        wait(lambda: served.ledger.held == 0)
        left = 0
        with suppress(ConnectionResetError):
            while piece := client.recv(65536):
                left += len(piece)
        assert left < 100_000
    assert not served.ledger.readers


def test_requests_that_wait_behind_another_count_in_what_is_held(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"x", "/slow"))
        wait(lambda: served.app.begun)
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        wait(lambda: served.ledger.held > BOUNDS.held_bytes - 5000)
        assert served.ledger.held <= BOUNDS.held_bytes
        assert b" 200 " in served.ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")  # which waits behind none
        served.app.release.set()
        found = b""
        while piece := client.recv(65536):
            found += piece
    answered = found.count(b"HTTP/1.1 200 ")
    assert 50 < answered < 100
    assert found.count(b"HTTP/1.1 503 ") == 1  # behind all of them
    assert b"HTTP/1.1 503 " in found.split(b"HTTP/1.1 200 ")[-1]
    wait(lambda: served.ledger.held == 0)


def test_an_array_of_which_several_clients_are_sent_parts_counts_once() -> None:
    ledger, array = Ledger(BOUNDS), np.zeros(1000)
    for _ in range(3):
        ledger.keep(array)
    assert ledger.held == array.nbytes
    for held in (array.nbytes, array.nbytes, 0):
        ledger.let_go(array)
        assert ledger.held == held


@pytest.mark.parametrize(("more", "half_closed"), [(b"", False), (b"", True), (b"Connection: close\r\n", False)])
def test_who_leaves_a_little_of_its_answers_unread_is_cut_off(served: Served, more: bytes, half_closed: bool) -> None:
    """Less than a server stops writing at: but the connection would wait for it to be read for good."""

    served.server.config.timeout_keep_alive = 1
    with narrow(served) as (client, transport):
        while not transport.get_write_buffer_size():
            client.sendall(post(b"", "/medium"))
            time.sleep(0.02)
        client.sendall(post(b"", "/medium", more=more))
        if half_closed:
            client.shutdown(socket.SHUT_WR)
        wait(lambda: not served.server.server_state.connections)


def test_more_time_than_allowed_may_pass_while_an_answer_is_computed(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"x", "/slow"))
        time.sleep(3 * BOUNDS.body_seconds)
        served.app.release.set()
        assert read_json(read(client)) == [1, "x"]


def test_many_requests_at_once_are_answered_in_order_and_the_connection_stays(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(b"".join(post(b"%d" % n) for n in range(20)))
        found = b""
        while found.count(b"\r\n\r\n") < 20 or not found.endswith(b"]"):
            found += client.recv(65536)
        answers = [json.loads(part[: part.index(b"]") + 1]) for part in found.split(b"\r\n\r\n")[1:]]
        assert answers == [[len(str(n)), str(n)] for n in range(20)]
        client.sendall(post(b"again"))
        assert read_json(read(client)) == [5, "again"]


def test_who_asks_before_sending_is_told_to_go_on(served: Served) -> None:
    with closing(served.connect()) as client:
        head, body = post(b"body", more=b"Expect: 100-continue\r\n").split(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert read_json(read(client)) == [4, "body"]


def test_a_client_of_http_1_0_is_told_nothing_but_its_answer(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"body", more=b"Expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert read_json(read(client)) == [4, "body"]


def test_who_sends_many_requests_and_reads_no_answer_is_cut_off(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"", "/large") * 20)
        wait(lambda: not served.server.server_state.connections)
        assert len(served.app.begun) < 20


def test_a_head_that_came_before_is_known_whatever_way_its_body_comes(served: Served) -> None:
    one, two = post(b"first body"), post(b"other body")
    head = one.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with closing(served.connect()) as client:
        client.sendall(one)
        assert read_json(read(client)) == [10, "first bod"]
        assert set(served.ledger.known) == ({head} if served.direct else set())
        for cut in (0, 5, len(head) - 2, len(head), len(head) + 1, len(two) - 1):
            for piece in (two[:cut], two[cut:]):
                client.sendall(piece)
                time.sleep(0.02)
            assert read_json(read(client)) == [10, "other bod"]
        client.sendall(two + one + post(b"third", "/other") + two)
        found = b""
        while found.count(b"]") < 4:
            found += client.recv(65536)
        assert [part[: part.index(b"]") + 1] for part in found.split(b"\r\n\r\n")[1:]] == [
            b'[10, "other bod"]', b'[10, "first bod"]', b'[5, "third"]', b'[10, "other bod"]',
        ]  # fmt: skip
    wait(lambda: served.ledger.held == 0)


def test_what_is_refused_at_once_is_not_begun_and_the_connection_goes_on(served: Served) -> None:
    served.app.full = b"f"
    with closing(served.connect()) as client:
        client.sendall(post(b"first"))
        assert read_json(read(client)) == [5, "first"]  # its head was not known yet
        client.sendall(post(b"flood") + post(b"other") + post(b"f5678") + post(b"fewer", "/else"))
        found = b""
        while found.count(b"HTTP/1.1 ") < 4 or not found.endswith((b"]", b"full")):
            found += client.recv(65536)
        statuses = [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]
        assert statuses == ([503, 200, 503, 200] if served.direct else [200] * 4)
        assert found.count(b"retry-after: 1\r\n") == found.count(b"content-length: 4\r\n") == (2 if served.direct else 0)
        begun = len(served.app.begun)
        client.sendall(post(b"flood")[:-2])  # what comes in pieces is begun, and may be refused there
        time.sleep(0.05)
        client.sendall(b"od")
        assert read_json(read(client)) == [5, "flood"]
        assert len(served.app.begun) == begun + 1
    wait(lambda: served.ledger.held == 0)


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (post(b"", length=100_001), 413),
        (post(b"queued") + post(b"", length=100_001), 413),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n186a1\r\n" + b"x" * 100_001, 413),
        (b"GET / HTTP/1.1\r\n", 408),
        (post(b"too little", length=50), 408),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_refusal_waits_for_the_answers_to_the_requests_before(served: Served, second: bytes, status: int, apart: bool) -> None:
    with closing(served.connect()) as client:
        for piece in (post(b"first", "/slow"), second) if apart else (post(b"first", "/slow") + second,):
            client.sendall(piece)
            wait(lambda: served.app.begun)
        time.sleep(0.1 if status != 408 else 1.5 * BOUNDS.header_seconds)
        served.app.release.set()
        found = b""
        while piece := client.recv(65536):
            found += piece
        statuses = [int(part[:3]) for part in found.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [200] * (len(statuses) - 1) + [status], found
        assert len(statuses) == (3 if b"queued" in second else 2)
        assert b'[5, "first"]' in found
    wait(lambda: served.ledger.held == 0)


def test_a_request_that_waits_unread_behind_another_is_not_too_slow(served: Served) -> None:
    with closing(served.connect()) as client:
        client.sendall(post(b"first", "/slow"))
        wait(lambda: served.app.begun)
        second = post(b"y" * 90_000)
        for piece in (second[:100], second[100:]):
            client.sendall(piece)
            time.sleep(0.05)
        time.sleep(2 * BOUNDS.body_seconds)
        served.app.release.set()
        found = b""
        while not found.endswith(b'[90000, "yyyyyyyyy"]'):
            piece = client.recv(65536)
            assert piece, found
            found += piece
        assert b'[5, "first"]' in found
    assert served.app.cancelled == 0


def test_a_request_that_waited_is_not_remembered_by_the_head_of_another(served: Served) -> None:
    """Else whoever sends that head next is taken for the one that waited, with its length and its path."""
    with closing(served.connect()) as client:
        client.sendall(post(b"first", "/slow")[:-1])  # in two pieces: its head is remembered
        time.sleep(0.05)
        client.sendall(b"t")
        time.sleep(0.05)
        served.app.release.set()
        read(client)
        served.app.release.clear()
        client.sendall(post(b"12345", "/slow"))  # known, and not answered yet
        time.sleep(0.05)
        client.sendall(post(b"nine bytes", "/other")[:-4])  # behind it, and not whole yet
        time.sleep(0.05)
        served.app.release.set()
        assert read_json(read(client)) == [5, "12345"]
        client.sendall(b"ytes")
        assert read_json(read(client)) == [10, "nine byte"]
    for head, known in served.ledger.known.items():
        assert b" %s " % known.scope["path"].encode() in head
        assert b"Content-Length: %d\r\n" % known.length in head
    served.app.begun.clear()
    assert read_json(served.ask(post(b"again", "/slow"))) == [5, "again"]
    assert served.app.begun == ["/slow"]


def test_who_is_refused_at_once_waits_for_the_answer_before(served: Served) -> None:
    served.app.full = b"f"
    with closing(served.connect()) as client:
        client.sendall(post(b"slow ", "/slow") + post(b"first", "/slow"))
        time.sleep(0.05)
        served.app.release.set()
        found = b""
        while found.count(b"HTTP/1.1 200") < 2 or not found.endswith(b"]"):
            found += client.recv(65536)
        assert found.index(b"slow") < found.index(b"first")
        served.app.release.clear()
        client.sendall(post(b"slow ", "/slow"))
        time.sleep(0.05)
        client.sendall(post(b"flood", "/slow"))
        time.sleep(0.05)
        served.app.release.set()
        found = b""
        while found.count(b"HTTP/1.1 ") < 2 or not found.endswith((b"]", b"full")):
            found += client.recv(65536)
        assert found.startswith(b"HTTP/1.1 200")


def test_a_connection_that_is_refused_time_and_again_stays_open_and_is_counted(served: Served) -> None:
    served.app.full = b"f"
    with closing(served.connect()) as client:
        client.sendall(post(b"first"))
        read(client)
        for _ in range(3):
            client.sendall(post(b"flood"))
            assert (b" 503 " in read(client)) == served.direct
        wait(lambda: served.server.server_state.total_requests == 4)  # counted once they are written
        client.sendall(post(b"flood"))
        read(client)
        wait(lambda: served.server.server_state.total_requests == 5)


def test_a_known_head_whose_body_never_comes_is_cut_off_and_what_it_held_is_free(served: Served) -> None:
    assert read_json(served.ask(post(b"first body"))) == [10, "first bod"]
    with closing(served.connect()) as client:
        client.sendall(post(b"first body")[:-4])
        assert b" 408 " in read(client)
    with closing(served.connect()) as client:
        client.sendall(post(b"first body")[:-4])
        wait(lambda: served.ledger.held)
    wait(lambda: served.ledger.held == 0)


@pytest.mark.parametrize("more", [b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Content-Length: 4\r\n"])
def test_a_head_that_says_more_than_a_length_is_parsed_each_time(served: Served, more: bytes) -> None:
    for _ in range(2):
        answered = served.ask(post(b"body", more=more))
        if more.startswith(b"Content"):
            assert b" 400 " in answered
        elif more.startswith(b"Connection"):
            assert b"connection: close" in answered
            assert read_json(answered) == [4, "body"]
        else:
            assert answered.startswith(b"HTTP/1.1 100 Continue")
    assert not served.ledger.known


def test_a_head_that_says_it_stays_open_is_known(served: Served) -> None:
    for body in (b"one", b"two"):
        assert read_json(served.ask(post(body, more=b"Connection: keep-alive\r\n"))) == [3, body.decode()]
    assert len(served.ledger.known) == served.direct


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cut", [None, 10, 60, -45, -1])
def test_who_offers_another_protocol_is_answered_in_this_one(served: Served, chunked: bool, cut: int | None) -> None:
    """And what is sent behind the head is its body, not another request."""
    inner = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    if chunked:
        whole = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (OFFER, len(inner), inner)
    else:
        whole = post(inner, more=OFFER)
    with closing(served.connect()) as client:
        for piece in (whole, b"") if cut is None else (whole[:cut], whole[cut:]):
            client.sendall(piece)
            time.sleep(0.02)
        assert read_json(read(client)) == [len(inner), "GET /smug"]
        client.sendall(whole + post(b"after") + whole)
        found = b""
        while found.count(b"]") < 3:
            found += client.recv(65536)
        assert found.index(b"smug") < found.index(b"after") < found.rindex(b"smug")
    assert served.app.begun == ["/"] * 4
    assert all(b"h2c" not in head for head in served.ledger.known)
    wait(lambda: served.ledger.held == 0)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b"", length=100_001, more=OFFER), 413),
        (post(b"too little", length=50, more=OFFER), 408),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + OFFER + b"a: b\r\n" * 1000 + b"\r\n", 431),
    ],
)
def test_bounds_hold_for_who_offers_another_protocol(served: Served, request_: bytes, status: int) -> None:
    assert served.ask(request_).startswith(b"HTTP/1.1 %d " % status)
    assert served.app.begun == []
    wait(lambda: served.ledger.held == 0)


def test_a_head_with_bare_line_feeds_is_not_remembered(served: Served) -> None:
    crooked = b"POST / HTTP/1.1\nHost: a\nContent-Length: 6\n\nab\r\n\r\n"
    for _ in range(2):
        served.ask(crooked)
    assert not served.ledger.known


@pytest.mark.parametrize("before", [b"\r\r\n\r\n", b"\r\n\r\n", b"\n\r\n\r\n", b"\r\n"])
def test_empty_lines_before_a_request_are_not_remembered_as_its_head(served: Served, before: bytes) -> None:
    """Else whoever sends them next, before whatever request, is taken for the one that came behind them."""
    assert read_json(served.ask(before + post(b"x" * 60, "/first"))) == [60, "xxxxxxxxx"]
    assert all(head.startswith(b"POST /first ") for head in served.ledger.known)
    assert read_json(served.ask(before + post(b"second", "/other" + "a" * 60))) == [6, "second"]
    assert served.app.begun == ["/first", "/other" + "a" * 60]


def test_known_heads_are_bounded(served: Served) -> None:
    with closing(served.connect()) as client:
        for n in range(300 if served.direct else 10):  # there each takes as long as a delayed acknowledgement
            client.sendall(post(b"body", more=b"X-Number: %d\r\n" % n))
            assert read_json(read(client)) == [4, "body"]
    assert len(served.ledger.known) == (256 if served.direct else 0)


def test_what_is_read_late_came_when_the_loop_looked_last() -> None:
    async def run() -> list[float]:
        loop, pulse, found = asyncio.get_running_loop(), Pulse(), list[float]()

        def read(seconds: float) -> None:
            found.extend((time.monotonic(), pulse.came(loop), time.monotonic()))
            time.sleep(seconds)
            found.append(pulse.came(loop))

        await asyncio.sleep(0.01)
        read(0.02)  # after sleep
        loop.call_soon(read, 0.02)  # in the round after, without sleep
        await asyncio.sleep(0.06)
        read(0.0)
        return found

    before, came, now, again, _, busy, busy_now, busy_again, last_before, last, last_now, _ = asyncio.run(run())
    assert before <= came <= now
    assert again == came  # the same round: it was there when the round began
    assert busy == came  # it may have come while the round before was at work
    assert busy_now - busy >= 0.02
    assert busy_again == busy
    assert last_before <= last <= last_now


def read_json(answer: bytes) -> list[Any]:
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
    found: list[Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def wait(done: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


BODY = st.text("abc {}[]\r\n:", max_size=60).map(str.encode) | st.integers(0, 3000).map(lambda count: b"m" * count)


@st.composite
def asked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request, framed in one of the ways there are, and its body."""
    body = b"" if (way := draw(st.sampled_from(["length", "chunks", "none"]))) == "none" else draw(BODY)
    path = draw(st.sampled_from([b"/", b"/other?a=%20"]))
    more = draw(st.sampled_from([b"", b"X-Id: 7\r\n", b"connection: Keep-Alive\r\n", b"Accept:\r\n", OFFER]))
    if way == "length":
        return post(body, path.decode(), more=more), body
    if way == "none":
        return b"GET %s HTTP/1.1\r\nhOST: a\r\n%s\r\n" % (path, more), b""
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3)))
    parts = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    extension = draw(st.sampled_from([b"", b";a=b"]))
    chunks = b"".join(b"%X%s\r\n%s\r\n" % (len(part), extension, part) for part in parts if part)
    return b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n%s\r\n%s0\r\n\r\n" % (path, more, chunks), body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True) if start < end]


def read_answers(client: socket.socket, count: int | None) -> list[tuple[int, bytes]]:
    """So many answers, status and body, or those that come before the server closes; one that breaks off is left out."""
    found, answers = b"", list[tuple[int, bytes]]()
    while count is None or len(answers) < count:
        head, gap, rest = found.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        if gap and len(rest) >= length:
            assert head.startswith(b"HTTP/1.1 ")
            answers, found = [*answers, (int(head[9:12]), rest[:length])], rest[length:]
            continue
        try:
            piece = client.recv(65536)
        except ConnectionResetError:
            return answers
        if not piece:
            return answers
        found += piece
    assert not found
    return answers


FRAMES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FRAMES
@given(requests=st.lists(asked(), min_size=1, max_size=7), cuts=st.lists(st.integers(0, 1 << 14), max_size=9))
def test_however_requests_are_framed_and_cut_each_is_answered_in_its_turn(
    served: Served, requests: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    with closing(served.connect()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces(b"".join(request for request, _ in requests), cuts):
            client.sendall(piece)
        assert read_answers(client, len(requests)) == [(200, answer(body)) for _, body in requests]


@FRAMES
@given(
    requests=st.lists(asked(), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 1 << 14), max_size=4),
    changes=st.lists(
        st.tuples(
            st.integers(0, 1 << 14),
            st.integers(0, 40),
            st.sampled_from(
                [
                    b"",
                    b"\r\n",
                    b"\r\n\r\n",
                    b"\0",
                    b" ",
                    b":",
                    b"-1",
                    b"9" * 30,
                    b"chunked",
                    b"Content-Length: 3\r\n",
                    b"\xff\xfe",
                    b"0\r\n\r\n",
                ]
            ),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_whatever_is_sent_is_answered_or_refused_and_nothing_is_kept(
    served: Served, requests: list[tuple[bytes, bytes]], cuts: list[int], changes: list[tuple[int, int, bytes]]
) -> None:
    data = b"".join(request for request, _ in requests)
    for place, count, new in changes:
        place %= len(data) + 1
        data = data[:place] + new + data[place + count :]
    with closing(served.connect()) as client:
        try:
            for piece in pieces(data, cuts):
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):  # it was refused, and cut off, before all was sent
                raise
        answers = read_answers(client, None)
    for status, body in answers:
        assert status in (200, 400, 404, 413, 431, 501), (status, data)
        assert isinstance(json.loads(body), list if status == 200 else dict) or not body
    wait(lambda: served.ledger.held == 0 and not served.server.server_state.connections)
    assert read_json(served.ask(post(b"fine"))) == [4, "fine"]


def run_beside_a_socket(
    loop: asyncio.AbstractEventLoop, read: socket.socket, reader: type[asyncio.Protocol], run: Callable[[], Awaitable[None]]
) -> None:
    """Runs `run` to its end while `reader` is told what comes on `read`; closes the loop."""

    async def connected() -> None:
        read.setblocking(False)
        transport, _ = await loop.create_connection(reader, sock=read)
        await run()
        transport.close()

    try:
        loop.run_until_complete(connected())
    finally:
        loop.close()


class Waited(Waits):
    """Waits as long as it is told."""

    def __init__(self) -> None:
        self.told = 0.0

    def seconds(self) -> float:
        return self.told


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, _loop_factory() or asyncio.new_event_loop])
@pytest.mark.parametrize("woken_by", ["the request", "an answer"])
def test_what_was_waited_for_without_a_core_counts_for_who_waited(new_loop: Callable[[], asyncio.AbstractEventLoop], woken_by: str) -> None:
    """The loop is woken and has no core for 3 ms, for a request or for an answer, behind which a request comes that waits for nothing."""
    loop, pulse, waits, found = new_loop(), Pulse(), Waited(), list[float]()
    mine, its = socket.socketpair()

    class Reads(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            if woken_by == "the request":
                waits.told += 0.003
            found.append(time.monotonic() - pulse.came(loop))

    def answer() -> None:
        if woken_by == "an answer":
            waits.told += 0.003
            pulse.ran(loop)
        mine.send(b"x")

    async def run() -> None:
        pulse.came(loop)
        await asyncio.sleep(0.01)
        pulse._waits, pulse._waited = waits, waits.told
        for _ in range(20):
            await asyncio.sleep(0.01)
            thread = threading.Thread(target=loop.call_soon_threadsafe, args=(answer,))
            thread.start()
            await asyncio.sleep(0.01)
            thread.join()
        await asyncio.sleep(0.1)

    with mine:
        run_beside_a_socket(loop, its, Reads, run)
    least, usual = (0.0028, 0.0032) if woken_by == "the request" else (0.0, 0.002)
    assert len(found) == 20 and least <= statistics.median(found) <= usual


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, _loop_factory() or asyncio.new_event_loop])
@pytest.mark.parametrize(("rounds", "answers", "seconds", "sent_in"), [(1, 10, 0.001, 0), (60, 1, 0.0001, 59)])
def test_what_lay_there_while_others_were_answered_counts_since_it_came(
    new_loop: Callable[[], asyncio.AbstractEventLoop], rounds: int, answers: int, seconds: float, sent_in: int
) -> None:
    """Many answers in one round, and many rounds of one: a request comes at the first answer of one of them."""
    loop, pulse, found, sent = new_loop(), Pulse(), list[float](), list[float]()
    mine, its = socket.socketpair()

    class Reads(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            found.append(pulse.came(loop) - sent[-1])

    def busy() -> None:
        end = time.perf_counter() + seconds
        pulse.ran(loop)
        while time.perf_counter() < end:
            pass

    def answered(number: int) -> None:
        if number == sent_in:
            sent.append(time.monotonic())
            mine.send(b"x")
        for _ in range(answers):
            busy()
        if number + 1 < rounds:
            loop.call_soon(answered, number + 1)

    async def run() -> None:
        for _ in range(9):
            await asyncio.sleep(0.005)
            pulse.came(loop)
            loop.call_soon(answered, 0)
            await asyncio.sleep(0.05)

    with mine:
        run_beside_a_socket(loop, its, Reads, run)
    assert len(found) == 9 and abs(statistics.median(found)) < 0.001


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="this system does not say how long a thread waits for a core")
def test_who_shares_a_core_waits_for_it_and_who_sleeps_does_not() -> None:
    waits, usable = Waits(), os.sched_getaffinity(0)
    slept = []
    for _ in range(5):
        before = waits.seconds()
        time.sleep(0.01)
        slept.append(waits.seconds() - before)
    assert 0 <= min(slept) < 0.005
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            os.sched_setaffinity(busy.pid, {min(usable)})
            os.sched_setaffinity(0, {min(usable)})
            before, end = waits.seconds(), time.monotonic() + 5
            while waits.seconds() - before < 0.02 and time.monotonic() < end:
                sum(range(1000))
        finally:
            os.sched_setaffinity(0, usable)
            busy.kill()
    assert waits.seconds() - before >= 0.02


def test_where_the_system_does_not_say_nobody_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: Any, **more: Any) -> int:
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patched:
        patched.setattr("muntin.serving.ledger.os.open", missing)
        waits = Waits()
    assert waits.seconds() == 0
