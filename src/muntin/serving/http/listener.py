"""Runs the application under granian (Rust, hyper), embedded in this process's event loop.

granian calls its embedding experimental, so nothing else imports it. It parses HTTP/1.1, limits headers (400 KiB) and their time, leaves
connections beyond the limit in the system's queue, and speaks TLS. The application limits bodies (`bodies`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.server.embed import Server

from muntin.errors import DataError
from muntin.serving.security.tls import Certificate

BACKLOG = 1024
"""Length of the system's queue of connections."""
SPARE = 32
"""Connections beyond `Bounds.connections`, for health checks; other requests are refused."""
_LISTENS_S, _POLL_S = 10.0, 0.01
_RENEWED_S = 0.1
"""Seconds for which both the old and the new certificate are presented."""
_ENDS_S = 1.0
"""Seconds for granian's end once all requests are answered or cut off: a client that reads nothing keeps its connection open."""


class HttpListener:
    """Listens on `addresses` at one port. `connections`: maximum number. `idle_seconds`: maximum time of a connection without complete
    headers, also between two requests. `tls`: None for plain HTTP."""

    def __init__(
        self,
        app: Callable[..., Any],
        addresses: Sequence[str],
        port: int,
        *,
        connections: int,
        idle_seconds: float,
        tls: Certificate | None,
    ) -> None:
        self._addresses, self._port, self._tls = addresses, port, tls
        self._servers: list[Any] = [  # granian does not type `stop` and `reload`
            self._server(app, address, port, connections, idle_seconds) for address in addresses
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def _server(self, app: Callable[..., Any], address: str, port: int, connections: int, idle_seconds: float) -> Server:
        certificate, key = (None, None) if self._tls is None else self._tls.files
        server = Server(
            app,
            address=address,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=math.ceil(1e3 * idle_seconds)),
            websockets=False,
            backlog=BACKLOG,
            backpressure=connections + SPARE,
            ssl_cert=certificate,
            ssl_key=key,
            ssl_protocol_min=SSLProtocols.tls12,
            log_enabled=False,
        )
        server.respawn_interval = _RENEWED_S
        return server

    async def start(self) -> None:
        """Return once every address accepts connections. Raises DataError if one does not."""
        self._tasks = [asyncio.create_task(server.serve()) for server in self._servers]
        await asyncio.sleep(0)  # each binds its port now, or its task ends
        for address, task in zip(self._addresses, self._tasks, strict=True):
            await self._until_listening(address, task)

    async def _until_listening(self, address: str, task: asyncio.Task[None]) -> None:
        deadline = asyncio.get_running_loop().time() + _LISTENS_S
        while True:
            if task.done():
                reason = str(task.exception()).partition("\n")[0]  # granian adds a stack trace
                raise DataError(f"cannot listen on {address}:{self._port} ({reason}): choose another --http-port or --host")
            try:
                _, writer = await asyncio.open_connection(address, self._port)
            except OSError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise DataError(f"cannot listen on {address}:{self._port} ({error}): choose another --http-port or --host") from error
                await asyncio.sleep(_POLL_S)
            else:
                writer.close()
                return

    def renew(self) -> None:
        """Present the current certificate of `tls` to new connections. Open ones keep the old one and are closed when idle."""
        assert self._tls is not None
        certificate, key = self._tls.files
        for server in self._servers:
            server.build_ssl_context(certificate, key, None, SSLProtocols.tls12, None, [], False)
            server.reload()

    async def stop(self, in_flight: Callable[[], int], cut: Callable[[], int], left: Callable[[], float]) -> int:
        """Accept nothing new, let requests in flight end, and return the number of those cut off.

        `in_flight`: returns their number. `left`: returns the seconds left for them. `cut`: ends them and returns their number.
        """
        for server in self._servers:
            server.stop()
        while in_flight() and left() > 0 and not all(task.done() for task in self._tasks):
            await asyncio.wait(self._tasks, timeout=min(_POLL_S, left()), return_when=asyncio.FIRST_COMPLETED)
        count = cut()
        _, unfinished = await asyncio.wait(self._tasks, timeout=_ENDS_S)
        for task in unfinished:
            task.cancel()
        return count
