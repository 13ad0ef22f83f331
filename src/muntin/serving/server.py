"""`muntin serve`: the parts put together, from a directory to a port, and taken down again in order.

    start           are the ports free? -> the first version is loaded -> HTTP and gRPC listen -> others are watched for
    SIGTERM, Ctrl-C before it listens: the load ends, and all of it
                    not ready, nobody new, loads end -> what is in flight over HTTP and gRPC is answered -> slot, pictures, runner

One event loop answers for both faces, and batches are computed on the runner's threads, which hold the interpreter's lock for
microseconds: an engine computes without it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import math
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from pydantic import ValidationError

from muntin.errors import ArtifactError, DataError, MuntinError
from muntin.runtime.memory import resident_of
from muntin.runtime.session import Session
from muntin.serving.access_log import AccessLog
from muntin.serving.batcher import Batcher
from muntin.serving.certificate import Certificate
from muntin.serving.compiler import BUDGET, Compiler
from muntin.serving.config import ServeConfig
from muntin.serving.connection import Receiver, check_uvicorn
from muntin.serving.control import Control
from muntin.serving.descriptors import raise_descriptors
from muntin.serving.executor import Executor
from muntin.serving.grpc import GrpcFace
from muntin.serving.http import HttpFace
from muntin.serving.latency import LatencyModel
from muntin.serving.ledger import Ledger
from muntin.serving.metrics import Metrics
from muntin.serving.origin import is_loopback
from muntin.serving.pictures import Pictures
from muntin.serving.probation import ArtifactLoader
from muntin.serving.protocol import Limits
from muntin.serving.repository import Repository, Watcher
from muntin.serving.runner import Runner
from muntin.serving.scheduling import Demand, take_short_turns
from muntin.serving.service import Service
from muntin.serving.slot import Slot
from muntin.serving.telling import Notify, tell_nobody, told_safely
from muntin.serving.tracing import Tracing
from muntin.serving.version import NotReadyError

_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""What a system says of an address that a name has, and the machine has not."""
RENEW_S = 10.0
"""Between two looks at the files of a certificate."""
END_S = 5.0
"""That the threads which look at the directory have at the end."""
_HURRY_S = 0.1
"""Between two looks at whether it was told twice to end."""
SETTLE_S = 5.0
"""Between two looks at what time has ended, as that of the version before: every request looks, but there may be none."""
MARGIN_S, MARGIN_SHARE = 0.001, 0.05
"""Seconds of an objective, or a share of it, that reading a request and writing its answer may take: 0.6 to 0.9 ms at 512 x 512."""


def largest_request(config: ServeConfig, channels: int) -> int:
    """Pixels of all images of the largest request that is taken: as many as its bytes or its rows allow."""
    return min(config.bounds.body_bytes // channels, config.max_batch * config.bounds.image_pixels)


class Server:
    """One artefact, or a directory of numbered versions of one, behind HTTP and gRPC.

    `path`: the artefact, or the directory. `notify` is told in a line of every version that comes or goes and why, now and then on the
    thread that answers requests: where it may have to wait, give a `Teller`. `run` serves on the calling thread until it is told to stop;
    `start` and `stop`, or a `with` block, do so on a thread of its own. Raises what loading the first version raises, DataError for an
    address that cannot be had, DependencyError for a uvicorn that it cannot build on.
    """

    def __init__(self, path: str | Path, config: ServeConfig, *, notify: Notify = tell_nobody) -> None:
        check_uvicorn()
        self.config, self._notify = config, told_safely(notify)
        self._repository = Repository(path)
        self.http_port, self.grpc_port = config.http_port, config.grpc_port
        """Where it listens, once it does."""
        self._up = threading.Event()
        self._ending = False
        """It was told to stop."""
        self._failed: BaseException | None = None
        self._served = False
        """HTTP has ended."""
        self.hurried = False
        """Whether it was told twice, by Ctrl-C, to end, and nothing in flight is waited for."""
        self._drained_at: float | None = None
        """Until when what is in flight has time, of `time.monotonic`, once it goes down."""
        self._http: _Http | None = None
        self._grpc: GrpcFace | None = None
        self._thread: threading.Thread | None = None
        self._runner: Runner | None = None
        opening = config.session_options
        self._compiler = Compiler(opening, budget=self._budget, demand=self._demand)
        loader = ArtifactLoader(opening=opening, max_batch=config.max_batch, budget=self._budget, demand=self._demand)
        self.slot = Slot(config.name or _name_of(Path(path)), loader, rollout=config.rollout, notify=self._notify)
        self._watcher: Watcher | None = None
        if config.watch:
            self._watcher = Watcher(self._repository, self.slot, notify=self._notify, interval_s=config.watch_seconds)

    # ---- from outside ----

    @property
    def cut_off(self) -> int:
        """Connections and calls that were still busy when `drain_seconds` were over, and were cut off. To be asked when it has ended."""
        return (0 if self._http is None else self._http.cut_off) + (0 if self._grpc is None else self._grpc.cut_off)

    def run(self, *, up: Callable[[], None] = lambda: None) -> None:
        """Serves until SIGTERM, Ctrl-C or `stop`, which end it before it listens, too. `up` is called once it listens."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            loop = runner.get_loop()
            # In a handler nothing may be waited for: whoever it interrupts may hold the slot's lock.
            with _on_signals(
                lambda number: loop.call_soon_threadsafe(partial(self._tell_to_end, again=self._served and number == signal.SIGINT))
            ):
                runner.run(self._serve(up))

    def start(self) -> None:
        """Serves on a thread of its own; returns once it listens."""
        self._thread = threading.Thread(target=self._run_apart, name="muntin-server", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._failed is not None:
            self._thread.join()
            raise self._failed

    def stop(self) -> None:
        """Ends it as SIGTERM does, and waits until it has ended."""
        self._tell_to_end()
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

    # ---- inside ----

    def _tell_to_end(self, *, again: bool = False) -> None:
        """From uvicorn's start on that is its business; it raises the signals that stopped it once more when it has ended, to no effect.
        `again`: by Ctrl-C, after that: nothing in flight is waited for."""
        self._ending = True
        self.hurried = self.hurried or again
        if self._http is None:
            self.slot.close()  # which ends a load
        else:
            self._http.should_exit = True

    def _demand(self) -> Demand:
        if self._runner is None or not self.slot.busy:
            return Demand.NONE
        return Demand.WAITING if self._runner.waiting else Demand.SERVED

    def _budget(self, channels: int) -> float:
        """Pixels, of the sizes that a version is compiled for beside those of its start."""
        return BUDGET * largest_request(self.config, channels)

    async def _serve(self, up: Callable[[], None]) -> None:
        """What is made is ended in the opposite order, whatever of it there is when something fails."""
        async with AsyncExitStack() as ending:
            ending.push_async_callback(asyncio.to_thread, self._compiler.close)
            addresses = self._look_at_ports()
            certificate, key = self.config.tls_certificate, self.config.tls_key
            tls = None if certificate is None or key is None else Certificate(certificate, key)  # before a model is loaded in vain
            tracing = Tracing() if self.config.trace else None  # likewise
            if tracing is not None:
                ending.push_async_callback(asyncio.to_thread, tracing.close)
            await asyncio.to_thread(self._load_first)
            if not self._ending:
                await self._answer(up, ending, addresses, tls, tracing)

    async def _answer(
        self, up: Callable[[], None], ending: AsyncExitStack, addresses: list[str], tls: Certificate | None, tracing: Tracing | None
    ) -> None:
        config = self.config
        streams = config.streams
        if (current := self.slot.current) is not None and current.session.streams < streams:
            streams = current.session.streams
            self._notify(
                f"{config.streams} streams were asked for, and there are threads for {streams}: so many batches are computed at once"
            )
        metrics = Metrics(max_rows=config.max_batch)
        executor = Executor(self.slot, compiler=self._compiler)
        objective = None if config.objective_ms is None else config.objective_ms / 1e3
        batcher = Batcher(
            LatencyModel(),
            objective=objective,
            max_rows=config.max_batch,
            queue_rows=config.queue_rows,
            queue_bytes=config.bounds.held_bytes,
            workers=streams,
            margin=MARGIN_S if objective is None else min(MARGIN_S, MARGIN_SHARE * objective),
        )
        runner = self._runner = Runner(batcher, executor, workers=streams, interrupt=self.slot.interrupt)
        service = Service(
            self.slot, runner, executor, metrics=metrics, objective=objective, max_rows=config.max_batch,
            max_pixels=config.bounds.image_pixels,
        )  # fmt: skip
        ledger = Ledger(config.bounds)
        log = AccessLog() if config.access_log else None
        if log is not None:
            ending.push_async_callback(asyncio.to_thread, log.close)
        _expose(metrics, service, runner, ledger, log)
        control = Control(self.slot, self._repository)
        ending.push_async_callback(asyncio.to_thread, control.close)
        pictures = Pictures(service, body_bytes=config.bounds.body_bytes)
        ending.push_async_callback(asyncio.to_thread, self._end, pictures, runner, service)
        largest = config.bounds.body_bytes
        limits = Limits(body_bytes=largest, json_bytes=config.bounds.json_bytes, elements=largest)  # none takes less than a byte
        local = not config.tokens and all(map(is_loopback, addresses))
        face = HttpFace(service, control, pictures, limits=limits, tokens=config.tokens, log=log, tracing=tracing, local=local)
        ending.push_async_callback(asyncio.to_thread, face.close)
        http_config = self._uvicorn_config(face, ledger)
        if self._watcher is not None:
            ending.push_async_callback(asyncio.to_thread, self._watcher.stop, END_S)  # a directory on a network may stand still
        ending.callback(self.slot.close)
        grpc_face: GrpcFace | None = None
        if config.grpc_port is not None:
            grpc_face = self._grpc = GrpcFace(
                service, control, limits=limits, tokens=config.tokens, log=log, ledger=ledger, tls=tls, tracing=tracing,
                notify=self._notify,
            )  # fmt: skip
            ending.push_async_callback(self._end_grpc, grpc_face)
            await self._listen_grpc(grpc_face, addresses)
        go_down = partial(self._go_down, service, grpc_face)
        ending.callback(go_down)
        listening = self._listen()
        self._http = _Http(http_config, up, go_down, tls=None if tls is None else tls.context, handshake=config.bounds.header_seconds)
        if self._ending:  # only now: another thread that ends it tells this, if it is there
            for sock in listening:
                sock.close()
            return
        if tls is not None:
            ending.callback(asyncio.create_task(self._renew(tls)).cancel)
        ending.callback(asyncio.create_task(self._settle()).cancel)
        if self._watcher is not None:
            self._watcher.start()
        gc.collect()
        gc.freeze()  # what was made until here stays: later collections need not look at it
        ending.callback(gc.unfreeze)
        take_short_turns()  # the engines' threads are there, and keep theirs
        await self._http.serve(sockets=listening)
        self.hurried = self.hurried or self._http.force_exit
        self._served = True

    def _load_first(self) -> None:
        """The newest version; with `watch` an older one where that cannot be loaded. Returns with none where it was told to end."""
        versions = self._repository.scan()
        if not versions:
            if not self.config.watch:
                raise ArtifactError(f"{self._repository.path}: neither an artefact nor a directory of numbered ones: name one")
            self._notify(f"{self._repository.path}: no version yet; the first that comes is served")
        if self._watcher is not None:
            self._watcher.step()
            return
        name, path = next(reversed(versions.items()))
        try:
            self.slot.load(path, name)
        except MuntinError:
            if not self._ending:
                raise

    def _go_down(self, service: Service, grpc_face: GrpcFace | None) -> None:
        """Nobody new comes and no version, and what is in flight, over HTTP or gRPC, has the same time. On the event loop."""
        if self._drained_at is not None:
            return
        self._drained_at = time.monotonic() + self.config.drain_seconds
        service.draining = True
        self.slot.end_loads()
        if grpc_face is not None:
            grpc_face.begin_stop(self.config.drain_seconds)

    async def _end_grpc(self, face: GrpcFace) -> None:
        """Gives its calls the time that they have; none once it was told twice to end."""
        stopping = face.begin_stop(self.config.drain_seconds)
        while not stopping.done() and not self.hurried:
            await asyncio.wait((stopping,), timeout=_HURRY_S)
        if not stopping.done():
            await face.cut()
        await face.stop(0)

    def _end(self, pictures: Pictures, runner: Runner, service: Service) -> None:
        pictures.close(self._left())
        if not runner.close(self._left()):
            self.slot.end_calls()  # else an engine that hangs outlives the server, and whatever waits for it
        service.close()

    def _left(self) -> float:
        """Seconds that what is in flight still has."""
        if self.hurried:
            return 0.0
        return self.config.drain_seconds if self._drained_at is None else max(0.0, self._drained_at - time.monotonic())

    def _look_at_ports(self) -> list[str]:
        """The addresses of the host. Raises DataError where a port cannot be had there: before a model is loaded in vain, and before grpc,
        which does not say why.

        They are closed again: who connects while it loads is refused, and not left to wait.
        """
        with ExitStack() as open_:  # the first while the second is opened: the two may be the same
            sockets = [open_.enter_context(sock) for sock in self._sockets("http", self.config.http_port)]
            if self.config.grpc_port is not None:
                for sock in self._sockets("grpc", self.config.grpc_port):
                    sock.close()
            return [_address_of(sock) for sock in sockets]

    def _sockets(self, face: str, port: int) -> list[socket.socket]:
        """One for each address of the host; of `::` one for both families, as grpc's is. Addresses that this machine does not have are
        passed over where there is another. Port 0: the same for all."""
        host, missing = self.config.host, None
        with ExitStack() as opened:
            try:
                found: list[socket.socket] = []
                for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
                    both = address[0] == "::" and socket.has_dualstack_ipv6()
                    chosen = found[0].getsockname()[1] if found else port
                    try:
                        sock = socket.create_server((address[0], chosen, *address[2:]), family=family, backlog=1024, dualstack_ipv6=both)
                    except OSError as error:
                        if error.errno not in _NOT_HERE:
                            raise
                        missing = error
                    else:
                        found.append(opened.enter_context(sock))
                if missing is not None and not found:
                    raise missing
            except OSError as error:
                raise DataError(
                    f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --{face}-port or --host"
                ) from error
            opened.pop_all()
        return found

    def _listen(self) -> list[socket.socket]:
        found = self._sockets("http", self.config.http_port)
        self.http_port = found[0].getsockname()[1]
        return found

    async def _listen_grpc(self, face: GrpcFace, addresses: list[str]) -> None:
        host, port = self.config.host, self.config.grpc_port
        try:
            await face.start(*(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses))
        except OSError as error:
            raise DataError(f"cannot listen on {host}:{port} for gRPC: choose another --grpc-port or --host") from error
        self.grpc_port = face.port

    async def _renew(self, certificate: Certificate) -> None:
        """Shows what lies in the files of a certificate whenever they have changed."""
        while True:
            await asyncio.sleep(RENEW_S)
            if not await asyncio.to_thread(certificate.changed):
                continue
            try:
                certificate.load()
            except DataError as error:
                told = f"{error}; the one before is still shown"
            else:
                told = "the TLS certificate was renewed"
            await asyncio.to_thread(self._notify, told)

    async def _settle(self) -> None:
        """Ends what time has ended, and lets go of the version before, in quiet hours, too."""
        while True:
            await asyncio.sleep(SETTLE_S)
            try:
                await asyncio.to_thread(self.slot.settle)
            except Exception as error:  # noqa: BLE001 - it is tried again, as with each request
                await asyncio.to_thread(self._notify, f"versions: {error}")

    def _uvicorn_config(self, face: HttpFace, ledger: Ledger) -> uvicorn.Config:
        config = self.config
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a line for every piece of nonsense that is sent would fill a disk
        made = uvicorn.Config(
            face,
            http=partial(Receiver, ledger=ledger, direct=face),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            loop="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=math.ceil(config.bounds.idle_seconds),
            timeout_graceful_shutdown=math.ceil(config.drain_seconds),
        )
        made.load()
        return made


def serve(path: str | Path, *, notify: Notify = tell_nobody, **settings: Any) -> int:
    """Serves an artefact, or a directory of numbered versions of one, over HTTP and gRPC until SIGTERM or Ctrl-C: `muntin serve` in Python.

    `settings`: the fields of `ServeConfig`, which says their units and defaults: the command's, over HTTP on 127.0.0.1:8000 and gRPC on
    127.0.0.1:8001. `notify`: as of `Server`. Blocks the calling thread: the main one, which alone hears signals; on another one use a
    `Server`, which `stop` ends. Before it listens it costs what verifying and compiling the first version takes, some seconds. Returns how
    many connections and calls were still busy when `drain_seconds` were over, and were cut off.

    Raises DataError for a setting that there is not or that is out of its range, RecipeError for one of `rollout`, and whatever `Server`
    raises. Needs the extra `serve`.
    """
    try:
        config = ServeConfig(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        # Not `from error`, whose text shows what it was given, tokens too.
        raise DataError(f"serve: {where}: {what}" if where else f"serve: {what}") from None
    if lack := raise_descriptors(config):
        notify(lack)
    server = Server(path, config, notify=notify)
    server.run()
    return server.cut_off


def _address_of(sock: socket.socket) -> str:
    """Where it listens; with the interface where that is part of it, as of fe80::1%eth0."""
    address, _, *more = sock.getsockname()
    return f"{address}%{socket.if_indextoname(more[1])}" if more and more[1] else str(address)


class _Http(uvicorn.Server):
    """uvicorn, which tells when it listens and when it begins to go down. `handshake`: seconds that a TLS handshake may take, which uvicorn
    leaves at the loop's minute."""

    def __init__(
        self, config: uvicorn.Config, up: Callable[[], None], go_down: Callable[[], None], *, tls: ssl.SSLContext | None, handshake: float
    ) -> None:
        super().__init__(config)
        self._tell_up, self._go_down, self._tls, self._handshake = up, go_down, tls, handshake
        self.cut_off = 0
        """Connections that were still busy when the time at the end was over."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        loop, tls = asyncio.get_running_loop(), self._tls
        for sock in sockets or ():
            listening = await loop.create_server(
                self._connection, sock=sock, ssl=tls, backlog=self.config.backlog, ssl_handshake_timeout=self._handshake if tls else None
            )
            self.servers.append(listening)
        self._tell_up()

    def _connection(self) -> asyncio.BaseProtocol:
        made: Any = self.config.http_protocol_class
        connection: asyncio.BaseProtocol = made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return connection

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._go_down()
        await super().shutdown(sockets)
        self.cut_off = len(self.server_state.connections)


def _by_version(slot: Slot, figure: Callable[[Session], float]) -> list[tuple[tuple[str], float]]:
    """Of the versions in service, by name: an artefact that is loaded again keeps its own, so there may be two of one."""
    found: dict[str, float] = {}
    for version in slot.open:
        with suppress(NotReadyError):  # it went meanwhile
            found[version.name] = found.get(version.name, 0.0) + figure(version.session)
    return [((name,), value) for name, value in found.items()]


def _memory_of(session: Session) -> float:
    return float(sum(resident_of(process) or 0 for process in session.process_ids))


def _expose(metrics: Metrics, service: Service, runner: Runner, ledger: Ledger, log: AccessLog | None) -> None:
    """What lies with others, for Prometheus."""
    if log is not None:
        metrics.count("muntin_access_log_lost", "Lines of the access log that could not be written.", lambda: log.lost)
    metrics.gauge("muntin_ready", "Whether a request would be admitted.", lambda: float(service.ready))
    metrics.gauge("muntin_body_bytes", "Bytes held: of request bodies, and of answers not read yet.", lambda: float(ledger.held))
    metrics.gauge("muntin_waiting_rows", "Images that wait for their batch.", lambda: float(runner.snapshot().waiting_rows))
    metrics.gauge("muntin_backlog_seconds", "Computation that waits.", lambda: runner.snapshot().backlog_s)
    metrics.gauge("muntin_hanging", "Threads that an engine does not come back to.", lambda: float(runner.hanging))
    counters: dict[str, tuple[str, Callable[[], int]]] = {
        "admitted": ("Requests, and tiles of pictures, that were admitted.", lambda: runner.snapshot().admitted),
        "dropped": ("Of the admitted, those whose time passed, or that the end came before.", lambda: runner.snapshot().dropped),
        "cancelled": ("Of the admitted, those that were taken back before they were computed.", lambda: runner.snapshot().cancelled),
        "rows_one_by_one": ("Batches computed row by row for want of memory.", lambda: service.executor.recoveries.rows),
        "images_in_tiles": ("Images computed in tiles for want of memory.", lambda: service.executor.recoveries.tiles),
    }
    for name, (text, count) in counters.items():
        metrics.count(f"muntin_{name}", text, count)
    metrics.read(
        "counter", "muntin_refused", "Requests that were refused before they were admitted, by reason.", ("reason",),
        lambda: [
            *(
                ((kind,), float(count + (service.turnstile.count if kind == "late" else 0)))
                for kind, count in runner.snapshot().refused.items()
            ),
            *(((reason,), float(metrics.refused[reason])) for reason in ("no version", "large answers", "pictures")),
        ],
    )  # fmt: skip
    metrics.read(
        "gauge", "muntin_version_ready", "Versions that can answer.", ("version",),
        lambda: [((entry.version,), 1.0) for entry in service.slot.index() if entry.state == "ready"],
    )  # fmt: skip
    metrics.read(
        "counter", "muntin_engine_deaths", "Processes of a version's engine that ended, or were ended since it hung.", ("version",),
        lambda: [((version,), float(count)) for version, count in service.slot.deaths().items()],
    )  # fmt: skip
    metrics.read(
        "gauge", "muntin_engine_resident_memory_bytes", "Memory of the process of a version's engine.", ("version",),
        lambda: _by_version(service.slot, _memory_of),
    )  # fmt: skip
    metrics.read(
        "counter", "muntin_connections_refused", "Requests that were refused before they were whole, by status.", ("status",),
        lambda: [((str(status),), float(count)) for status, count in ledger.refused.items()],
    )  # fmt: skip


def _name_of(path: Path) -> str:
    """The name of a model from its folder's, or a link's to it, which stays when it is moved on; with what a name in a URL cannot have
    replaced."""
    folder = path.resolve().name if path.name in ("", "..") else path.name
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder).lstrip("._-")
    return name[:100] or "model"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:  # there is none for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@contextmanager
def _on_signals(tell: Callable[[int], object]) -> Iterator[None]:
    """SIGTERM and Ctrl-C do this and no more: on the main thread, the only one that may say so. `tell`: is given the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda given, _: tell(given)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
