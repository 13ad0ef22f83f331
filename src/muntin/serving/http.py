"""The HTTP face: the Open Inference Protocol, a route for pictures, metrics and a description of it all, as one ASGI application.

    POST /v2/models/NAME[/versions/V]/infer        tensors as JSON or as bytes
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready|/config|/stats]
    POST /v2/repository/index, /v2/repository/models/NAME/load|unload
    POST /predict?output=mask|overlay|labels|json  a PNG, JPEG or WebP file in, a picture or JSON out
    GET  /metrics, /openapi.json

Requests for inference go by before the router: at the rates of a small classifier its hundred microseconds would count.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from muntin.serving.access_log import AccessLog
from muntin.serving.control import Control
from muntin.serving.description import (
    configuration_document,
    index_document,
    metadata_document,
    server_document,
    statistics_document,
)
from muntin.serving.json_codec import (
    HEADER_LENGTH,
    decode_index_request,
    decode_raw_request,
    decode_repository_request,
    decode_request,
    encode_json,
    encode_response,
    parse_header_length,
)
from muntin.serving.openapi import openapi
from muntin.serving.pictures import Pictures
from muntin.serving.protocol import InferRequest, Limits, ProtocolError
from muntin.serving.service import INPUT, Answered, RefusedRequestError, Service
from muntin.serving.tensors import Buffer
from muntin.serving.tokens import Tokens
from muntin.serving.tracing import Tracing

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_OCTETS = (b"content-type", b"application/octet-stream")
_SMALL = 1 << 14
"""Bytes of an answer below which its parts are put together: copying them costs less than sending them one by one."""
_OPEN = ("/v2/health/live", "/v2/health/ready")
"""What needs no token: whoever starts and stops servers asks for it."""


class HttpFace:
    """The ASGI application. `tokens`: of which a request must carry one; empty: none is asked for."""

    def __init__(
        self,
        service: Service,
        control: Control,
        pictures: Pictures,
        *,
        limits: Limits,
        tokens: tuple[str, ...],
        log: AccessLog | None,
        tracing: Tracing | None = None,
    ) -> None:
        self._service, self._control, self._pictures = service, control, pictures
        self._limits, self._log, self._tracing = limits, log, tracing
        self._tokens = Tokens(tokens)
        self._routes = Starlette(routes=self._table(), exception_handlers={ProtocolError: _error_response, HTTPException: _error_response})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._log)
        try:
            await self._answer(exchange, scope, receive)
        except ProtocolError as error:
            await exchange.error(error)
        except asyncio.CancelledError:
            exchange.outcome = "cancelled"  # the client has gone: nobody is left to tell
        finally:
            if exchange.face is not None:
                self._service.metrics.requests.labels("http", exchange.outcome).inc()
            exchange.log()

    async def _answer(self, exchange: _Exchange, scope: Scope, receive: Receive) -> None:
        path = scope["path"]
        if self._tokens and path not in _OPEN:
            self._tokens.check(next((value for name, value in scope["headers"] if name == b"authorization"), b""))
        found = _INFER.fullmatch(path)
        if found is None:
            await self._routes(scope, receive, exchange.send)
        elif scope["method"] != "POST":
            raise ProtocolError(f"{scope['method']} {path[:100]}: use POST", status=405)
        else:
            exchange.face = "infer"
            if self._tracing is None:
                await self._infer(exchange, scope, receive, *found.groups())
                return
            carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            with self._tracing.inference("http", found[1], carrier) as span:
                await self._infer(exchange, scope, receive, *found.groups())
                if exchange.answered is not None:
                    span.answered(exchange.answered)

    async def _infer(self, exchange: _Exchange, scope: Scope, receive: Receive, model: str, version: str | None) -> None:
        body = await _body(receive)
        arrived = time.monotonic()
        header_length = None
        for name, value in scope["headers"]:
            if name == _HEADER_LENGTH:
                header_length = parse_header_length(value.decode("latin-1"))
            elif name == b"content-encoding" and value not in (b"", b"identity"):
                raise ProtocolError(f"content-encoding {value.decode('latin-1')[:40]}: send the body as it is", status=415)
        request = self._decode(body, header_length, model, version)
        answered = await self._service.infer(request, model=model, version=version, arrived=arrived)
        parts, length = encode_response(answered.response, request.outputs, binary_default=request.binary_default)
        headers = [_OCTETS if length is not None else _JSON, (b"content-length", b"%d" % sum(map(len, parts)))]
        if length is not None:
            headers.append((_HEADER_LENGTH, b"%d" % length))
        exchange.answered, exchange.request_id = answered, request.id
        await exchange.reply(200, headers, parts)

    def _decode(self, body: Buffer, header_length: int | None, model: str, version: str | None) -> InferRequest:
        if header_length != 0:
            return decode_request(body, header_length, self._limits)
        with self._service.lease(model, version) as lease:
            channels = lease.version.signature.channels
        side = math.isqrt(len(body) // channels)
        if not body or side * side * channels != len(body):
            raise ProtocolError(
                f"{len(body):,} raw bytes: without JSON they have to be one square image of {channels} channels; "
                "send JSON that says the shape"
            )
        return decode_raw_request(body, INPUT, "UINT8", (1, side, side, channels), self._limits)

    # ---- everything else ----

    def _table(self) -> list[Route]:
        return [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST", "GET"]),
            Route("/v2/repository/models/{model}/load", self._load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", self._unload, methods=["POST"]),
            *(
                Route(f"/v2/models/{{model}}{middle}{end}", handler)
                for end, handler in (
                    ("", self._metadata),
                    ("/ready", self._model_ready),
                    ("/config", self._config),
                    ("/stats", self._statistics),
                )
                for middle in ("", "/versions/{version}")
            ),
            Route("/v2/models/stats", self._statistics),
            Route("/predict", self._predict, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]

    async def _server(self, request: Request) -> Response:
        return _json(server_document("muntin", version("muntin")))

    async def _live(self, request: Request) -> Response:
        return Response(status_code=200)

    async def _ready(self, request: Request) -> Response:
        return Response(status_code=200 if self._service.ready else 503)

    async def _metadata(self, request: Request) -> Response:
        return _json(metadata_document(self._service.describe(*_named(request))))

    async def _model_ready(self, request: Request) -> Response:
        try:
            self._service.describe(*_named(request))
        except RefusedRequestError:
            return Response(status_code=503)
        return Response(status_code=200 if self._service.ready else 503)

    async def _config(self, request: Request) -> Response:
        return _json(configuration_document(self._service.describe(*_named(request))))

    async def _statistics(self, request: Request) -> Response:
        model, version = _named(request)
        return _json(statistics_document(self._service.statistics(model, version)))

    async def _index(self, request: Request) -> Response:
        ready = decode_index_request(await request.body(), self._limits)
        return _json(index_document(self._control.index(ready=ready)))

    async def _load(self, request: Request) -> Response:
        parameters = decode_repository_request(await request.body(), self._limits)
        await asyncio.to_thread(self._control.load, request.path_params["model"], parameters)
        return _json({})

    async def _unload(self, request: Request) -> Response:
        parameters = decode_repository_request(await request.body(), self._limits)
        await asyncio.to_thread(self._control.unload, request.path_params["model"], parameters)
        return _json({})

    async def _predict(self, request: Request) -> Response:
        query = {name: values[-1] for name, values in parse_qs(request.url.query, max_num_fields=16).items()}
        answer = await self._pictures.answer(await request.body(), query)
        return Response(answer.content, media_type=answer.media_type, headers=answer.headers)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi(self._service.name))


class _Exchange:
    """One request and its answer, as the log and the metrics see it."""

    def __init__(self, scope: Scope, send: Send, log: AccessLog | None) -> None:
        self._scope, self._send, self._log = scope, send, log
        self._began = time.monotonic()
        self.status, self.sent = 0, 0
        self.face: str | None = None
        self.outcome = "answered"
        self.answered: Answered | None = None
        self.request_id = ""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.sent += len(message.get("body", b""))
        await self._send(message)

    async def reply(self, status: int, headers: list[tuple[bytes, bytes]], parts: list[Any]) -> None:
        self.status, self.sent = status, sum(map(len, parts))
        if self.sent <= _SMALL:
            parts = [b"".join(parts)]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        for number, part in enumerate(parts, 1):
            await self._send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    async def error(self, error: ProtocolError) -> None:
        self.outcome = "refused" if error.status == 503 else "failed" if error.status >= 500 else "wrong"
        headers = [_JSON, *((name.encode(), value.encode()) for name, value in error_headers(error).items())]
        body = encode_json({"error": str(error)})
        await self.reply(error.status, [*headers, (b"content-length", b"%d" % len(body))], [body])

    def log(self) -> None:
        if self._log is None:
            return
        client = self._scope.get("client")
        self._log.write(
            face="http",
            client=client[0] if client else "",
            method=self._scope["method"],
            path=self._scope["path"],
            status=self.status,
            sent=self.sent,
            seconds=time.monotonic() - self._began,
            request_id=self.request_id,
            answered=self.answered,
        )


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProtocolError | HTTPException)
    if isinstance(error, HTTPException):
        allowed = (error.headers or {}).get("Allow")
        text = f"{request.method} {request.url.path[:100]}: {error.detail}" + (
            f", use {allowed}" if allowed else "; /openapi.json lists the routes"
        )
        return Response(encode_json({"error": text}), error.status_code, error.headers, "application/json")
    return Response(encode_json({"error": str(error)}), error.status, error_headers(error), "application/json")


def error_headers(error: ProtocolError) -> dict[str, str]:
    """The header fields that go with an error."""
    if isinstance(error, RefusedRequestError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


def _json(document: object) -> Response:
    return Response(encode_json(document), media_type="application/json")


def _named(request: Request) -> tuple[str | None, str | None]:
    return request.path_params.get("model"), request.path_params.get("version")


async def _body(receive: Receive) -> Buffer:
    """The whole body: a `BoundedConnection` gives it in one piece, other servers in several."""
    message = await receive()
    if not message.get("more_body"):
        body: Buffer = message.get("body", b"")
        return body
    parts = [message["body"]]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)
