"""An HTTP connection that nobody can make the server wait on, or fill its memory through.

uvicorn parses (httptools, the parser of Node.js) and speaks ASGI; what it leaves open is bounded here: how long headers and a body may
take, and the reading of an answer stand still, how large headers and a body may be, how many bytes all bodies may hold together, and how
many connections there are. What is refused is answered, and what its sender still sends is taken and dropped for a moment: a connection
that is closed on unread bytes is reset, and the answer with it. A body is handed to the application in one piece once it is whole: an
image of a megabyte would wake it a dozen times otherwise. Where its length was announced it lies in memory that
bodies before it lay in: fresh memory costs a page fault for every 4 KiB.

What answers some requests without ASGI (`Direct`) is called when the body is whole, without a task, and its answer is written in one piece.
A client sends it the same head, byte for byte, with every image of a size: one that was parsed before is known by its bytes, and what
follows it is its body (`Known`), which the system writes to where it is to lie (`Receiver`). Whoever computes an answer is told when
the client goes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Protocol

import httptools
import numpy as np
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from muntin.errors import DependencyError, install
from muntin.serving.heads import HEAD_BYTES, Known, known_head
from muntin.serving.ledger import Ledger
from muntin.serving.paced import Paced
from muntin.serving.unread import SMALL, Unread

Fields = list[tuple[bytes, bytes]]
Answer = tuple[int, Fields, list[Any]]
"""Status, header fields without the length, the body's parts."""
Reply = Callable[[int, Fields, list[Any]], None]
"""Is given the parts of an `Answer`. Called once, on the event loop."""
_DIGITS = 15
"""Of a body's length, at most: more than any bound."""
_MAPPED = 1 << 17
"""Bytes from which memory comes from the system, a fault for every page, and is worth keeping."""
_FRAMES = 16
"""Bytes that a byte of a body may take on the wire where it comes in chunks; one byte a chunk takes six."""
_OVERRIDDEN = ("_start_asgi_task", "_unset_keepalive_if_required", "timeout_keep_alive_handler", "on_response_complete")
"""Of uvicorn's connection, which calls them, and which keeps what they are called to itself."""
_QUEUED = 4096
"""Bytes that a request takes which waits behind another one of its connection, in uvicorn's objects: 2.6 KB where its head is short. A read
of 64 KiB may bring two thousand of them."""
REFUSED = "muntin.refused"
"""In a scope: the connection itself refused the request before all of it had come, and told `Direct.refused`."""
SPARE = 32
"""Connections beyond the bound, on which what must always be answered is, and everything else refused: a probe that is turned away says
that a busy server is a dead one."""
_SPARE_S = 2.0
"""How long the headers on one of these may take."""
LEFT = 499
"""The status of a request whose client did not wait for its answer, as nginx has it."""
_LINGER_S = 2.0
"""How long what is sent after a refusal is dropped before the connection is closed."""


def check_uvicorn() -> None:
    """Raises DependencyError where the uvicorn that is installed has another connection than `BoundedConnection` is made of: what that
    overrides would never be called, and every inference not be found."""
    missing = [name for name in _OVERRIDDEN if not hasattr(HttpToolsProtocol, name)]
    if missing:
        raise DependencyError(
            f"uvicorn {uvicorn.__version__} has no {missing[0]} in its connections, which this server needs: {install('serve')}"
        )


class Direct(Protocol):
    """What answers some requests without ASGI."""

    def essential(self, target: bytes, /) -> bool:
        """Whether a request for this is answered, by whomever, though there are too many connections."""
        ...

    def takes(self, scope: MutableMapping[str, Any], /) -> bool:
        """Whether it answers a request, of which the headers are there."""
        ...

    def barred(self, scope: MutableMapping[str, Any], /) -> Answer | None:
        """The answer to a request that its headers alone are wrong with: its body is not waited for."""
        ...

    def refused(self, client: str, method: str, path: str, status: int, sent: int, /) -> None:
        """Is told what the connection itself refused: method and path as far as they came, and bytes of the answer; or (499) whose client
        left before all of it had come."""
        ...

    def learn(self, scope: MutableMapping[str, Any], /) -> None:
        """The head of a request that it takes: what it finds in there it may write into the scope, which all requests with the same head,
        byte for byte, share."""
        ...

    def refusal(self, scope: MutableMapping[str, Any], body: memoryview, came: float, /) -> Answer | None:
        """The answer to a request that `learn` saw the head of, if it is refused whatever is in it; then it is not asked about it again."""
        ...

    def begin(self, scope: MutableMapping[str, Any], body: Any, came: float, reply: Reply, /) -> Callable[[], object]:
        """Has it answered, now or later. `came`: when its last byte did (`Pulse`). Returns what is called if the client goes before."""
        ...


class _Turn:
    """A request with a known head, as uvicorn's cycle is one whose head it parsed."""

    class _Nobody:
        def set(self) -> None:
            return

    __slots__ = ("body", "disconnected", "keep_alive", "response_complete", "response_started", "scope", "whole")
    message_event = _Nobody()
    """Nobody waits for it."""

    def __init__(self, scope: dict[str, Any], whole: memoryview) -> None:
        self.scope, self.whole = scope, whole
        self.keep_alive = True
        self.disconnected = self.response_started = self.response_complete = False


class _Sending:
    """What a cycle of uvicorn's writes to. uvicorn closes a connection behind an answer by itself; whether it is still being sent to, which
    would reset it, and the answer with it, is known to the connection alone."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


class Receiver(asyncio.BufferedProtocol):
    """What the event loop sees of a connection: says where the next bytes are to be written, so that nobody copies a body."""

    def __init__(self, **settings: Any) -> None:
        self._connection = BoundedConnection(**settings)
        self.connection_lost = self._connection.connection_lost  # type: ignore[method-assign]
        self.eof_received = self._connection.eof_received  # type: ignore[method-assign]
        self.pause_writing = self._connection.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._connection.resume_writing  # type: ignore[method-assign]
        self.get_buffer = self._connection.room  # type: ignore[method-assign, assignment]
        self.buffer_updated = self._connection.written  # type: ignore[method-assign, assignment]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made: Any = transport
        if made.get_extra_info("sslcontext") is not None:
            made = Paced(made, self._connection)
            self.connection_lost = made.connection_lost  # type: ignore[method-assign]
            self.pause_writing, self.resume_writing = made.pause_writing, made.resume_writing  # type: ignore[method-assign]
            made.begin()
        self._connection.connection_made(made)


class BoundedConnection(HttpToolsProtocol):
    """One connection. `ledger` is shared by all of a server. `direct`: what answers beside the application."""

    def __init__(
        self, *, ledger: Ledger, config: Any, server_state: Any, app_state: Any, direct: Direct | None = None, _loop: Any = None
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self._ledger, self._bounds, self._direct = ledger, ledger.bounds, direct
        self._spare = False
        """Whether it is one too many."""
        self._timer: asyncio.TimerHandle | None = None
        """Until when what is arriving has to be there."""
        self._unread: Unread
        """Of what was written; from when the connection is made."""
        self._head: int | None = None
        """Bytes of the headers that are arriving, or are over but refused; None where none are."""
        self._parsing = False
        """Whether the parser is in the middle of a request."""
        self._raw = b""
        """The head that is being parsed, if all of it came at once."""
        self._turn: _Turn | None = None
        """The request with a known head of which the body is arriving."""
        self._body = 0
        """Bytes of the body that is arriving, as far as they have come."""
        self._wire = 0
        """Bytes that came since the headers of a body in chunks."""
        self._begun = 0
        """Requests whose first byte was parsed."""
        self._left = 0
        """Bytes that are still dropped of what is sent after a refusal."""
        self._last: bytes | None = None
        """A refusal that waits for the answers to the requests before it."""
        self._held: dict[Any, int] = {}
        """By cycle (a request and its answer; several where a client does not wait for answers): what the ledger holds for it."""
        self._running: tuple[Any, Callable[[], object] | None] | None = None
        """The cycle that is being answered, and how to stop that; None: its body is awaited."""
        self._told_left = False

    # ---- the transport's events ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = Unread(transport, self._ledger, self.loop, self._not_read)
        beyond = len(self.connections) - self._bounds.connections
        self._spare = beyond > 0
        if beyond > SPARE:
            self._refuse_place(linger=False)
        else:
            self._expect(min(self._bounds.header_seconds, _SPARE_S) if self._spare else self._bounds.header_seconds)

    def room(self, wanted: int) -> memoryview:
        """Where the bytes that come next are to be written: to their place in a known request's body, and to no more than its end."""
        return self._ledger.scratch if self._turn is None or self._left else self._turn.whole[self._body :]

    def written(self, count: int) -> None:
        """So many bytes lie there now."""
        if self._left:
            self._drop(count)
            return
        if self._turn is None:
            self.data_received(bytes(self._ledger.scratch[:count]))
            return
        self._ledger.pulse.came(self.loop)
        if not self._over and self._arrives(count) and self._turn is not None:  # making room may have given up this very connection
            self._check_whole(self._turn)

    def data_received(self, data: bytes) -> None:
        self._ledger.pulse.came(self.loop)
        while data and not self._over:
            data = self._take(data)

    def _take(self, data: bytes) -> bytes:
        """What is left of the data: what comes behind a known request's body."""
        self._raw = b""  # of whatever came before: what is started after a wait must not be remembered by another one's head
        if self._direct is not None and not self._spare and not self._parsing and (self.cycle is None or self.cycle.response_complete):
            end = data.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
            self._raw = data[:end] if end > 4 else b""
            known = self._ledger.known.get(self._raw)
            if known is not None and self._may_hold(known.length):
                came = memoryview(data)[end:]
                if len(came) >= known.length and self._turned_away(known, came[: known.length]):
                    return data[end + known.length :]
                return self._start_known(known, came)
        begun, chunks = self._begun, self._wire
        self._parse(data)
        if self._over:
            return b""
        more = len(data) if self._begun == begun else 0  # where a request begins in there, what is before it is another one's
        if self._head is not None:  # still incomplete
            self._head += more
            if self._head > self._bounds.header_bytes:
                self._refuse_head()
            elif self._timer is None and not self.flow.read_paused:
                self._expect(self._bounds.header_seconds)
        elif self._wire and self._parsing and not self.cycle.response_complete:
            self._wire += more if chunks else 0
            if self._wire > self._bounds.header_bytes + _FRAMES * self._body:
                self._refuse(431, "the chunks' extensions and trailers are longer than the headers may be")
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._timer is None and self.timeout_keep_alive_task is None and not self._over:
            self._expect(self._bounds.header_seconds)  # that was no request, and uvicorn has stopped its timer for it
        return b""

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while data and not self._over:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as offer:
                    data = self._without_offer() + data[offer.args[0] :]
        except httptools.HttpParserError:
            self.send_400_response("")

    def _without_offer(self) -> bytes:
        """The head that ended just now, without its offer to go on in another protocol, for a parser that has seen nothing: this one would
        take the body for the other protocol's bytes. Nothing obliges a server to accept (RFC 9110, 7.8)."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"".join((*lines, b"\r\n"))

    @property
    def _over(self) -> bool:
        """Whether nothing more is read here."""
        return self._last is not None or self._ended

    @property
    def _ended(self) -> bool:
        """Whether nothing more is written here."""
        return self._left > 0 or self.transport.is_closing()

    def _drop(self, count: int) -> None:
        self._left = max(0, self._left - count)
        if not self._left:
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()  # uvicorn's goes on where a connection ended in an error
        self._unread.taken()
        try:
            if exc is not None:
                self._tell_left()
            self._abandon()
        finally:
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread.taken()
        if self.transport.is_closing():  # a little is left
            self._unread.closing()

    def eof_received(self) -> None:
        self._tell_left()
        self._unread.closing()  # the loop closes the connection now

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._unread.closing()

    def send_400_response(self, msg: str) -> None:
        if self._over:  # the parser goes on behind what was refused
            return
        self._refuse(400, "no valid HTTP request")

    # ---- the parser's events ----

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()  # the answer before may have gone out in the middle of what is parsed
        self._head, self._body, self._wire, self._parsing = 0, 0, 0, True
        self._begun += 1

    def on_headers_complete(self) -> None:
        if self._over:
            return
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._refuse(400, "CONNECT: this server is no proxy; ask for a path of its own")
            return  # it is parsed again, without the offer
        self._stop_timer()
        size, hosts, codings = len(self.url), 0, b""
        for name, value in self.headers:
            size += len(name) + len(value) + 4
            hosts += name == b"host"
            if name == b"transfer-encoding":
                codings += b"," + value.lower()
        if size > self._bounds.header_bytes:
            self._refuse_head()
            return
        if hosts != 1 and (hosts or self.parser.get_http_version() != "1.0"):  # RFC 9112, 3.2
            self._refuse(400, f"{hosts} Host headers: name one")
            return
        if codings and codings.replace(b" ", b"").replace(b"\t", b"").strip(b",") != b"chunked":  # RFC 9112, 6.1
            self._refuse(501, "a transfer coding beside chunked: pack the body (content-encoding), or send it as it is")
            return
        if not self.url.startswith(b"/") and b"://" in self.url:
            self.url = _origin_form(self.url)
        if not self._has_place():
            self._refuse_place()
            return
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        queued = 0 if self.cycle is None or self.cycle.response_complete else _QUEUED
        if len(length) > _DIGITS or int(length) > self._bounds.body_bytes:
            self._refuse(413, f"a body of {length[:_DIGITS].decode()} bytes: at most {self._bounds.body_bytes:,} are taken")
        elif (held := int(length) + queued) and not self._may_hold(held):  # else it holds nothing: health is told, however much is held
            self._refuse(503, "the bodies of other requests fill what this server holds: try again")
        else:
            self._wire = int(bool(codings))
            if self.parser.get_http_version() == "1.0":  # RFC 9110, 10.1.1: it would take the interim answer for its own
                self.expect_100_continue = False
            super().on_headers_complete()
            self.cycle.keep_alive = self.cycle.keep_alive and not self._spare
            self.cycle.transport = _Sending(self.transport, partial(self._close_behind, self.cycle))  # type: ignore[assignment]
            self._head = None  # not before: what is refused until here has no cycle yet, and the last one is of an answer that is out
            if queued:
                self._hold(queued)
            if int(length) and not self._over:
                cycle: Any = self.cycle
                cycle.whole = self._memory(int(length))
                cycle.receive = partial(_receive, cycle)  # in place of uvicorn's, which copies what came into a new object

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is not None:  # not those behind the last chunk, which nobody asks for
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        if self._over or self.cycle.response_complete:
            return
        whole, start = getattr(self.cycle, "whole", None), self._body
        if whole is None and start + len(body) > self._bounds.body_bytes:  # in chunks: no length was given
            self._refuse(413, f"a body of more than {self._bounds.body_bytes:,} bytes")
        elif self._arrives(len(body)):
            if whole is None:
                self.cycle.body += body
            else:  # no more than was announced can come: the parser sees to that
                whole[start : self._body] = body

    def _arrives(self, count: int) -> bool:
        """Counts bytes of a body; whether they can be held. What is only announced holds nothing: a few heads would shut everybody out."""
        if not self._may_hold(count):
            self._refuse(503, "the bodies of other requests fill what this server holds: try again")
            return False
        self._body += count
        self._hold(count)
        return True

    def on_message_complete(self) -> None:
        if self._head is not None:  # of an offer to go on in another protocol only the head is over
            return
        self._parsing, self._raw = False, b""
        if self._over:
            return
        whole = getattr(self.cycle, "whole", None)
        if whole is not None and self._body != len(whole) and not self.cycle.response_complete:
            self._refuse(400, f"a body of {self._body:,} bytes: {len(whole):,} were announced")  # what it lacks is other clients' bytes
            return
        self._stop_timer()
        super().on_message_complete()
        if self._running == (self.cycle, None):
            self._begin(self.cycle)
        elif self.cycle.response_complete and self.timeout_keep_alive_task is None and not self._over:  # its bytes have stopped that
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        if self._running is not None:
            cycle = self._running[0]
            self._release(cycle)
            cycle.body = cycle.whole = memoryview(b"")  # of which nobody may have asked
            self._running = None
            if not cycle.keep_alive and not self._left:
                self._close()
        super().on_response_complete()
        if self._last is not None:
            if self._running is None and not self._ended:
                self._unset_keepalive_if_required()
                self.transport.write(self._last)
                self._linger()
        elif self._head is not None and self._timer is None:  # it came in part behind that request, and is waited for from now on
            self._expect(self._bounds.header_seconds)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if cycle.more_body:  # until now it may have waited behind another, and nothing was read of it
            self._expect(self._bounds.body_seconds)
        if self._direct is not None and self._direct.takes(cycle.scope):
            self._running = cycle, None
            if barred := self._direct.barred(cycle.scope):
                self._bar(cycle, barred)
                return
            if cycle.waiting_for_100_continue:
                _say_continue(cycle)
            elif self._raw and cycle.more_body:
                self._learn(cycle)
            if not cycle.more_body:  # it waited behind another one; not from inside that one's end, for there may be a thousand
                self.loop.call_soon(self._begin, cycle)
            return
        task = self.loop.create_task(self._run_asgi(cycle, app))
        self._running = cycle, task.cancel
        task.add_done_callback(self._asgi_ended)
        self.tasks.add(task)

    async def _run_asgi(self, cycle: Any, app: Any) -> None:
        if self.flow.write_paused:  # as of `_begin`
            await self.flow.drain()
        await cycle.run_asgi(app)

    def _asgi_ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if self.transport.is_closing():  # uvicorn closes it where the application failed
            self._unread.closing()

    def _bar(self, cycle: Any, answer: Answer) -> None:
        """Answers a request by its headers, and closes the connection where its body is still to come."""
        if not cycle.more_body:  # it waited behind another one; not from inside that one's end
            self.loop.call_soon(self._reply, cycle, *answer)
            return
        self._stop_timer()
        self._write(*answer, keep_alive=False)
        cycle.response_started = cycle.response_complete = True
        self._running = None
        self._linger()

    # ---- the short way ----

    def _learn(self, cycle: Any) -> None:
        """Remembers the head that was just parsed, if its bytes alone say what it is."""
        known = known_head(self._raw, cycle.scope, self.url) if cycle.keep_alive else None
        if known is not None:
            assert self._direct is not None
            self._direct.learn(known.scope)
            self._ledger.known.learn(self._raw, known)

    def _turned_away(self, known: Known, body: memoryview) -> bool:
        """Whether a request that came in one piece was refused at once: of a flood, most are, and nothing is made for them."""
        assert self._direct is not None
        if self.flow.write_paused:
            return False
        answer = self._direct.refusal(known.scope, body, self._ledger.pulse.came(self.loop))
        if answer is None:
            return False
        self._stop_timer()
        self._write(*answer, keep_alive=True)
        self.on_response_complete()
        return True

    def _start_known(self, known: Known, came: memoryview) -> bytes:
        self._unset_keepalive_if_required()
        self._stop_timer()
        turn = _Turn({**known.scope, "client": self.client, "server": self.server}, self._memory(known.length))
        self.cycle, self._turn, self._body = turn, turn, 0  # type: ignore[assignment]
        if len(came) < known.length:
            self._expect(self._bounds.body_seconds)
        part = came[: known.length]
        if self._arrives(len(part)):
            turn.whole[: len(part)] = part
            self._check_whole(turn)
        return bytes(came[len(part) :])

    def _check_whole(self, turn: _Turn) -> None:
        if self._body == len(turn.whole):
            self._turn = None
            self._stop_timer()
            self._running = turn, None
            self._begin(turn)

    def _begin(self, cycle: Any) -> None:
        assert self._direct is not None
        if cycle.disconnected or self._ended:
            return
        if self.flow.write_paused:  # nothing is computed for who has not read what it was answered before
            self._after_reading(partial(self._begin, cycle))
            return
        body = cycle.whole if hasattr(cycle, "whole") else cycle.body
        cycle.whole = cycle.body = memoryview(b"")  # whoever answers holds it as long as it is wanted
        cancel = self._direct.begin(cycle.scope, body, self._ledger.pulse.came(self.loop), partial(self._reply, cycle))
        if self._running == (cycle, None):  # it is not answered yet
            self._running = cycle, cancel

    def _reply(self, cycle: Any, status: int, headers: Fields, parts: list[Any]) -> None:
        if cycle.disconnected or self._ended:
            return
        if self.flow.write_paused:  # the answer before was not read yet: this one waits, or answers would pile up
            self._after_reading(partial(self._reply, cycle, status, headers, parts))
            return
        cycle.response_started = True
        self._ledger.pulse.ran(self.loop)
        self._write(status, headers, parts, keep_alive=cycle.keep_alive)
        cycle.response_complete = True
        self.on_response_complete()

    def _write(self, status: int, headers: Fields, parts: list[Any], *, keep_alive: bool) -> None:
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        length = sum(map(len, parts))
        lines.append(b"content-length: %d\r\n%s\r\n" % (length, b"" if keep_alive else b"connection: close\r\n"))
        if length <= SMALL:
            self.transport.write(b"".join((*lines, *parts)))
        else:
            self.transport.write(b"".join(lines))
            for part in parts:
                self.transport.write(part)
            if self.flow.write_paused or self._unread.overflows():
                self._unread.keep(parts)

    def _after_reading(self, call: Callable[[], None]) -> None:
        """Calls it once the client has read what it was sent."""

        async def later() -> None:
            await self.flow.drain()
            call()

        task = self.loop.create_task(later())
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _memory(self, size: int) -> memoryview:
        return memoryview(bytearray(size)) if size < _MAPPED else self._ledger.buffers.take((size,), np.uint8).data

    # ---- bounds ----

    def _expect(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self.transport.close()
        self._unread.closing()

    def _close_behind(self, cycle: Any) -> None:
        """Closes the connection behind an answer, or a part of one that failed."""
        arriving = cycle is self.cycle and cycle.more_body
        if arriving and not self._ended:
            self._stop_timer()
            cycle.body = cycle.whole = memoryview(b"")
            self._linger()
        else:
            self._close()

    def _not_read(self) -> None:
        self._abandon()
        self.transport.abort()  # it does not read its answer, and nothing more can be said to it

    def _too_slow(self) -> None:
        self._timer = None
        if self._left or (self._head is None and not self._parsing and self._turn is None):
            self._close()  # it never said a word, or it was told already
        else:
            self._refuse(408, "the request did not arrive in time")

    def _has_place(self) -> bool:
        """Whether what is asked for here is answered: on one connection too many only what must be, as long as others have not gone."""
        self._spare = self._spare and len(self.connections) > self._bounds.connections
        return not self._spare or (self._direct is not None and self._direct.essential(self.url))

    def _may_hold(self, count: int) -> bool:
        return self._ledger.has_room(count)

    def _hold(self, count: int) -> None:
        self._held[self.cycle] = self._held.get(self.cycle, 0) + count
        self._ledger.held += count

    def _release(self, cycle: Any) -> None:
        self._ledger.held -= self._held.pop(cycle, 0)

    def _abandon(self) -> None:
        """Nobody reads the answers of this connection any more: what computes them is told, and what they held is free."""
        for cycle in list(self._held):
            self._release(cycle)
        waiting: Any
        running = None if self._running is None else self._running[0]
        for waiting in (running, self.cycle, *(queued for queued, _ in self.pipeline)):
            if waiting is not None:  # in a circle with this connection: its body would stay until that is collected
                waiting.body = waiting.whole = memoryview(b"")
        self.pipeline.clear()
        self._turn = None
        if self._running is not None and not self._running[0].response_complete:
            cycle, stop = self._running
            cycle.disconnected = True
            if stop is not None:
                stop()

    def _tell_left(self) -> None:
        """Tells `Direct` of a request of its own that did not come whole; of others their tasks know."""
        arriving: Any = self._turn
        if arriving is None and self._running is not None and self._running[1] is None:
            arriving = self._running[0]
        over = arriving is None or arriving.disconnected or self._last is not None or self._left
        if self._direct is not None and not over and not self._told_left:
            self._told_left = True
            self._direct.refused(self.client[0] if self.client else "", arriving.scope["method"], arriving.scope["path"], LEFT, 0)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's line and headers are longer than {self._bounds.header_bytes:,} bytes")

    def _refuse_place(self, *, linger: bool = True) -> None:
        self._refuse(503, f"{self._bounds.connections} connections are open already", linger=linger)

    def _refuse(self, status: int, reason: str, *, linger: bool = True) -> None:
        """Answer on the connection itself, without the application, and close it: once the requests before were answered."""
        self._stop_timer()
        self._ledger.refused[status] = self._ledger.refused.get(status, 0) + 1
        body = b'{"error":"' + reason.encode("ascii", "replace") + b'"}'
        if self._direct is not None:
            self._direct.refused(self.client[0] if self.client else "", *self._asked(), status, len(body))
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head = b"content-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n" % (len(body), retry)
        answer = STATUS_LINE[status] + head + body
        has_cycle = self._parsing and self._head is None  # the last one
        queued = has_cycle and len(self.pipeline) > 0
        if queued:
            self._release(self.pipeline.popleft()[0])
        if self._running is not None and (queued or not has_cycle):
            self._last = answer
            self.flow.pause_reading()
            return
        answering = self._running is not None and self._running[0].response_started
        answering = answering or (has_cycle and self.cycle.response_complete)
        if self._running is not None:
            self._running[0].scope[REFUSED] = True  # whoever answers it is cancelled now, and nobody has left
        self._abandon()
        if not answering:  # in the middle of another answer there is no place for this one
            self.transport.write(answer)
        if linger:
            self._linger()
        else:
            self._close()

    def _asked(self) -> tuple[str, str]:
        """Method and path of the request that is arriving, as far as they came."""
        if self._turn is not None or (self._parsing and self._head is None):
            return self.cycle.scope["method"], self.cycle.scope["path"]
        if self._parsing and self.url:
            return self.parser.get_method().decode("ascii"), self.url.partition(b"?")[0].decode("latin-1")
        return "", ""

    def _linger(self) -> None:
        """Closes the connection when its client has stopped sending, or in a moment."""
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._left = 2 * self._bounds.body_bytes
        self._expect(_LINGER_S)


def _origin_form(target: bytes) -> bytes:
    """The path and query of a target that names its host, too, as proxies send it; of one without a path the root (RFC 9110, 4.2.3). Raises
    httptools' errors for what is none."""
    parts = httptools.parse_url(target)
    return (parts.path or b"/") + (b"?" + parts.query if parts.query else b"")


def _say_continue(cycle: Any) -> None:
    cycle.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    cycle.waiting_for_100_continue = False


async def _receive(cycle: Any) -> dict[str, Any]:
    """ASGI's `receive` for a request whose body has a place of its own: the body when it is whole, and then what comes after it."""
    if cycle.waiting_for_100_continue and not cycle.transport.is_closing():
        _say_continue(cycle)
    if not cycle.disconnected and not cycle.response_complete:
        cycle.flow.resume_reading()
        await cycle.message_event.wait()
        cycle.message_event.clear()
    if cycle.disconnected or cycle.response_complete:
        return {"type": "http.disconnect"}
    body, cycle.whole = cycle.whole, memoryview(b"")
    return {"type": "http.request", "body": body, "more_body": False}
