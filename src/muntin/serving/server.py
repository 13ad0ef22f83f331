"""`muntin serve`: starts the parts of a server, and ends them in the opposite order.

    start            check the ports -> load the first version -> listen on HTTP and gRPC -> watch the directory
    SIGTERM, Ctrl-C  while loading: end the load and the server
                     while serving: not ready, no new requests, end loads -> answer requests in flight -> pictures, runner, slot

One event loop serves HTTP and gRPC. Batches are computed by processes or threads of their own.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from muntin.artifact.store import such_as
from muntin.errors import ArtifactError, DataError, MuntinError
from muntin.runtime.host.loopback import is_loopback
from muntin.serving.assembly import assemble, make_slot
from muntin.serving.config import ServeConfig
from muntin.serving.grpc.server import GrpcServer
from muntin.serving.http.app import HttpApp
from muntin.serving.http.listener import HttpListener
from muntin.serving.inference.service import Service
from muntin.serving.open_files import raise_descriptors
from muntin.serving.ports import check_ports
from muntin.serving.security.tls import Certificate
from muntin.serving.shutdown import Shutdown, on_signals
from muntin.serving.telemetry.notify import Notify, tell_nobody, told_safely
from muntin.serving.telemetry.tracing import Tracing
from muntin.serving.versions.repository import Repository, Watcher

RENEW_S = 10.0
"""Interval at which the files of a certificate are checked, seconds."""
WATCHER_ENDS_S = 5.0
"""Seconds for the end of the thread that watches the directory."""
SETTLE_S = 5.0
"""Interval at which versions whose time is over are unloaded, seconds. Requests do so, too."""


class Server:
    """One artefact, or a directory of numbered versions of one, behind HTTP and gRPC.

    `notify`: called with a line for every version that is loaded or unloaded, sometimes on the thread that answers requests: it must not
    block. `run` serves on the calling thread until it is stopped; `start` and `stop`, or a `with` block, on another thread. Raises what
    loading the first version raises, and DataError for an address that it cannot listen on.
    """

    def __init__(self, path: str | Path, config: ServeConfig, *, notify: Notify = tell_nobody) -> None:
        self.config, self._notify = config, told_safely(notify)
        self._repository = Repository(path)
        self.http_port, self.grpc_port = config.http_port, config.grpc_port
        """Ports that it listens on, once it does."""
        self._shutdown = Shutdown(config.drain_seconds)
        self._up = threading.Event()
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.cut_off = 0
        """Number of requests and calls that were cut off after `drain_seconds`; valid when the server has ended."""
        self.slot = make_slot(path, config, notify=self._notify)
        self._watcher: Watcher | None = None
        if config.watch:
            self._watcher = Watcher(self._repository, self.slot, notify=self._notify, interval_s=config.watch_seconds)

    # ---- called from outside ----

    @property
    def hurried(self) -> bool:
        """True if Ctrl-C was pressed twice, so that nothing in flight was waited for."""
        return self._shutdown.hurried

    def run(self, *, up: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM, Ctrl-C or `stop`. `up` is called once the server listens."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner, on_signals(runner.get_loop(), self._end):
            runner.run(self._serve(up))

    def start(self) -> None:
        """Serve on a thread of its own; return once the server listens."""
        self._thread = threading.Thread(target=self._run_apart, name="muntin-server", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._failed is not None:
            self._thread.join()
            raise self._failed

    def stop(self) -> None:
        """End the server as SIGTERM does, and wait until it has ended."""
        self._end()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _run_apart(self) -> None:
        try:
            self.run(up=self._up.set)
        except BaseException as error:  # noqa: BLE001 - `start` raises it
            self._failed = error
        finally:
            self._up.set()

    def _end(self, by_interrupt: bool = False) -> None:
        """Begin to shut down, from any thread. A second Ctrl-C ends requests in flight."""
        self._shutdown.request(again=by_interrupt)
        self.slot.end_loads()

    # ---- inside the event loop ----

    async def _serve(self, up: Callable[[], None]) -> None:
        """Start the parts, and end them in the opposite order, also after an error."""
        self._shutdown.bind(asyncio.get_running_loop())
        async with AsyncExitStack() as ending:
            ending.callback(self.slot.close)
            ports = check_ports(self.config.host, self.config.http_port, self.config.grpc_port)
            certificate, key = self.config.tls_certificate, self.config.tls_key
            tls = None if certificate is None or key is None else Certificate(certificate, key)
            tracing = Tracing() if self.config.trace else None
            if tracing is not None:
                ending.push_async_callback(asyncio.to_thread, tracing.close)
            await asyncio.to_thread(self._load_first)
            if not self._shutdown.requested:
                await self._answer(up, ending, ports, tls, tracing)

    async def _answer(
        self, up: Callable[[], None], ending: AsyncExitStack, ports: tuple[list[str], int], tls: Certificate | None, tracing: Tracing | None
    ) -> None:
        config, shutdown = self.config, self._shutdown
        addresses, http_port = ports
        local = not config.tokens and all(map(is_loopback, addresses))
        parts = assemble(
            self.slot,
            self._repository,
            config,
            ending=ending,
            left=lambda: shutdown.left,
            notify=self._notify,
            tracing=tracing,
            local=local,
        )
        service, app = parts.service, parts.app
        if self._watcher is not None:
            ending.push_async_callback(asyncio.to_thread, self._watcher.stop, WATCHER_ENDS_S)  # a network folder may hang
        grpc_face: GrpcServer | None = None
        if config.grpc_port is not None:
            grpc_face = GrpcServer(
                service, parts.control, limits=parts.limits, tokens=config.tokens, log=parts.log, ledger=parts.budget, tls=tls,
                tracing=tracing, notify=self._notify,
            )  # fmt: skip
            ending.push_async_callback(self._end_grpc, grpc_face)
            await self._listen_grpc(grpc_face, addresses)
        http = HttpListener(
            app, addresses, http_port, connections=config.bounds.connections, idle_seconds=config.bounds.idle_seconds, tls=tls,
        )  # fmt: skip
        ending.push_async_callback(self._end_http, http, app)
        await http.start()
        self.http_port = http_port
        ending.callback(partial(self._go_down, service, grpc_face))
        if tls is not None:
            ending.callback(asyncio.create_task(self._renew(tls, http)).cancel)
        ending.callback(asyncio.create_task(self._settle()).cancel)
        if self._watcher is not None:
            self._watcher.start()
        gc.collect()
        gc.freeze()  # later collections need not visit the objects of the start
        ending.callback(gc.unfreeze)
        if not (local or config.tokens):
            control = "and load and unload versions" if config.open_control else "load and unload are off"
            self._notify(f"{config.host}: no tokens (--token-file): all who reach this address may ask for answers, {control}")
        if not shutdown.requested:
            up()
        await shutdown.wait()

    def _load_first(self) -> None:
        """Load the newest version; with `watch` an older one if that fails. Returns without one if the server is to end."""
        versions = self._repository.scan()
        if not versions:
            if not self.config.watch:
                path = self._repository.path
                raise ArtifactError(f"{path}: neither an artefact nor a directory of numbered ones: name one{such_as(path)}")
            self._notify(f"{self._repository.path}: no version yet; the first that comes is served")
        if self._watcher is not None:
            self._watcher.step()
            return
        name, path = next(reversed(versions.items()))
        try:
            self.slot.load(path, name)
        except MuntinError:
            if not self._shutdown.requested:
                raise

    async def _listen_grpc(self, face: GrpcServer, addresses: list[str]) -> None:
        host, port = self.config.host, self.config.grpc_port
        try:
            await face.start(*(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses))
        except OSError as error:
            taken = ", which is --http-port's" if port and port == self.config.http_port else ""
            raise DataError(f"cannot listen on {host}:{port}{taken} for gRPC: choose another --grpc-port or --host") from error
        self.grpc_port = face.port

    # ---- going down ----

    def _go_down(self, service: Service, grpc_face: GrpcServer | None) -> None:
        """Admit no new request and no version. Requests in flight have `drain_seconds` from now on."""
        self._shutdown.begin()
        service.draining = True
        self.slot.end_loads()
        if grpc_face is not None:
            grpc_face.begin_stop(self.config.drain_seconds)

    async def _end_http(self, http: HttpListener, app: HttpApp) -> None:
        self.cut_off += await http.stop(lambda: app.in_flight, app.cut, lambda: self._shutdown.left)

    async def _end_grpc(self, face: GrpcServer) -> None:
        self.cut_off += await face.stop(lambda: self._shutdown.left)

    # ---- beside the requests ----

    async def _renew(self, certificate: Certificate, http: HttpListener) -> None:
        """Load the certificate again whenever its files have changed."""
        while True:
            await asyncio.sleep(RENEW_S)
            if not await asyncio.to_thread(certificate.changed):
                continue
            try:
                certificate.load()
                http.renew()
                line = "the TLS certificate was renewed"
            except DataError as error:
                line = f"{error}; the one before is still shown"
            await asyncio.to_thread(self._notify, line)

    async def _settle(self) -> None:
        """Unload versions whose time is over, also without requests."""
        while True:
            await asyncio.sleep(SETTLE_S)
            await asyncio.to_thread(self.slot.settle)


def serve(path: str | Path, *, notify: Notify = tell_nobody, **settings: Any) -> int:
    """Serve an artefact, or a directory of numbered versions of one, over HTTP and gRPC until SIGTERM or Ctrl-C: `muntin serve` in Python.

    `settings`: the fields of `ServeConfig`. `notify`: as of `Server`. Blocks the calling thread, which must be the main one to receive
    signals; elsewhere use a `Server`. First it verifies and compiles the first version, which takes seconds. Returns the number of requests
    and calls that were cut off after `drain_seconds`.

    Raises DataError for an unknown setting or one out of its range, and whatever `Server` raises. Needs the extra `serve`.
    """
    try:
        config = ServeConfig(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        # Not `from error`: its text contains the values, also tokens.
        raise DataError(f"serve: {where}: {what}" if where else f"serve: {what}") from None
    if lack := raise_descriptors(config):
        notify(lack)
    server = Server(path, config, notify=notify)
    server.run()
    return server.cut_off


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:  # not available for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
