"""The gRPC server: the same service as over HTTP, on the same event loop, for `tritonclient.grpc` and `perf_analyzer -i grpc`.

Requests are bounded before they are parsed: grpc limits the bytes of a message, `wire` the memory that protobuf needs for them, and `Calls`
the messages in work.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from muntin.serving.grpc.calls import Calls
from muntin.serving.grpc.health import MAX_CHECKS, MAX_WATCHES, Health
from muntin.serving.grpc.servicer import ENVELOPE_BYTES, MAX_MESSAGE_BYTES, Servicer
from muntin.serving.inference.service import Service
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.grpc_codec import SERVICE
from muntin.serving.protocol.messages import Limits
from muntin.serving.security.bearer_tokens import Tokens
from muntin.serving.security.tls import Certificate
from muntin.serving.telemetry.access_log import AccessLog
from muntin.serving.telemetry.notify import Notify, tell_nobody
from muntin.serving.telemetry.tracing import Tracing
from muntin.serving.versions.control import Control

_CUT_MARGIN_S = 0.05
"""Calls cancelled so many seconds before the end of the drain time count as cut off."""
_POLL_S = 0.2
"""Interval between checks that grpc's server runs, seconds."""
_GRACE_S = 5.0
"""Seconds for the calls of a server that ended by itself."""
_HANDSHAKE_S = 10.0
"""Seconds for a TLS handshake and HTTP/2's first frame, and for the answer to a keepalive ping."""
_RETRY_S = 1.0
"""Interval between two tries to listen again, seconds."""
_MOST_ENDING = 3
"""Ended servers whose calls go on beside the present one; another restart waits for one of them, at most `_GRACE_S`."""


class GrpcServer:
    """Serves on addresses ("127.0.0.1:8001"; port 0: any free one, see `port`). `ledger`: shared with the HTTP server."""

    def __init__(
        self,
        service: Service,
        control: Control,
        *,
        limits: Limits,
        tokens: tuple[str, ...],
        log: AccessLog | None,
        ledger: MemoryBudget,
        tls: Certificate | None = None,
        tracing: Tracing | None = None,
        notify: Notify = tell_nobody,
    ) -> None:
        self._bounds, self._limits, self._tls, self._notify = ledger.bounds, limits, tls, notify
        self._stopping = asyncio.Event()
        self._calls = Calls(ledger, Tokens(tokens), log)
        servicer = Servicer(service, control, self._calls, limits=limits, tracing=tracing, stopping=self._stopping)
        health = Health(lambda: service.ready, (service.name, SERVICE), self._calls, limits, self._stopping)
        self._handlers = servicer.handlers(), health.handlers()
        self._server = self._create()
        self._addresses: list[str] = []
        self._supervising: asyncio.Task[None] | None = None
        self._ending: list[asyncio.Task[None]] = []
        """Ended servers whose calls go on."""
        self._restarts = 0
        service.metrics.count("muntin_grpc_restarts", "Times that grpc's server ended by itself.", lambda: self._restarts)
        self._stop: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self, *addresses: str) -> None:
        """Listen. Port 0: the same free one for all. Raises OSError if it cannot listen on an address."""
        self._calls.accepts_ipv6 = any(address.startswith("[") for address in addresses)
        await self._listen(addresses)
        self._addresses = [f"{address.rpartition(':')[0]}:{self.port}" for address in addresses]
        self._supervising = asyncio.create_task(self._supervise())

    def _create(self) -> grpc.aio.Server:
        bounds = self._bounds
        server = grpc.aio.server(
            maximum_concurrent_rpcs=2 * bounds.connections + MAX_CHECKS + MAX_WATCHES,
            options=[
                ("grpc.max_receive_message_length", min(self._limits.body_bytes + ENVELOPE_BYTES, MAX_MESSAGE_BYTES)),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.server_handshake_timeout_ms", _milliseconds(_HANDSHAKE_S)),  # of TLS, and of HTTP/2's first frame
                ("grpc.max_connection_idle_ms", _milliseconds(bounds.idle_seconds)),  # without a call; grpc does not limit their number
                ("grpc.keepalive_time_ms", _milliseconds(bounds.body_seconds)),  # ends the calls of peers that are gone
                ("grpc.keepalive_timeout_ms", _milliseconds(_HANDSHAKE_S)),
            ],
        )
        server.add_generic_rpc_handlers(self._handlers)
        return server

    async def _listen(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            chosen = f"{address.removesuffix(':0')}:{self.port}" if address.endswith(":0") else address
            try:
                if self._tls is None:
                    self.port = self._server.add_insecure_port(chosen)
                else:
                    self.port = self._server.add_secure_port(chosen, _credentials(self._tls))
            except RuntimeError as error:
                raise OSError(None, f"cannot listen on it ({error})", chosen) from error
        await self._server.start()

    async def _supervise(self) -> None:
        """Start another server when grpc's ends by itself: grpcio 1.85 does at a call whose path is not UTF-8, before any handler runs.

        A peer can send such calls without end: at most `_MOST_ENDING` ended servers are kept, and so many restarts are made in `_GRACE_S`.
        """
        while True:
            try:
                # Raises what ended it only with a time limit; without one it waits for the calls in progress, which may never end.
                if await self._server.wait_for_termination(_POLL_S):
                    continue
                reason = "no reason given"
            except UnicodeDecodeError as error:
                reason = f"{type(error).__name__}: {error}"
            self._restarts += 1
            self._notify(f"grpc's server ended ({reason}), and is begun again")
            self._ending.append(asyncio.create_task(self._server.stop(_GRACE_S)))
            if len(self._ending) > _MOST_ENDING:
                await asyncio.wait(self._ending, return_when=asyncio.FIRST_COMPLETED)
            self._ending = [task for task in self._ending if not task.done()]
            while not await self._restarted():
                await asyncio.sleep(_RETRY_S)

    async def _restarted(self) -> bool:
        self._server = self._create()
        try:
            await self._listen(self._addresses)
        except OSError as error:
            self._notify(f"gRPC: {error}; it is tried again in {_RETRY_S:g} s")
            return False
        return True

    def begin_stop(self, seconds: float) -> asyncio.Task[None]:
        """Take no new calls, and give those in progress so many seconds from the first call of this method.

        Requests of a stream that have arrived are answered, then the stream ends.
        """
        if self._stop is None:
            self._calls.cut_at = time.monotonic() + seconds - _CUT_MARGIN_S
            if self._supervising is not None:
                self._supervising.cancel()
            self._stop = asyncio.create_task(self._server.stop(seconds))
            self._stopping.set()
        return self._stop

    async def stop(self, left: Callable[[], float]) -> int:
        """Call `begin_stop`, and cut off calls in progress once no time is left. Returns the number of those cut off.

        `left`: returns the seconds left for them.
        """
        stopping = self.begin_stop(left())
        while not stopping.done() and left() > 0:
            await asyncio.wait((stopping,), timeout=_POLL_S)
        if not stopping.done():
            self._calls.cut_at = min(self._calls.cut_at, time.monotonic())
            await self._server.stop(0)
        await asyncio.gather(stopping, *self._ending, return_exceptions=True)
        return self._calls.cut_off


def _milliseconds(seconds: float) -> int:
    return math.ceil(1e3 * seconds)


def _credentials(tls: Certificate) -> grpc.ServerCredentials:
    """Return credentials that present the current certificate to each new connection."""
    shown = tls.pem

    def renewed() -> Any:
        nonlocal shown
        if shown is tls.pem:
            return None
        shown = tls.pem
        return grpc.ssl_server_certificate_configuration([shown])

    return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([shown]), renewed)
