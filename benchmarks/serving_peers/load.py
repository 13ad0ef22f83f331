"""A load generator for HTTP/1.1 on the loopback: one thread, one event loop, requests that are built beforehand.

A response is read by its Content-Length and compared with the expected bytes; where they differ, they are compared as numbers, since
kernels for several rows round otherwise than those for one.
    closed    `concurrency` connections, each sends when its response has come: a server's saturation, or its latency at 1
    open      Poisson arrivals at `rate`, sent whether or not earlier ones are answered. Latency counts from the moment at which a request
              was due, so a stall is charged for every request due meanwhile; `client_behind_p99_ms` says how late this program sends
Shortly before an arrival is due the loop polls without sleeping, because its clock ticks in milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
HOST = "127.0.0.1"
CONNECTIONS = 512  # at most; requests that are due beyond are counted as "not sent"
BUFFER = 1 << 20  # bytes of a response that a connection holds before it stops reading
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

    `dtype`, `spread`: how answers are compared, see `same`; batches are rounded otherwise than single rows. `others`: answers of further
    versions, each as right. `broken`: text in the refusal of a request that had been admitted; None: the server does not tell such ones
    apart.
    """

    requests: tuple[bytes, ...]
    answers: tuple[bytes, ...]
    dtype: str
    spread: float = 0.01
    others: tuple[tuple[bytes, ...], ...] = ()
    broken: bytes | None = None

    def alike(self, which: int, came: bytes) -> bool:
        """Return whether an answer of other bytes agrees."""
        return any(same(answers[which], came, self.dtype, spread=self.spread) for answers in (self.answers, *self.others))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection during a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Load:
    """Requests to one port and their outcomes. Use as a context; each `closed` or `open` is a measurement of its own."""

    def __init__(self, port: int, exchange: Exchange) -> None:
        self._port, self._exchange, self._sent = port, exchange, 0
        self._runner = asyncio.Runner()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._busy = 0  # requests under way
        self._done: list[tuple[float, float, str]] = []  # due, finished, outcome; the clock is time.perf_counter
        self._behind: list[tuple[float, float]] = []  # due, seconds after that it was sent

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for _, writer in self._idle:
            writer.close()
        self._runner.close()

    @_no_collection()
    def closed(self, *, concurrency: int, seconds: float, warm: float = 0.5) -> Row:
        """Throughput and latencies with always `concurrency` requests under way, over `seconds` after `warm` seconds."""
        begin, used = time.perf_counter() + warm, 0.0

        async def send_in_turn() -> None:
            while time.perf_counter() < begin + seconds:
                if not (await self._request(time.perf_counter())).isdigit():
                    await asyncio.sleep(0.01)  # a server that hangs up at once is not asked again in a tight loop

        async def run() -> None:
            nonlocal used
            tasks = {asyncio.create_task(send_in_turn()) for _ in range(concurrency)}
            await asyncio.sleep(begin - time.perf_counter())
            cpu = time.process_time()
            await asyncio.sleep(begin + seconds - time.perf_counter())
            used = time.process_time() - cpu
            await _settle(tasks, 1.0)

        self._run(run())
        row = figures([d for d in self._done if begin <= d[1] < begin + seconds], seconds)
        return {"load": "closed", "concurrency": concurrency, **row, "client_cpu": used / seconds}

    @_no_collection()
    def open(self, *, rate: float, seconds: float, objective_ms: float, warm: float = 1.0, seed: int = 0, grace: float = 5.0) -> Row:
        """Poisson arrivals, `rate` a second; judged are those due in the `seconds` after `warm`. The last have `grace` seconds."""
        generator = np.random.default_rng(seed)
        due = np.cumsum(generator.exponential(1 / rate, int((warm + seconds) * rate * 1.2 + 100)))
        started, used = time.perf_counter() + 0.01, 0.0
        begin, tasks = started + warm, set[asyncio.Task[str]]()

        async def run() -> None:
            nonlocal used
            cpu = time.process_time()
            for moment in (due[due < warm + seconds] + started).tolist():
                await asyncio.sleep(max(0.0, moment - SPIN_S - time.perf_counter()))
                while time.perf_counter() < moment:
                    await asyncio.sleep(0)
                if self._busy < CONNECTIONS:
                    tasks.add(asyncio.create_task(self._request(moment)))
                else:
                    self._done.append((moment, moment, "not sent"))
            used = (time.process_time() - cpu) / (warm + seconds)
            await _settle(tasks, grace)

        self._run(run())
        row = figures([d for d in self._done if begin <= d[0] < begin + seconds], seconds, objective_ms)
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

    def _run(self, measurement: Coroutine[Any, Any, None]) -> None:
        self._done, self._behind = [], []
        self._runner.run(measurement)

    async def _request(self, due: float) -> str:
        """Send the next request and return its outcome: the status, or a word. Raises OSError without a connection."""
        which = self._sent % len(self._exchange.requests)
        self._sent, self._busy = self._sent + 1, self._busy + 1
        while self._idle and self._idle[-1][0].at_eof():  # servers hang up on connections that have been idle for some seconds
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(HOST, self._port, limit=BUFFER)
        outcome = "unanswered"  # of a request that is cancelled
        try:
            writer.write(self._exchange.requests[which])
            self._behind.append((due, time.perf_counter() - due))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]))
            outcome = self._outcome(which, head[9:12].decode(), body)
        except (ConnectionError, asyncio.IncompleteReadError):
            outcome = "closed"
        finally:
            self._done.append((due, time.perf_counter(), outcome))
            self._busy -= 1
            if outcome in ("closed", "unanswered") or writer.transport.get_write_buffer_size():
                writer.transport.abort()  # of an answer that came before all was sent: the rest would be read as the next request
            else:
                self._idle.append((reader, writer))
        return outcome

    def _outcome(self, which: int, status: str, body: bytes) -> str:
        due, broken = self._exchange.answers[which], self._exchange.broken
        if status in REFUSED and broken is not None and broken in body:
            return BROKEN
        if status != "200" or body.endswith(due):
            return status
        return "200" if self._exchange.alike(which, body[-len(due) :]) else "wrong"


async def _settle(tasks: set[asyncio.Task[Any]], grace: float) -> None:
    """Wait for requests under way; those without a response in time are counted as "unanswered". Raises an error of any of them."""
    done, late = await asyncio.wait(tasks, timeout=grace) if tasks else (tasks, set())
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()


def figures(done: list[tuple[float, float, str]], seconds: float, objective_ms: float | None = None) -> Row:
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
