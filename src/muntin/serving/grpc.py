"""The gRPC face: the same service, on the same event loop, for `tritonclient.grpc` and `perf_analyzer -i grpc`, and gRPC's own health.

Handlers are registered by name, no generated service code is needed. What a client may send is bounded before it is read: grpc counts a
message's bytes, `wire` what protobuf would make of them, and this server the messages that are being answered. So is the time it may take:
a call is held against the tokens when its headers are there, and its message has to come within `Bounds.body_seconds`. For that every
method is registered as one whose requests stream, which is the same on the wire: of others grpc shows nothing before the message is whole.

A message counts as held from when it is whole. Until then grpc holds what has come, and neither shows it nor bounds it for all calls
together (a resource quota is the C library's, and Python cannot make one): at most as many of the largest messages as calls are answered at
once.

An answer counts as held, and its call in its place, until the client has taken it. grpc cannot drop what it was given to send, nor end
such a call (an abort waits behind the answer): who does not read for `Bounds.body_seconds` loses the connection, with all calls on it.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc

from muntin.errors import bare
from muntin.serving import open_inference_pb2 as messages
from muntin.serving.access_log import AccessLog
from muntin.serving.certificate import Certificate
from muntin.serving.control import Control
from muntin.serving.description import VERSION, ModelDescription
from muntin.serving.grpc_codec import (
    LACKING,
    METHODS,
    SERVICE,
    Method,
    configuration_message,
    decode_infer,
    encode_infer,
    index_message,
    metadata_message,
    repository_parameters,
    server_message,
    statistics_message,
)
from muntin.serving.health import SERVICE as HEALTH
from muntin.serving.health import Health
from muntin.serving.health_pb2 import HealthCheckRequest, HealthCheckResponse
from muntin.serving.ledger import Ledger
from muntin.serving.protocol import InferRequest, InferResponse, Limits, ProtocolError, RefusedRequestError
from muntin.serving.service import Answered, Service
from muntin.serving.telling import Notify, tell_nobody
from muntin.serving.tokens import Tokens
from muntin.serving.tracing import Tracing
from muntin.serving.wire import parse

Context = Any
_ENVELOPE = 1 << 16
"""Bytes that a message may have beside its tensors."""
_LONGEST = (1 << 31) - 1
"""Bytes of a message, that grpc and protobuf can count."""
_OPEN = ("ServerLive", "ServerReady")
"""What needs no token: whoever starts and stops servers asks for it. Nothing is in their messages, so none is waited for."""
_CHECK = Method("Check", HealthCheckRequest, HealthCheckResponse)
_PROBES, _WATCHES = 16, 128
"""Calls of gRPC's health at once whose message, which needs no token, is read or answered; and those that watch, who must not take the
places of who asks once."""
_PROBE_S = 2.0
"""Seconds that such a call's message may take: it is a few bytes, and comes with the call."""
_SOON_S = 0.05
"""Before the time at the end is over: who is cancelled from then on was cut off by it."""
_DESCRIPTORS = Path("/dev/fd")
"""Where a POSIX system lists the open files of the process that asks."""
_MIND_S = 0.2
"""Between two looks at whether grpc's server goes on."""
_GRACE_S = 5.0
"""That calls have of one that does not."""
_AGAIN_S = 1.0
"""Between two tries to have the port again."""
_STREAM_REQUESTS = 32
"""Of one stream, that are computed or whose answers are not sent yet."""


class _Named(NamedTuple):
    """What a request for inference says beside its tensors: all of the message that is kept while these are computed."""

    model: str
    version: str | None
    id: str


class _End(NamedTuple):
    """What became of a call: what it is counted as, HTTP's status for it, and gRPC's."""

    outcome: str
    status: int
    code: str


_ANSWERED, _CANCELLED = _End("answered", 200, "OK"), _End("cancelled", 499, "CANCELLED")


def _failed(error: ProtocolError) -> _End:
    return _End(error.outcome, error.status, error.grpc_code)


def _encoded(response: InferResponse, request: InferRequest) -> bytes:
    """An answer as it goes out, on whatever thread puts answers into form: protobuf writes all of it to know how long it is. Raises
    ProtocolError where it is longer than a message can be."""
    _check_length(response)
    return bytes(encode_infer(response, request.outputs).SerializeToString())


def _encoded_for_stream(response: InferResponse, request: InferRequest) -> bytes:
    """The same as one of a stream's."""
    _check_length(response)
    return _final(messages.ModelStreamInferResponse(infer_response=encode_infer(response, request.outputs)))


def _final(answer: messages.ModelStreamInferResponse) -> bytes:
    answer.infer_response.parameters["triton_final_response"].bool_param = True  # the only one to its request, so the last
    return bytes(answer.SerializeToString())


def _check_length(response: InferResponse) -> None:
    nbytes = sum(output.data.nbytes for output in response.outputs)
    if nbytes > _LONGEST - _ENVELOPE:
        raise ProtocolError(f"an answer of {nbytes:,} bytes is longer than a gRPC message can be: ask for less, or over HTTP", status=413)


class _Call(NamedTuple):
    """What a handler is told beside the message. `began`: when that came."""

    context: Context
    began: float


Handler = Callable[[Any, _Call], Awaitable[Any]]


class GrpcFace:
    """Serves on addresses ("127.0.0.1:8001"; port 0: any that is free, see `port`). `tls`: what they show, if anything.

    `ledger`: of the HTTP face. What both hold is counted together; of calls as many are answered at once as that has connections.
    """

    def __init__(
        self,
        service: Service,
        control: Control,
        *,
        limits: Limits,
        tokens: tuple[str, ...],
        log: AccessLog | None,
        ledger: Ledger,
        tls: Certificate | None = None,
        tracing: Tracing | None = None,
        notify: Notify = tell_nobody,
    ) -> None:
        self._service, self._control, self._limits, self._log = service, control, limits, log
        self._tls, self._tracing, self._tokens, self._notify = tls, tracing, Tokens(tokens), notify
        self._ledger, self._bounds = ledger, ledger.bounds
        self._calls = 0
        """That are received or answered; those that need no token are not counted, so nothing keeps them from being answered."""
        self._probes = self._watches = 0
        self._health = Health(lambda: service.ready, service.name, SERVICE)
        self._server = self._made()
        self._addresses: list[str] = []
        """Where it listens, with its port."""
        self._minding: asyncio.Task[None] | None = None
        self._ended: set[asyncio.Task[None]] = set()
        """grpc's servers that ended by themselves, as long as calls of theirs go on."""
        self._stopping: asyncio.Task[None] | None = None
        self._cut_at = math.inf
        """From when on calls that are in flight are cut off."""
        self._streams: set[_Stream] = set()
        self.cut_off = 0
        """Calls that were still busy when the time at the end was over."""
        self.begun_again = 0
        """How often grpc's server came to an end by itself."""
        self.port = 0

    async def start(self, *addresses: str) -> None:
        """Raises OSError where one of the addresses cannot be had. Port 0: the same for all."""
        await self._listen(addresses)
        self._addresses = [f"{address.rpartition(':')[0]}:{self.port}" for address in addresses]
        self._minding = asyncio.create_task(self._mind())

    def _made(self) -> grpc.aio.Server:
        bounds = self._bounds
        server = grpc.aio.server(
            interceptors=(_Doorkeeper(self._tokens, self._turned_away),) if self._tokens else (),
            maximum_concurrent_rpcs=2 * bounds.connections + _PROBES + _WATCHES,  # and room for those that need no place
            options=[
                ("grpc.max_receive_message_length", min(self._limits.body_bytes + _ENVELOPE, _LONGEST)),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.server_handshake_timeout_ms", math.ceil(1e3 * bounds.header_seconds)),  # of TLS, and of HTTP/2's first frame
                ("grpc.max_connection_idle_ms", math.ceil(1e3 * bounds.idle_seconds)),  # without a call; grpc bounds no number
            ],
        )
        server.add_generic_rpc_handlers((self._handlers(), self._health_handlers()))
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

    async def _mind(self) -> None:
        """Begins grpc's server again where it comes to an end by itself: a call whose path is no UTF-8 does that to grpcio (1.85), before
        anybody here is asked about it. Calls in flight go on for a moment."""
        while self._stopping is None:
            try:
                # With a limit, after which it tells what it met; without one it waits for the calls in flight, which may never end.
                if await self._server.wait_for_termination(_MIND_S):
                    continue
                reason = "for no reason that it gives"
            except Exception as error:  # noqa: BLE001 - whatever it was that it met
                reason = f"{type(error).__name__}: {error}"
            self.begun_again += 1
            self._notify(f"grpc's server ended ({reason}), and is begun again")
            ended = asyncio.create_task(self._server.stop(_GRACE_S))
            self._ended.add(ended)
            ended.add_done_callback(self._ended.discard)
            while self._stopping is None:
                self._server = self._made()
                try:
                    await self._listen(self._addresses)
                    break
                except OSError as error:
                    self._notify(f"gRPC: {error}; it is tried again in {_AGAIN_S:g} s")
                    await asyncio.sleep(_AGAIN_S)

    def begin_stop(self, seconds: float) -> asyncio.Task[None]:
        """Takes no new calls, and gives those in flight so long, from the first time on that it is told so. Ended: nobody is answered.

        Of a stream what has come is answered, and it ends: its client may leave it open for hours.
        """
        if self._stopping is None:
            self._cut_at = time.monotonic() + seconds - _SOON_S
            if self._minding is not None:
                self._minding.cancel()
            self._stopping = asyncio.create_task(self._server.stop(seconds))
            self._health.end()
            for stream in self._streams:
                stream.end()
        return self._stopping

    async def stop(self, seconds: float) -> None:
        """As `begin_stop`, until it has ended."""
        await self.begin_stop(seconds)
        await asyncio.gather(*self._ended, return_exceptions=True)

    async def cut(self) -> None:
        """Cuts off now what is in flight, whatever time it was given."""
        self._cut_at = min(self._cut_at, time.monotonic())
        await self._server.stop(0)

    def _fenced(self, name: str, behaviour: Callable[[Any, Context], Awaitable[None]]) -> Callable[[Any, Context], Awaitable[None]]:
        """A handler that takes no call over IPv6 where no address of it was asked for: of 0.0.0.0 grpc makes that of both families."""

        async def fenced(requests: Any, context: Context) -> None:
            peer = unquote(context.peer())
            beyond = peer.startswith("ipv6:[") and not peer.startswith("ipv6:[::ffff:")  # the latter is IPv4 on a socket of both families
            if beyond and not any(address.startswith("[") for address in self._addresses):
                error = ProtocolError("this server answers over IPv4 alone: it was given no address of IPv6", status=403)
                self._turned_away(name, context, error)
                await _abort(context, error)
            else:
                await behaviour(requests, context)

        return fenced

    def _handlers(self) -> grpc.GenericRpcHandler:
        handlers = {name: _refusing(ProtocolError(text, status=501), partial(self._turned_away, name)) for name, text in LACKING.items()}
        for method in METHODS:
            handler = self._stream if method.streams else self._guarded(method, _METHODS[method.name](self))
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._fenced(method.name, handler))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _health_handlers(self) -> grpc.GenericRpcHandler:
        handlers = {
            "Check": grpc.stream_stream_rpc_method_handler(self._fenced("Check", self._guarded(_CHECK, self.check))),
            "Watch": grpc.stream_stream_rpc_method_handler(
                self._fenced("Watch", self._watch), response_serializer=_CHECK.response.SerializeToString
            ),
        }
        return grpc.method_handlers_generic_handler(HEALTH, handlers)

    def _guarded(self, method: Method, handler: Handler) -> Callable[[Any, Context], Awaitable[None]]:
        """The handler of a method with what it is asked read from the wire, its answer sent, and its errors as gRPC statuses."""

        infers = method.request is messages.ModelInferRequest

        async def handled(context: Context) -> ProtocolError | None:
            call, end, path, sent = _Call(context, time.monotonic()), _CANCELLED, "", 0
            written = False
            try:
                if method.name in _OPEN:
                    sent = await self._send(await handler(method.request(), call), context)
                else:
                    with self._probed() if method is _CHECK else self._counted():
                        wire = await self._message(context, _PROBE_S if method is _CHECK else self._bounds.body_seconds)
                        call = _Call(context, self._ledger.pulse.came(asyncio.get_running_loop()))
                        with self._holding(0 if method is _CHECK else len(wire)):  # health is told, however much is held
                            written = infers  # whatever becomes of it from here on
                            asked = [self._asked(wire, call) if infers else parse(wire, method.request, self._limits)]
                            del wire
                            path = _subject(asked[0])
                            answer = await handler(asked.pop(), call)  # which is then the only one to have it
                        sent = await self._send(answer, context)
                end = _ANSWERED
            except grpc.aio.BaseError:  # the call is over
                raise
            except Exception as failure:  # noqa: BLE001 - what grpc makes of it tells the client too much, and the loop nothing
                error = _told(failure)
                end = _failed(error)
                return error
            finally:
                if not written:
                    self._write(method.name, path, call, end, sent=sent)
            return None

        async def handle(_: Any, context: Context) -> None:
            error = await handled(context)
            if error is not None:  # grpc keeps what aborts, and the frames that do, in a circle: the message is in none of them
                await _abort(context, error)

        return handle

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Around a call. Raises ProtocolError 429 where there are too many."""
        most = self._bounds.connections
        if self._calls >= most:
            raise self._unread(ProtocolError(f"this server answers at most {most} calls at once: try again", status=429))
        self._calls += 1
        try:
            yield
        except BaseException:  # cancelled, or told that its client sends nothing more, or takes nothing more: whichever comes first
            self.cut_off += time.monotonic() >= self._cut_at  # before that it is the client that ends it
            raise
        finally:
            self._calls -= 1

    @contextmanager
    def _probed(self) -> Iterator[None]:
        """Around a call of gRPC's health. Raises ProtocolError 429 where there are too many."""
        if self._probes >= _PROBES:
            raise self._unread(ProtocolError(f"this server answers at most {_PROBES} calls for its health at once: try again", status=429))
        self._probes += 1
        try:
            yield
        finally:
            self._probes -= 1

    @contextmanager
    def _holding(self, size: int) -> Iterator[None]:
        """Around the answer to a message of so many bytes. Raises RefusedRequestError where those that are being answered fill what may be
        held."""
        if not self._ledger.has_room(size):
            raise self._unread(RefusedRequestError("the bodies of other requests fill what this server holds: try again"))
        self._ledger.held += size
        try:
            yield
        finally:
            self._ledger.held -= size

    async def _send(self, answer: Any, context: Context) -> int:
        """Returns how many bytes it has, when the client has taken the answer: it counts as held until then."""
        wire = answer if isinstance(answer, bytes) else answer.SerializeToString()
        self._ledger.held += len(wire)
        try:
            with _patient(context, self._bounds.body_seconds, self.port):
                await context.write(wire)
        finally:
            self._ledger.held -= len(wire)
        return len(wire)

    def _unread(self, error: ProtocolError) -> ProtocolError:
        """Counts what is refused without being read, beside what the HTTP face's connections refuse so."""
        self._ledger.refused[error.status] = self._ledger.refused.get(error.status, 0) + 1
        return error

    async def _message(self, context: Context, seconds: float) -> bytes:
        """The one message of a call. Raises ProtocolError where it does not come in so many seconds, or not at all."""
        try:
            async with asyncio.timeout(seconds):
                wire = await context.read()
        except TimeoutError:
            raise self._unread(ProtocolError("the request did not arrive in time", status=408)) from None
        if wire is grpc.aio.EOF:
            raise ProtocolError("the call ended without a message: send one")
        assert isinstance(wire, bytes)
        return wire

    def _asked(self, wire: bytes, call: _Call) -> messages.ModelInferRequest:
        """A request for inference. Raises ProtocolError where the bytes are none; that is counted, and written down."""
        try:
            return parse(wire, messages.ModelInferRequest, self._limits)
        except ProtocolError as error:
            self._finish(_Named("", None, ""), call, _failed(error), self._client(call))
            raise

    def _client(self, call: _Call) -> str:
        return "" if self._log is None else str(call.context.peer())

    def _write(
        self, method: str, path: str, call: _Call, end: _End, *, sent: int = 0, client: str | None = None, request_id: str = "",
        answered: Answered | None = None,
    ) -> None:  # fmt: skip
        """Writes down what became of a call."""
        if self._log is not None:
            self._log.write(
                face="grpc", client=self._client(call) if client is None else client, method=method, path=path, status=end.status,
                code=end.code, sent=sent, seconds=time.monotonic() - call.began, request_id=request_id, answered=answered,
            )  # fmt: skip

    def _turned_away(self, method: str, context: Context, error: ProtocolError) -> None:
        """Writes down a call that is refused whatever it says."""
        self._write(method, "", _Call(context, time.monotonic()), _failed(error))

    def _finish(
        self,
        named: _Named,
        call: _Call,
        end: _End,
        client: str,
        answered: Answered | None = None,
        response: bytes = b"",
    ) -> None:
        """Counts and writes down a request for inference that came to its end."""
        self._service.metrics.requests["grpc", end.outcome] += 1
        if self._log is not None:
            self._write("ModelInfer", named.model, call, end, sent=len(response), client=client, request_id=named.id, answered=answered)

    async def infer(
        self, request: messages.ModelInferRequest, call: _Call, encode: Callable[[InferResponse, InferRequest], bytes] = _encoded
    ) -> bytes:
        """The answer as it goes out. Raises ProtocolError alone. Counted and written down whatever becomes of it.

        Of the message nothing is kept beyond its tensors, once, so who calls must not keep it either: that is what it counts as.
        """
        end, answered = _End("failed", 500, "INTERNAL"), None
        response = b""
        client, named = self._client(call), _Named(request.model_name, request.model_version or None, request.id)
        try:
            decoded = decode_infer(request, self._limits)
            del request
            answered = await self._answered(decoded, named, call, encode)
            response = answered.encoded
            assert isinstance(response, bytes)
            end = _ANSWERED
            return response
        except ProtocolError as error:
            end = _failed(error)
            raise
        except asyncio.CancelledError:
            end = _CANCELLED
            raise
        except Exception as error:
            raise _fault(error) from error
        finally:
            self._finish(named, call, end, client, answered, response)

    async def _answered(
        self, decoded: InferRequest, named: _Named, call: _Call, encode: Callable[[InferResponse, InferRequest], bytes]
    ) -> Answered:
        context = call.context
        left = context.time_remaining()
        infer = partial(
            self._service.infer, decoded, model=named.model, version=named.version, arrived=call.began,
            deadline=None if left is None else time.monotonic() + left,
            encode=lambda response: encode(response, decoded),
        )  # fmt: skip
        if self._tracing is None:
            answered = await infer()
            self._ledger.pulse.ran(asyncio.get_running_loop())
            return answered
        carrier = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        with self._tracing.inference("grpc", named.model, carrier) as span:
            answered = await infer()
            self._ledger.pulse.ran(asyncio.get_running_loop())
            span.answered(answered)
        return answered

    async def _stream(self, _: Any, context: Context) -> None:
        call = _Call(context, time.monotonic())
        error = await self._ran(context)
        if error is not None:
            self._write("ModelStreamInfer", "", call, _failed(error))
            await _abort(context, error)

    async def _ran(self, context: Context) -> ProtocolError | None:
        """Answers a stream until it ends; the error that it ends with."""
        try:
            with self._counted():
                stream = _Stream(self._streamed, context, self._ledger, self.port)
                self._streams.add(stream)
                try:
                    await stream.run(ended=self._stopping is not None)
                finally:
                    self._streams.discard(stream)
        except ProtocolError as error:
            return _told(error)
        return None

    async def _watch(self, _: Any, context: Context) -> None:
        call, end = _Call(context, time.monotonic()), _CANCELLED
        error: ProtocolError
        try:
            with self._probed():
                asked = parse(await self._message(context, _PROBE_S), HealthCheckRequest, self._limits)
            if self._watches >= _WATCHES:
                raise self._unread(ProtocolError(f"{_WATCHES} calls watch this server already: ask by Check", status=429))
            self._watches += 1
            try:
                await self._health.watch(asked.service, context.write)
            finally:
                self._watches -= 1
            error = RefusedRequestError("the server is shutting down: watch another one")
            end = _failed(error)
        except ProtocolError as failure:
            error = _told(failure)
            end = _failed(error)
        finally:
            self._write("Watch", "", call, end)
        await _abort(context, error)

    async def _streamed(self, wire: bytes, call: _Call) -> bytes:
        """The answer to one message of a stream, or the error, which ends nothing but this request."""
        identity = model = ""
        read = False
        try:
            with self._holding(len(wire)):
                read = True
                asked = [self._asked(wire, call)]
                del wire
                identity, model = asked[0].id, asked[0].model_name
                return await self.infer(asked.pop(), call, _encoded_for_stream)
        except Exception as failure:  # noqa: BLE001 - the stream has other requests
            error = _told(failure)
            if not read:
                self._write("ModelInfer", "", call, _failed(error))
            answer = messages.ModelStreamInferResponse(
                error_message=str(error), infer_response=messages.ModelInferResponse(id=identity, model_name=model)
            )
            return _final(answer)

    async def live(self, request: Any, call: _Call) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def ready(self, request: Any, call: _Call) -> Any:
        return messages.ServerReadyResponse(ready=self._service.ready)

    async def check(self, request: Any, call: _Call) -> Any:
        return self._health.check(request.service)

    async def model_ready(self, request: Any, call: _Call) -> Any:
        try:
            self._service.lease(request.name, request.version or None, canary=False).release()
        except ProtocolError:  # there is no such model or version, or none that can answer
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=self._service.ready)

    async def server_metadata(self, request: Any, call: _Call) -> Any:
        return server_message("muntin", VERSION)

    def _described(self, request: Any) -> ModelDescription:
        if not request.name:  # which the service takes for its only model
            raise ProtocolError(f"no model is named: this server has {self._service.name}", status=404)
        return self._service.describe(request.name, request.version or None)

    async def metadata(self, request: Any, call: _Call) -> Any:
        return metadata_message(self._described(request))

    async def configuration(self, request: Any, call: _Call) -> Any:
        return configuration_message(self._described(request))

    async def statistics(self, request: Any, call: _Call) -> Any:
        return statistics_message(self._service.statistics(request.name or None, request.version or None))

    async def index(self, request: Any, call: _Call) -> Any:
        return index_message(await self._control.indexed(ready=request.ready))

    async def load(self, request: Any, call: _Call) -> Any:
        await self._control.loaded(request.model_name, repository_parameters(request, self._limits))
        return messages.RepositoryModelLoadResponse()

    async def unload(self, request: Any, call: _Call) -> Any:
        await self._control.unloaded(request.model_name, repository_parameters(request, self._limits))
        return messages.RepositoryModelUnloadResponse()


_METHODS: dict[str, Callable[[GrpcFace], Handler]] = {
    "ServerLive": lambda face: face.live,
    "ServerReady": lambda face: face.ready,
    "ModelReady": lambda face: face.model_ready,
    "ServerMetadata": lambda face: face.server_metadata,
    "ModelMetadata": lambda face: face.metadata,
    "ModelInfer": lambda face: face.infer,
    "ModelConfig": lambda face: face.configuration,
    "ModelStatistics": lambda face: face.statistics,
    "RepositoryIndex": lambda face: face.index,
    "RepositoryModelLoad": lambda face: face.load,
    "RepositoryModelUnload": lambda face: face.unload,
}


class _Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Holds a call against the tokens as soon as its headers are there. `tell`: is told whom it turns away."""

    def __init__(self, tokens: Tokens, tell: Callable[[str, Context, ProtocolError], None]) -> None:
        self._tokens, self._tell = tokens, tell

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        if details.method not in _OPEN_PATHS:
            given = next((value for name, value in details.invocation_metadata or () if name == "authorization"), b"")
            try:
                self._tokens.check(given.encode() if isinstance(given, str) else given)
            except ProtocolError as error:
                return _refusing(error, partial(self._tell, details.method.rpartition("/")[2]))
        return await continuation(details)


_OPEN_PATHS = frozenset((*(f"/{SERVICE}/{name}" for name in _OPEN), *(f"/{HEALTH}/{name}" for name in ("Check", "Watch"))))


def _credentials(tls: Certificate) -> grpc.ServerCredentials:
    """Those that a certificate has, whenever somebody connects."""
    shown = tls.pem

    def renewed() -> Any:
        nonlocal shown
        if shown is tls.pem:
            return None
        shown = tls.pem
        return grpc.ssl_server_certificate_configuration([shown])

    return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([shown]), renewed)


def _subject(request: Any) -> str:
    """The model that a request names, if it may name one."""
    return str(getattr(request, "model_name", "") or getattr(request, "name", ""))


def _refusing(error: ProtocolError, tell: Callable[[Context, ProtocolError], None]) -> grpc.RpcMethodHandler:
    """A handler that answers with the error, whatever comes."""

    async def refuse(_: Any, context: Context) -> None:
        tell(context, error)
        await _abort(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)


class _Stream:
    """One stream: its requests are begun as they come, and answered in that order. It may stand still for `Bounds.idle_seconds`.

    It stands still while nothing is being computed and neither a message comes nor an answer goes. `ledger`: where answers count as held
    until they are sent. `port`: the server's.
    """

    def __init__(self, answer: Callable[[bytes, _Call], Coroutine[Any, Any, bytes]], context: Context, ledger: Ledger, port: int) -> None:
        self._answer, self._context, self._ledger, self._port = answer, context, ledger, port
        self._idle = ledger.bounds.idle_seconds
        self._unsent = 0
        """Bytes of answers."""
        self._room = asyncio.Semaphore(_STREAM_REQUESTS)
        self._begun: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._computing: set[asyncio.Task[bytes]] = set()
        self._patience = asyncio.timeout(None)
        self._going = False
        self._reading: asyncio.Task[None] | None = None

    def end(self) -> None:
        """From now on nothing more is read: once what has come is answered, `run` raises RefusedRequestError."""
        if self._reading is not None:
            self._reading.cancel()

    async def run(self, *, ended: bool = False) -> None:
        """Until the client has sent all and has its answers. Cancelled, it takes back what is computed. `ended`: as if `end` were called.

        Raises ProtocolError: 408 where it stands still, 503 after `end`.
        """
        writing = asyncio.create_task(self._write())
        writing.add_done_callback(lambda _: self._room.release())  # it failed: whoever waits for room is to see that
        reading = self._reading = asyncio.create_task(self._read(writing))
        if ended:
            self.end()
        try:
            async with self._patience:
                self._going = True
                self._moved()
                await asyncio.wait((reading,))  # which tells its end from this call's
                self._begun.put_nowait(None)
                await writing
                if reading.cancelled():
                    raise RefusedRequestError("the server is shutting down: go on in a stream to another one")
                await reading
        except TimeoutError:
            if self._unsent:  # its client does not read
                _hang_up(self._context, self._port)
            raise ProtocolError(f"the stream stood still for {self._idle:g} s", status=408) from None
        finally:
            self._going = False
            self._hold(-self._unsent)  # before what follows: this may be cancelled there once more
            self._reading = None
            left = [reading, writing, *self._computing]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _read(self, writing: asyncio.Task[None]) -> None:
        while not writing.done():
            await self._room.acquire()
            wire = await self._context.read()
            if wire is grpc.aio.EOF:
                break
            came = self._ledger.pulse.came(asyncio.get_running_loop())
            task = asyncio.create_task(self._answer(wire, _Call(self._context, came)))
            del wire  # or the last one would stay until the next comes
            self._computing.add(task)
            task.add_done_callback(self._computed)
            self._begun.put_nowait(task)
            del task  # as of `wire`: it holds its answer
            self._moved()

    def _computed(self, task: asyncio.Task[bytes]) -> None:
        self._computing.discard(task)
        if self._going and not task.cancelled() and task.exception() is None:
            self._hold(len(task.result()))
        self._moved()

    def _hold(self, count: int) -> None:
        self._unsent += count
        self._ledger.held += count

    async def _write(self) -> None:
        while (task := await self._begun.get()) is not None:
            answer = await task
            with _patient(self._context, self._ledger.bounds.body_seconds, self._port):
                await self._context.write(answer)
            self._hold(-min(self._unsent, len(answer)))
            del task, answer  # or they would stay until there is another one
            self._room.release()
            self._moved()

    def _moved(self) -> None:
        """It does not stand still: its time begins anew, or, where something is computed, later."""
        if self._going and not self._patience.expired():
            self._patience.reschedule(None if self._computing else asyncio.get_running_loop().time() + self._idle)


@contextmanager
def _patient(context: Context, seconds: float, port: int) -> Iterator[None]:
    """Around the sending of an answer: who has not taken it in so many seconds loses the connection."""
    patience = asyncio.get_running_loop().call_later(seconds, _hang_up, context, port)
    try:
        yield
    finally:
        patience.cancel()


def _hang_up(context: Context, port: int) -> None:
    """Ends the connection that a call came on, which grpc has no way to: to the port `port`, from where the call says that it is from.

    Where the system lists no open files nothing is done, and what that client does not read goes on to count as held.
    """
    peer = unquote(context.peer())
    for entry in tuple(_DESCRIPTORS.iterdir()) if _DESCRIPTORS.is_dir() else ():
        # A copy, of whatever it is, with room for the longer addresses. What is no connection between two raises one of these; the
        # name of a socket of this machine alone is text, or bytes.
        with suppress(OSError, ValueError), socket.fromfd(int(entry.name), socket.AF_INET6, socket.SOCK_STREAM) as found:
            here, there = found.getsockname(), found.getpeername()
            if not (isinstance(here, tuple) and isinstance(there, tuple)):
                continue
            host, from_port = there[:2]
            names = f"ipv4:{host.removeprefix('::ffff:')}:{from_port}", f"ipv6:[{host}]:{from_port}"
            if here[1] == port and peer in names:
                found.shutdown(socket.SHUT_RDWR)


def _fault(error: Exception) -> ProtocolError:
    """What a client is told of an error that nobody foresaw: no more than its kind. All of it is reported to the loop."""
    asyncio.get_running_loop().call_exception_handler({"message": "a call failed", "exception": error})
    return ProtocolError(f"the server failed ({type(error).__name__})", status=500)


def _told(error: Exception) -> ProtocolError:
    """What a client is told of an error."""
    return bare(error if isinstance(error, ProtocolError) else _fault(error))


async def _abort(context: Context, error: ProtocolError) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, RefusedRequestError):  # the first as over HTTP, the second is what clients that try again by themselves heed
        again = max(1, math.ceil(error.retry_after))
        trailing = (("retry-after", str(again)), ("grpc-retry-pushback-ms", str(1000 * again)))
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), trailing)
