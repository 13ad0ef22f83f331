"""A load generator for HTTP/1.1 on the loopback, light enough to leave its core idle most of the time.

One thread, one epoll, keep-alive connections. Requests are bytes that were built beforehand; an answer is read by its Content-Length into
a buffer that its connection keeps, and compared with the bytes that are due, whole: one pass of memcmp over them, and what differs there
is looked at as numbers, since kernels for several rows round elsewhere than those for one.

    closed    `concurrency` connections, each sends when its answer has come: what a server can do at most, or its latency at 1
    open      Poisson arrivals at `rate`, sent whether or not earlier ones are answered; latency counts from the moment at which a request
              was due, so a server that stalls is charged for everything that should have been sent meanwhile. That charges it for what this
              program is behind, too: `client_behind_p99_ms` says by how much

Shortly before an arrival is due the loop polls without sleeping, epoll's clock ticks in milliseconds.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HOST = "127.0.0.1"
CONNECTIONS = 512
"""At most this many requests are without an answer; those that fall due beyond are counted as "not sent"."""
HEAD = 16384
"""Bytes that a response may have beyond the answer."""
SPIN_S = 0.002
REFUSED = frozenset({"429", "503"})
"""Status codes of refusals. After the objective such an answer counts as a broken promise, not as a refusal."""
BROKEN = "broken"
"""Outcome of a request that was refused after its admission, if the server says so (`Exchange.broken`)."""


def same(due: bytes, came: bytes, dtype: str, *, spread: float = 0.002) -> bool:
    """Return whether two answers agree: 99 % of the labels, or scores within a share of their spread."""
    if len(came) != len(due):
        return False
    wanted, found = np.frombuffer(due, dtype), np.frombuffer(came, dtype)
    if dtype == "uint8":
        return bool((found == wanted).mean() >= 0.99)
    return bool(np.abs(found - wanted).max() <= spread * np.ptp(wanted))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Requests as they go over the wire, and for each the bytes that its answer's body must end with. `dtype`: of these bytes.

    `broken`: what is in the refusal of a request that had been admitted; None: the server does not tell such ones apart.
    """

    requests: tuple[bytes, ...]
    answers: tuple[bytes, ...]
    dtype: str
    broken: bytes | None = None

    def alike(self, which: int, came: bytes) -> bool:
        """Return whether an answer of other bytes agrees."""
        return same(self.answers[which], came, self.dtype)


@dataclass(slots=True, eq=False)
class _Connection:
    sock: socket.socket
    buffer: bytearray
    busy: bool = False  # a request is under way
    which: int = 0
    due: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    filled: int = 0
    end: int = -1  # of the response in the buffer, once its head has come
    status: str = ""


class Load:
    """Requests to one port and what became of them. Use as a context; each `closed` or `open` is a measurement of its own."""

    def __init__(self, port: int, exchange: Exchange) -> None:
        self._port, self._exchange = port, exchange
        self._size = HEAD + max(map(len, exchange.answers))
        self._poller = select.epoll()
        self._all: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._sent = 0
        self._done: list[tuple[float, float, str]] = []  # due, finished, status; the clock is time.perf_counter
        self._behind: list[tuple[float, float]] = []  # due, seconds after that it went out

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._all.values()):
            self._drop(connection)
        self._poller.close()

    def closed(self, *, concurrency: int, seconds: float, warm: float = 0.5) -> dict[str, Any]:
        """Throughput and latencies with always `concurrency` requests under way, over `seconds` after `warm` seconds."""
        with _quiet():
            self._reset()
            started = time.perf_counter()
            cpu: float | None = None
            for _ in range(concurrency):
                self._send(self._free(), time.perf_counter())
            while (now := time.perf_counter()) < started + warm + seconds:
                if cpu is None and now >= started + warm:
                    cpu = time.process_time()
                for connection in self._events(0.1):
                    if not self._done[-1][2].isdigit():  # a server that hangs up at once is not asked again in a tight loop
                        time.sleep(0.01)
                    self._send(connection or self._free(), time.perf_counter())
            used = time.process_time() - (cpu or 0)
            self._settle(1.0)
        begin, end = started + warm, started + warm + seconds
        row = _summary([d for d in self._done if begin <= d[1] < end], seconds, None)
        return {"load": "closed", "concurrency": concurrency, **row, "client_cpu": used / seconds}

    def open(
        self, *, rate: float, seconds: float, objective_ms: float, warm: float = 1.0, seed: int = 0, grace: float = 5.0
    ) -> dict[str, Any]:
        """Poisson arrivals, `rate` a second; judged are those due in the `seconds` after `warm`. The last have `grace` seconds."""
        generator = np.random.default_rng(seed)
        due = np.cumsum(generator.exponential(1 / rate, int((warm + seconds) * rate * 1.2 + 100)))
        due = due[due < warm + seconds]
        with _quiet():
            self._reset()
            cpu, started = time.process_time(), time.perf_counter() + 0.01
            moments: list[float] = (due + started).tolist()
            position = 0
            while position < len(moments):
                now = time.perf_counter()
                while position < len(moments) and moments[position] <= now:
                    self._arrive(moments[position])
                    position += 1
                ahead = moments[position] - time.perf_counter() if position < len(moments) else 0.0
                self._idle += [connection for connection in self._events(max(0.0, ahead - SPIN_S)) if connection]
            used = (time.process_time() - cpu) / (warm + seconds)
            self._settle(grace)
        begin = started + warm
        row = _summary([d for d in self._done if begin <= d[0] < begin + seconds], seconds, objective_ms)
        late = [after for moment, after in self._behind if begin <= moment < begin + seconds]
        behind = 1e3 * float(np.percentile(late, 99)) if late else None
        return {"load": "open", "rate": rate, **row, "client_cpu": used, "client_behind_p99_ms": behind}

    def _reset(self) -> None:
        for _ in self._events(0):  # servers hang up on connections that have been idle for some seconds
            pass
        self._done, self._behind = [], []

    def _arrive(self, due: float) -> None:
        if not self._idle and len(self._all) >= CONNECTIONS:
            self._done.append((due, due, "not sent"))
            return
        self._send(self._free(), due)
        self._behind.append((due, time.perf_counter() - due))

    def _free(self) -> _Connection:
        if self._idle:
            return self._idle.pop()
        sock = socket.create_connection((HOST, self._port), timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        connection = self._all[sock.fileno()] = _Connection(sock, bytearray(self._size))
        self._poller.register(sock, select.EPOLLIN)
        return connection

    def _send(self, connection: _Connection, due: float) -> None:
        connection.which = self._sent % len(self._exchange.requests)
        connection.due, connection.filled, connection.end, connection.busy = due, 0, -1, True
        connection.unsent = memoryview(self._exchange.requests[connection.which])
        self._sent += 1
        self._push(connection)
        if connection.unsent:
            self._poller.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)

    def _push(self, connection: _Connection) -> None:
        """Writes what the socket takes. That the other side has hung up shows when its answer is read."""
        try:
            connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        except (BlockingIOError, ConnectionError):
            return

    def _events(self, timeout: float) -> Iterator[_Connection | None]:
        """Reads and writes what can be; gives the connection of every request that has ended, None where it was closed."""
        for fd, mask in self._poller.poll(timeout):
            connection = self._all[fd]
            if mask & select.EPOLLOUT and connection.unsent:
                self._push(connection)
                if not connection.unsent:
                    self._poller.modify(connection.sock, select.EPOLLIN)
            if mask & ~select.EPOLLOUT and self._read(connection):
                yield connection if connection.sock.fileno() >= 0 else None

    def _read(self, connection: _Connection) -> bool:
        """Return whether this read ended a request."""
        try:
            count = connection.sock.recv_into(memoryview(connection.buffer)[connection.filled :])
        except BlockingIOError:
            return False
        except ConnectionError:
            count = 0
        if count == 0:
            return self._hung_up(connection)
        connection.filled += count
        if connection.end < 0 and not self._read_head(connection):
            return False
        if connection.filled < connection.end:
            return False
        self._done.append((connection.due, time.perf_counter(), self._judge(connection)))
        connection.busy = False
        if connection.unsent:  # answered before all was sent (too large, refused): the rest would be read as the next request
            self._drop(connection)
        return True

    def _hung_up(self, connection: _Connection) -> bool:
        if connection.busy:
            self._done.append((connection.due, time.perf_counter(), "closed"))
        self._drop(connection)
        return connection.busy

    def _read_head(self, connection: _Connection) -> bool:
        stop = connection.buffer.find(b"\r\n\r\n", 0, connection.filled)
        if stop < 0:
            return False
        head = bytes(connection.buffer[:stop]).lower()
        _, found, length = head.partition(b"\r\ncontent-length:")
        if not found:
            raise ValueError(f"a response without Content-Length: {head[:200]!r}")
        connection.end = stop + 4 + int(length.partition(b"\r\n")[0])
        connection.status = head[9:12].decode()
        if connection.end > len(connection.buffer):
            raise ValueError(f"a response of {connection.end} bytes where {self._size} are the most: {head[:200]!r}")
        return True

    def _judge(self, connection: _Connection) -> str:
        due, broken = self._exchange.answers[connection.which], self._exchange.broken
        if connection.status in REFUSED and broken is not None and connection.buffer.find(broken, 0, connection.end) >= 0:
            return BROKEN
        if connection.status != "200" or connection.buffer.endswith(due, 0, connection.end):
            return connection.status
        came = bytes(connection.buffer[max(0, connection.end - len(due)) : connection.end])
        return "200" if self._exchange.alike(connection.which, came) else "wrong"

    def _settle(self, grace: float) -> None:
        """Waits for what is under way; what does not come is counted as "unanswered"."""
        end = time.perf_counter() + grace
        while any(c.busy for c in self._all.values()) and time.perf_counter() < end:
            self._idle += [connection for connection in self._events(0.05) if connection]
        for connection in [c for c in self._all.values() if c.busy]:
            self._done.append((connection.due, time.perf_counter(), "unanswered"))
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if self._all.pop(connection.sock.fileno(), None):
            self._poller.unregister(connection.sock)
        if connection in self._idle:
            self._idle.remove(connection)
        connection.sock.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection while it is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summary(done: list[tuple[float, float, str]], seconds: float, objective_ms: float | None) -> dict[str, Any]:
    """Figures of finished requests. Shares: of all that were due, and of those that the server did not refuse at once: what it admitted and
    then gave up counts as admitted, where it says so."""
    latencies = np.array([(finished - due) * 1e3 for due, finished, status in done if status == "200"])
    row: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(done),
        "answers_per_s": len(latencies) / seconds,
        "failures": dict(Counter(status for _, _, status in done if status != "200")),
    }
    for name, percent in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99), ("p999_ms", 99.9), ("worst_ms", 100)):
        row[name] = float(np.percentile(latencies, percent)) if latencies.size else None
    if objective_ms is not None:
        inside = int((latencies <= objective_ms).sum())
        refusals = np.array([(finished - due) * 1e3 for due, finished, status in done if status in REFUSED])
        refused = int((refusals <= objective_ms).sum())
        row |= {
            "objective_ms": objective_ms,
            "refused": refused,
            "refused_p99_ms": float(np.percentile(refusals, 99)) if refusals.size else None,
            "goodput_per_s": inside / seconds,
            "inside_offered": inside / len(done) if done else None,
            "inside_admitted": inside / (len(done) - refused) if len(done) > refused else None,
        }
    return row
