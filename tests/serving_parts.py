"""For the tests of serving: servers with engines in this process, behind sockets and without; sessions, processes, trials of versions."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from urllib.parse import unquote

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from image_session import ImageSession
from muntin.artifact import ClassInfo, Signature, Sizes
from muntin.errors import ArtifactError, MuntinError
from muntin.runtime.inputs import LABELS, SCORES, Shape, image_dims
from muntin.serving.assembly import assemble, make_slot
from muntin.serving.config import ServeConfig
from muntin.serving.grpc.calls import Calls
from muntin.serving.grpc.servicer import Servicer
from muntin.serving.protocol.grpc_codec import SERVICE
from muntin.serving.security.bearer_tokens import Tokens
from muntin.serving.server import Server
from muntin.serving.telemetry.notify import tell_nobody
from muntin.serving.telemetry.tracing import Tracing
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.repository import Repository
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.calls import Call
from muntin.serving.worker.opening import Opened

Fetched = tuple[int, dict[str, str], bytes]
"""Status, header fields and body of an answer."""
_OPENING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class InProcess(ArtifactLoader):
    """Opens artefacts in this process, as on Windows, for tests that open many or look inside."""

    def open(self, path: Path, **given: Any) -> Opened:
        with _OPENING, pytest.MonkeyPatch.context() as patch:
            patch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)
            return super().open(path, **given)


def open_in_process(slot: Slot) -> None:
    """Have a slot open its versions in this process."""
    slot._loader = InProcess(**vars(slot._loader))  # type: ignore[assignment]


def new_server(path: Path, *, remote: bool = False, notify: Callable[[str], None] = tell_nobody, **settings: Any) -> Server:
    """A server on free ports, to be started. `remote`: its engines run in processes of their own."""
    server = Server(path, ServeConfig(**({"http_port": 0, "grpc_port": 0, "threads": 1, "max_batch": 2} | settings)), notify=notify)
    if not remote:
        open_in_process(server.slot)
    return server


async def ask_app(
    app: Any, method: str, path: str, pieces: Iterable[bytes], headers: Iterable[tuple[bytes, bytes]], *, stays: bool = True
) -> Fetched:
    """Send a request to an ASGI application. `pieces`: of its body. `stays`: the client waits for the answer."""
    left, sent = list(pieces), []

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": unquote(path), "query_string": query.encode(), "client": ("1.2.3.4", 5)}
    await app(scope | {"headers": list(headers)}, receive, send)
    if not sent:
        return 0, {}, b""
    fields = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], fields, b"".join(message["body"] for message in sent[1:])


class CallError(Exception):
    """A gRPC call that was aborted."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing = code, details, trailing


class CallContext:
    """The server's side of a gRPC call whose client has sent some messages. `stalls`: it never ends them."""

    def __init__(self, messages: Iterable[bytes], metadata: Any, seconds: float | None, *, stalls: bool) -> None:
        self._messages, self._metadata, self._seconds, self._stalls = iter(messages), metadata, seconds, stalls
        self.answers: list[bytes] = []

    async def read(self) -> Any:
        for message in self._messages:
            return message
        if self._stalls:
            await asyncio.Event().wait()
        return grpc.aio.EOF

    async def write(self, answer: bytes) -> None:
        self.answers.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any) -> None:
        raise CallError(code, details, trailing)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5"

    def invocation_metadata(self) -> Any:
        return self._metadata

    def time_remaining(self) -> float | None:
        return self._seconds


class Socketless:
    """The parts of a server with an engine in this process, on an event loop of their own: HTTP by ASGI, gRPC by its handlers."""

    def __init__(
        self,
        path: Path,
        *,
        local: bool = True,
        notify: Callable[[str], None] = tell_nobody,
        tracing: Tracing | None = None,
        **settings: Any,
    ) -> None:
        self.config = ServeConfig(**({"threads": 1, "max_batch": 4, "page": False} | settings))
        self.slot = make_slot(path, self.config, notify=notify)
        open_in_process(self.slot)
        self._repository, self._local, self._notify, self._tracing = Repository(path), local, notify, tracing

    def __enter__(self) -> Self:
        name, path = next(reversed(self._repository.scan().items()))
        self.slot.load(path, name)
        self._loop, self._ending = asyncio.new_event_loop(), AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.run(self._assemble())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._ending.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.slot.close()

    async def _assemble(self) -> None:
        self.parts = assemble(
            self.slot, self._repository, self.config, ending=self._ending, left=lambda: 5.0, notify=self._notify, local=self._local,
            tracing=self._tracing,
        )  # fmt: skip
        self.calls = Calls(self.parts.budget, Tokens(self.config.tokens), self.parts.log)
        self._methods = Servicer(
            self.parts.service, self.parts.control, self.calls, limits=self.parts.limits, tracing=self._tracing, stopping=asyncio.Event()
        ).handlers()

    def run(self, coroutine: Any) -> Any:
        """The result of a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def fetch(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> Fetched:
        """The answer to an HTTP request. `body`: bytes, or pieces of bytes."""
        pieces = [] if body is None else [body] if isinstance(body, bytes) else list(body)
        length = {} if body is None else {"content-length": str(len(body))} if isinstance(body, bytes) else {"transfer-encoding": "chunked"}
        fields = {"host": "localhost", **length, **(headers or {})}
        encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
        answer: Fetched = self.run(ask_app(self.parts.app, method or ("GET" if body is None else "POST"), path, pieces, encoded))
        return answer

    def call(self, name: str, *messages: bytes, **options: Any) -> list[bytes]:
        """The answers to a gRPC call; options as of `called`."""
        answers: list[bytes] = self.run(self.called(name, messages, **options))
        return answers

    async def called(
        self, name: str, messages: Iterable[bytes], *, metadata: Any = (), seconds: float | None = None, stalls: bool = False
    ) -> list[bytes]:
        """The answers to a gRPC call. Raises CallError. `stalls`: the client does not end its messages."""
        handler: Any = self._methods.service(SimpleNamespace(method=f"/{SERVICE}/{name}"))
        context = CallContext(messages, metadata, seconds, stalls=stalls)
        await handler.stream_stream(None, context)
        return context.answers

    def metrics(self) -> list[str]:
        return self.fetch("/metrics")[2].decode().splitlines()


def fetch_over_http(
    server: Server | Socketless, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> Fetched:
    if isinstance(server, Socketless):
        return server.fetch(path, body, headers, method or "")
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - to this machine
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


# ---- addresses and processes ----


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def listens(port: int | None, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def stop_process(process: int) -> None:
    """Make a process hang. Where a core is busy, a signal takes its time."""
    os.kill(process, signal.SIGSTOP)
    while sys.platform == "linux" and state_of(process) != "T":
        time.sleep(0.001)


def state_of(process: int) -> str:
    """The kernel's letter: T is stopped, Z has ended; Z also for none. Linux only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


# ---- sessions and versions ----


class PixelSession(ImageSession):
    """Scores of a pixel are its four channels, so its label is its brightest one. `most`: rows times pixels that there is memory for."""

    def __init__(self, task: Any = "segment", most: int = 10**9, sizes: Sizes = Sizes()) -> None:  # noqa: B008 - immutable
        classes = tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abcd")
        signature = Signature(task=task, channels=4, classes=classes, sizes=sizes)
        super().__init__(signature=signature, engine="none", precision="f32", threads=1)
        self.most = most
        self.calls: list[tuple[int, ...]] = []
        self.error: Exception | None = None

    def scores(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.calls.append(images_BHWC.shape)
        if self.error is not None:
            raise self.error
        if images_BHWC.size // 4 > self.most:
            raise ArtifactError("x: the model failed: Exception from src/inference: std::bad_alloc")  # as engines' errors come
        scores = images_BHWC.transpose(0, 3, 1, 2).astype(np.float32)
        return scores.mean((2, 3)) if self.signature.task == "classify" else scores


def image_call(shape: Shape, *, labels: bool = False) -> Call:
    """Return the call of images (B, H, W)."""
    return Call(image_dims(shape), "batch", LABELS if labels else SCORES)


def random_images(rows: int, seed: int, height: int = 6, width: int = 5, channels: int = 4) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, channels)).astype(np.uint8)


@contextmanager
def on_trial(slot: Slot, name: str, *, ends: bool = False) -> Iterator[list[Any]]:
    """Load a version on another thread until it is on trial. Afterwards the list holds the version, or the error. `ends`: ends its load."""
    outcome: list[Any] = []

    def load() -> None:
        try:
            outcome.append(slot.load(Path(name), name))
        except MuntinError as error:
            outcome.append(error)

    def is_candidate() -> bool:
        return any(entry.version == name and entry.reason.startswith("candidate") for entry in slot.index())

    thread = threading.Thread(target=load)
    thread.start()
    try:
        while not outcome and not is_candidate():
            time.sleep(0.001)
        yield outcome
    except BaseException:
        slot.close()  # else the load would wait for a verdict
        raise
    finally:
        if ends:
            slot.end_loads()
        thread.join(20)
        assert not thread.is_alive()
