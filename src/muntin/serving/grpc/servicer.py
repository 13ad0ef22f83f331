"""The methods of the gRPC service: each reads a message, calls the service as the HTTP server does, and encodes the answer.

Functions that wait hold either a request or its answer, never both, so a call's memory is what it counts as.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grpc

from muntin.serving.grpc.calls import ANSWERED, CANCELLED, Calls, Context, End, RpcCall, unforeseen
from muntin.serving.grpc.stream import ComputeAnswer, InferenceStream
from muntin.serving.inference.service import Answered, Service
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import LACKING, METHODS, SERVICE, Method, decode_infer, encode_infer, repository_parameters
from muntin.serving.protocol.messages import InferRequest, InferResponse, Limits, ProtocolError
from muntin.serving.protocol.metadata import (
    VERSION,
    ModelDescription,
    configuration_document,
    index_document,
    metadata_document,
    server_document,
    statistics_document,
)
from muntin.serving.protocol.wire import parse
from muntin.serving.telemetry.tracing import Tracing, set_answer
from muntin.serving.versions.control import Control

ENVELOPE_BYTES = 1 << 16
"""Maximum bytes of a message beside its tensors."""
MAX_MESSAGE_BYTES = (1 << 31) - 1
"""Maximum length of a message in grpc and protobuf."""
Document = Mapping[str, Any]
"""The fields of an answer, as in JSON over HTTP."""


class _Request(NamedTuple):
    """A request for inference. `size`: bytes of its message."""

    inputs: InferRequest
    model: str
    version: str | None
    size: int


class Servicer:
    """The methods of `inference.GRPCInferenceService`. `stopping`: set when the server shuts down, which ends streams."""

    def __init__(
        self,
        service: Service,
        control: Control,
        calls: Calls,
        *,
        limits: Limits,
        tracing: Tracing | None,
        stopping: asyncio.Event,
    ) -> None:
        self._service, self._control, self._calls = service, control, calls
        self._limits, self._tracing, self._stopping = limits, tracing, stopping

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of all methods, including those that are refused by name."""
        answers: Mapping[str, Callable[[Any], Document | Awaitable[Document]]] = {
            "ModelReady": self._model_ready,
            "ServerMetadata": lambda request: server_document("muntin", VERSION),
            "ModelMetadata": lambda request: metadata_document(self._description(request)),
            "ModelConfig": lambda request: {"config": configuration_document(self._description(request))},
            "ModelStatistics": lambda request: statistics_document(self._service.statistics(request.name or None, request.version or None)),
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        handler = self._calls.handler
        handlers = {
            "ServerLive": handler("ServerLive", self._live, needs_token=False),
            "ServerReady": handler("ServerReady", self._ready, needs_token=False),
            "ModelInfer": handler("ModelInfer", self._infer),
            "ModelStreamInfer": handler("ModelStreamInfer", self._stream, logs_success=False),
            **{name: handler(name, partial(_refuse, reason)) for name, reason in LACKING.items()},
        }
        for method in METHODS:
            if method.name in answers:
                handlers[method.name] = handler(method.name, partial(self._answer, method, answers[method.name]))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    # These messages are empty, so they are not awaited, and no slot is taken.

    async def _live(self, call: RpcCall) -> None:
        await self._calls.send(call, messages.ServerLiveResponse(live=True).SerializeToString())

    async def _ready(self, call: RpcCall) -> None:
        await self._calls.send(call, messages.ServerReadyResponse(ready=self._service.ready).SerializeToString())

    # Inference.

    async def _infer(self, call: RpcCall) -> None:
        with self._calls.places.take():
            await self._calls.send(call, await self._computed(call))

    async def _computed(self, call: RpcCall) -> bytes:
        return await self._compute(self._decode(await self._calls.message(call), call), call, stream=False)

    async def _stream(self, call: RpcCall) -> None:
        with self._calls.places.take():
            await InferenceStream(partial(self._begin, call.context), call.context, self._calls.ledger, self._stopping).run()

    def _begin(self, context: Context, wire: bytes) -> ComputeAnswer:
        """Decode one request of a stream. An error ends this request, not the stream."""
        call = RpcCall(context, "ModelInfer", time.monotonic())
        try:
            request = self._decode(wire, call)
        except ProtocolError as error:
            self._calls.log(call, End.of(error))
            answer = _stream_error(error, call)

            async def refused() -> bytes:
                return answer

            return refused

        async def compute() -> bytes:
            try:
                return await self._compute(request, call, stream=True)
            except ProtocolError as error:
                return _stream_error(error, call)

        return compute

    def _decode(self, wire: bytes, call: RpcCall) -> _Request:
        """Decode a request. Raises ProtocolError, which is counted here unless the message is refused unread."""
        self._calls.check_room(len(wire))
        try:
            message = parse(wire, messages.ModelInferRequest, self._limits)
            call.model, call.request_id = message.model_name, message.id
            return _Request(decode_infer(message, self._limits), message.model_name, message.model_version or None, len(wire))
        except ProtocolError as error:
            self._count(error.outcome)
            raise

    async def _compute(self, request: _Request, call: RpcCall, *, stream: bool) -> bytes:
        """Return the encoded answer. Counts and logs the request. Raises only ProtocolError."""
        end, answered = CANCELLED, None
        try:
            with unforeseen(), self._calls.holding(request.size):
                answered = await self._traced(request, call, stream=stream)
            end = ANSWERED
            answer = answered.encoded
            assert isinstance(answer, bytes)
            call.sent = len(answer)
            return answer
        except ProtocolError as error:
            end = End.of(error)
            raise
        finally:
            self._count(end.outcome)
            self._calls.log(call, end, answered)

    async def _traced(self, request: _Request, call: RpcCall, *, stream: bool) -> Answered:
        left = call.context.time_remaining()
        infer = partial(
            self._service.infer, request.inputs, model=request.model, version=request.version, arrived=call.arrived,
            deadline=None if left is None else time.monotonic() + left,
            encode=partial(_encode, request=request.inputs, stream=stream),
        )  # fmt: skip
        if self._tracing is None:
            return await infer()
        carrier = {name: value for name, value in call.context.invocation_metadata() or () if isinstance(value, str)}
        with self._tracing.inference("grpc", request.model, carrier) as span:
            answered = await infer()
            set_answer(span, answered)
        return answered

    def _count(self, outcome: str) -> None:
        self._service.metrics.requests["grpc", outcome] += 1

    # Everything else.

    async def _answer(self, method: Method, answer: Callable[[Any], Document | Awaitable[Document]], call: RpcCall) -> None:
        with self._calls.places.take():
            wire = await self._calls.message(call)
            self._calls.check_room(len(wire))
            with self._calls.holding(len(wire)):
                request = parse(wire, method.request, self._limits)
                call.model = str(getattr(request, "model_name", "") or getattr(request, "name", ""))
                answered = answer(request)
                document = await answered if isinstance(answered, Awaitable) else answered
            await self._calls.send(call, messages.from_document(document, method.response).SerializeToString())

    def _model_ready(self, request: Any) -> Document:
        try:
            self._service.lease(request.name, request.version or None, canary=False).release()
        except ProtocolError:  # no such model or version, or it cannot answer
            return {"ready": False}
        return {"ready": self._service.ready}

    def _description(self, request: Any) -> ModelDescription:
        if not request.name:  # the service would use its only model
            raise ProtocolError(f"no model is named: this server has {self._service.name}", status=404)
        return self._service.describe(request.name, request.version or None)

    async def _index(self, request: Any) -> Document:
        return {"models": index_document(await self._control.indexed(ready=request.ready))}

    async def _load(self, request: Any) -> Document:
        await self._control.loaded(request.model_name, repository_parameters(request, self._limits))
        return {}

    async def _unload(self, request: Any) -> Document:
        await self._control.unloaded(request.model_name, repository_parameters(request, self._limits))
        return {}


async def _refuse(reason: str, call: RpcCall) -> None:
    raise ProtocolError(reason, status=501)


def _encode(response: InferResponse, *, request: InferRequest, stream: bool) -> bytes:
    """Encode an answer, on any thread. Raises ProtocolError if it is longer than a message can be."""
    nbytes = sum(output.data.nbytes for output in response.outputs)
    if nbytes > MAX_MESSAGE_BYTES - ENVELOPE_BYTES:
        raise ProtocolError(f"an answer of {nbytes:,} bytes is longer than a gRPC message can be: ask for less, or over HTTP", status=413)
    answer = encode_infer(response, request.outputs)
    return _final(messages.ModelStreamInferResponse(infer_response=answer)) if stream else bytes(answer.SerializeToString())


def _stream_error(error: ProtocolError, call: RpcCall) -> bytes:
    response = messages.ModelInferResponse(id=call.request_id, model_name=call.model)
    return _final(messages.ModelStreamInferResponse(error_message=str(error), infer_response=response))


def _final(answer: messages.ModelStreamInferResponse) -> bytes:
    answer.infer_response.parameters["triton_final_response"].bool_param = True  # a request has one answer
    return bytes(answer.SerializeToString())
