"""The gRPC face: the same service, on the same event loop, for `tritonclient.grpc` and `perf_analyzer -i grpc`.

Handlers are registered by name, no generated service code is needed. What a client may send is bounded before it is read: grpc counts a
message's bytes, `wire` what protobuf would make of them, and this server the messages that are being answered.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from typing import Any

import grpc

from muntin.serving import open_inference_pb2 as messages
from muntin.serving.access_log import AccessLog
from muntin.serving.control import Control
from muntin.serving.description import ModelDescription
from muntin.serving.grpc_codec import (
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
from muntin.serving.protocol import InferRequest, Limits, ProtocolError
from muntin.serving.service import Answered, RefusedRequestError, Service
from muntin.serving.tokens import Tokens
from muntin.serving.tracing import Tracing
from muntin.serving.wire import parse

Context = Any
Handler = Callable[[Any, Context], Awaitable[Any]]
_ENVELOPE = 1 << 16
"""Bytes that a message may have beside its tensors."""
_OPEN = ("ServerLive", "ServerReady")


class GrpcFace:
    """Serves on `address` ("127.0.0.1:8001"; port 0: any that is free, see `port`). `tls`: (certificate, key) in PEM."""

    def __init__(
        self,
        service: Service,
        control: Control,
        *,
        limits: Limits,
        tokens: tuple[str, ...],
        log: AccessLog | None,
        in_flight: int,
        tls: tuple[bytes, bytes] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._service, self._control, self._limits, self._log = service, control, limits, log
        self._tokens = Tokens(tokens)
        self._tls, self._tracing = tls, tracing
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=in_flight,
            options=[
                ("grpc.max_receive_message_length", limits.body_bytes + _ENVELOPE),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a port that is taken is an error
                ("grpc.max_metadata_size", 16 * 1024),
            ],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self.port = 0

    async def start(self, address: str) -> None:
        """Raises OSError where the address cannot be had."""
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                certificate, key = self._tls
                self.port = self._server.add_secure_port(address, grpc.ssl_server_credentials([(key, certificate)]))
        except RuntimeError as error:
            raise OSError(None, f"cannot listen on it ({error})", address) from error
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Takes no new calls, and gives those in flight so long."""
        await self._server.stop(seconds)

    def _handlers(self) -> grpc.GenericRpcHandler:
        handlers = {}
        for method in METHODS:
            write = method.response.SerializeToString
            if method.streams:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._stream, response_serializer=write)
            else:
                handler = self._guarded(method, _METHODS[method.name](self))
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(handler, response_serializer=write)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _guarded(self, method: Method, handler: Handler) -> Handler:
        """The handler of a method behind the token, with what it is asked read from the wire, and its errors as gRPC statuses."""

        async def handle(wire: bytes, context: Context) -> Any:
            try:
                if method.name not in _OPEN:
                    self._authorise(context)
                return await handler(parse(wire, method.request, self._limits), context)
            except ProtocolError as error:
                await _abort(context, error)

        return handle

    def _authorise(self, context: Context) -> None:
        if self._tokens:
            given = next((value for name, value in context.invocation_metadata() or () if name == "authorization"), b"")
            self._tokens.check(given.encode() if isinstance(given, str) else given)

    async def infer(self, request: messages.ModelInferRequest, context: Context) -> messages.ModelInferResponse:
        began, outcome, status, response, answered = time.monotonic(), "answered", "OK", None, None
        try:
            decoded = decode_infer(request, self._limits)
            answered = await self._answered(decoded, request, context, began)
            response = encode_infer(answered.response, decoded.outputs)
            return response
        except ProtocolError as error:
            outcome, status = ("refused" if error.status == 503 else "failed" if error.status >= 500 else "wrong"), error.grpc_code
            raise
        except asyncio.CancelledError:
            outcome, status = "cancelled", "CANCELLED"
            raise
        finally:
            self._service.metrics.requests["grpc", outcome] += 1
            if self._log is not None:
                self._log.write(
                    face="grpc",
                    client=context.peer(),
                    method="ModelInfer",
                    path=request.model_name,
                    status=status,
                    sent=0 if response is None else sum(map(len, response.raw_output_contents)),
                    seconds=time.monotonic() - began,
                    request_id=request.id,
                    answered=answered,
                )

    async def _answered(self, decoded: InferRequest, request: messages.ModelInferRequest, context: Context, began: float) -> Answered:
        model, version_ = request.model_name, request.model_version or None
        if self._tracing is None:
            return await self._service.infer(decoded, model=model, version=version_, arrived=began)
        carrier = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        with self._tracing.inference("grpc", model, carrier) as span:
            answered = await self._service.infer(decoded, model=model, version=version_, arrived=began)
            span.answered(answered)
        return answered

    async def _stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        try:
            self._authorise(context)
        except ProtocolError as error:
            await _abort(context, error)
        async for wire in requests:
            try:
                response = await self.infer(parse(wire, messages.ModelInferRequest, self._limits), context)
            except ProtocolError as error:
                yield messages.ModelStreamInferResponse(error_message=str(error))
            else:
                yield messages.ModelStreamInferResponse(infer_response=response)

    async def live(self, request: Any, context: Context) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def ready(self, request: Any, context: Context) -> Any:
        return messages.ServerReadyResponse(ready=self._service.ready)

    async def model_ready(self, request: Any, context: Context) -> Any:
        try:
            self._service.lease(request.name, request.version or None).release()
        except ProtocolError:  # there is no such model or version, or none that can answer
            return messages.ModelReadyResponse(ready=False)
        return messages.ModelReadyResponse(ready=self._service.ready)

    async def server_metadata(self, request: Any, context: Context) -> Any:
        return server_message("muntin", version("muntin"))

    def _described(self, request: Any) -> ModelDescription:
        if not request.name:  # which the service takes for its only model
            raise ProtocolError(f"no model is named: this server has {self._service.name}", status=404)
        return self._service.describe(request.name, request.version or None)

    async def metadata(self, request: Any, context: Context) -> Any:
        return metadata_message(self._described(request))

    async def configuration(self, request: Any, context: Context) -> Any:
        return configuration_message(self._described(request))

    async def statistics(self, request: Any, context: Context) -> Any:
        return statistics_message(self._service.statistics(request.name or None, request.version or None))

    async def index(self, request: Any, context: Context) -> Any:
        return index_message(self._control.index(ready=request.ready))

    async def load(self, request: Any, context: Context) -> Any:
        await asyncio.to_thread(self._control.load, request.model_name, repository_parameters(request, self._limits))
        return messages.RepositoryModelLoadResponse()

    async def unload(self, request: Any, context: Context) -> Any:
        await asyncio.to_thread(self._control.unload, request.model_name, repository_parameters(request, self._limits))
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


async def _abort(context: Context, error: ProtocolError) -> None:
    again = math.ceil(error.retry_after) if isinstance(error, RefusedRequestError) else 0
    trailing = (("retry-after", str(max(1, again))),) if again else ()
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), trailing)
