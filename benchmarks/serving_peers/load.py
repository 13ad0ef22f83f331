"""A load generator for HTTP/1.1 on the loopback, light enough to leave its core idle most of the time: one thread, one epoll.

Requests are bytes built beforehand. A response is read by its Content-Length into its connection's buffer and compared with the expected
bytes; where they differ, they are compared as numbers, since kernels for several rows round otherwise than those for one.
    closed    `concurrency` connections, each sends when its response has come: a server's saturation, or its latency at 1
    open      Poisson arrivals at `rate`, sent whether or not earlier ones are answered. Latency counts from the moment at which a request
              was due, so a stall is charged for every request due meanwhile; `client_behind_p99_ms` says how late this program sends
Shortly before an arrival is due the loop polls without sleeping, because epoll's clock ticks in milliseconds.
"""

from __future__ import annotations

import gc
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, Any]
HOST = "127.0.0.1"
CONNECTIONS = 512  # at most; requests that are due beyond are counted as "not sent"
HEAD = 16384  # bytes that a response may have beyond the answer
SPIN_S = 0.002
REFUSED = frozenset({"429", "503"})
"""Status codes of refusals. After the objective such a response counts as a broken promise, not as a refusal."""
BROKEN = "broken"
"""Outcome of a request that was refused after its admission, if the server says so (`Exchange.broken`)."""


def same(due: bytes, came: bytes, dtype: str, *, spread: float) -> bool:
    """Return whether two answers agree: 99 % of the labels, or scores within a share of their spread."""
    if len(came) != len(due):
        return False
    expected, received = np.frombuffer(due, dtype), np.frombuffer(came, dtype)
    if dtype == "uint8":
        return bool((received == expected).mean() >= 0.99)
    return bool(np.abs(received - expected).max() <= spread * np.ptp(expected))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Requests as they go over the wire, and the bytes with which the body of each one's response must end.

    `dtype`, `spread`: how answers are compared, see `same`. `others`: answers of further versions, each as right. `broken`: text in the
    refusal of a request that had been admitted; None: the server does not tell such ones apart.
    """

    requests: tuple[bytes, ...]
    answers: tuple[bytes, ...]
    dtype: str
    spread: float = 0.002
    others: tuple[tuple[bytes, ...], ...] = ()
    broken: bytes | None = None

    def alike(self, which: int, came: bytes) -> bool:
        """Return whether an answer of other bytes agrees."""
        return any(same(answers[which], came, self.dtype, spread=self.spread) for answers in (self.answers, *self.others))


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
    """Requests to one port and their outcomes. Use as a context; each `closed` or `open` is a measurement of its own."""

    def __init__(self, port: int, exchange: Exchange) -> None:
        self._port, self._exchange = port, exchange
        self._size = HEAD + max(map(len, exchange.answers))
        self._poller = select.epoll()
        self._all: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._sent = 0
        self._done: list[tuple[float, float, str]] = []  # due, finished, status; the clock is time.perf_counter
        self._behind: list[tuple[float, float]] = []  # due, seconds after that it was sent

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._all.values()):
            self._drop(connection)
        self._poller.close()

    def closed(self, *, concurrency: int, seconds: float, warm: float = 0.5) -> Row:
        """Throughput and latencies with always `concurrency` requests under way, over `seconds` after `warm` seconds."""
        with _no_collection():
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

    def open(self, *, rate: float, seconds: float, objective_ms: float, warm: float = 1.0, seed: int = 0, grace: float = 5.0) -> Row:
        """Poisson arrivals, `rate` a second; judged are those due in the `seconds` after `warm`. The last have `grace` seconds."""
        generator = np.random.default_rng(seed)
        due = np.cumsum(generator.exponential(1 / rate, int((warm + seconds) * rate * 1.2 + 100)))
        due = due[due < warm + seconds]
        with _no_collection():
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

    def open_until(self, work: Callable[[threading.Event], Any], **arrivals: Any) -> tuple[Any, list[Row]]:
        """Poisson loads in a row until `work`, in a thread, has ended: what it returned, and the loads. `work` is given an event, which is
        set when a load fails. The thread is not waited for then: its requests fail when the server ends."""
        stop, pool = threading.Event(), ThreadPoolExecutor(1)
        parts: list[Row] = []
        working = pool.submit(work, stop)
        try:
            while not working.done() or not parts:
                parts.append(self.open(**arrivals, warm=0.0, seed=len(parts) + 1))
        finally:
            stop.set()
            pool.shutdown(wait=False)
        return working.result(), parts

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
        """Write what the socket takes. A closed connection shows when its response is read."""
        with suppress(BlockingIOError, ConnectionError):
            connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]

    def _events(self, timeout: float) -> Iterator[_Connection | None]:
        """Read and write what is possible; yields the connection of every request that has ended, None where it was closed."""
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
            if connection.busy:
                self._done.append((connection.due, time.perf_counter(), "closed"))
            self._drop(connection)
            return connection.busy
        connection.filled += count
        if (connection.end < 0 and not self._read_head(connection)) or connection.filled < connection.end:
            return False
        self._done.append((connection.due, time.perf_counter(), self._outcome(connection)))
        connection.busy = False
        if connection.unsent:  # answered before all was sent (too large, refused): the rest would be read as the next request
            self._drop(connection)
        return True

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

    def _outcome(self, connection: _Connection) -> str:
        due, broken = self._exchange.answers[connection.which], self._exchange.broken
        if connection.status in REFUSED and broken is not None and connection.buffer.find(broken, 0, connection.end) >= 0:
            return BROKEN
        if connection.status != "200" or connection.buffer.endswith(due, 0, connection.end):
            return connection.status
        came = bytes(connection.buffer[max(0, connection.end - len(due)) : connection.end])
        return "200" if self._exchange.alike(connection.which, came) else "wrong"

    def _settle(self, grace: float) -> None:
        """Wait for requests under way; those without a response in time are counted as "unanswered"."""
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
def _no_collection() -> Iterator[None]:
    """No garbage collection during a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summary(done: list[tuple[float, float, str]], seconds: float, objective_ms: float | None) -> Row:
    """Figures of finished requests. Shares inside the objective: of all that were due (`offered`), and without those refused at once
    (`admitted`); a request that the server admitted and then gave up counts as admitted, where it says so."""
    latencies = np.array([(finished - due) * 1e3 for due, finished, status in done if status == "200"])
    row: Row = {"seconds": seconds, "requests": len(done), "answers_per_s": len(latencies) / seconds}
    row["failures"] = dict(Counter(status for _, _, status in done if status != "200"))
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


def together(parts: Sequence[Row]) -> Row:
    """Sum of several loads with one objective. `later`: answers beyond it; times are the longest ones, None without answers."""
    failures: Counter[str] = Counter()
    for part in parts:
        failures.update(part["failures"])
    requests = sum(part["requests"] for part in parts)
    inside = sum(round(part["goodput_per_s"] * part["seconds"]) for part in parts)
    longest = {name: max((part[name] for part in parts if part[name] is not None), default=None) for name in ("p99_ms", "worst_ms")}
    return {"requests": requests, "failures": dict(failures), "later": requests - sum(failures.values()) - inside, **longest}
