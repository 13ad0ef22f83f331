"""The ASGI application: the Open Inference Protocol, a picture route, metrics, and an OpenAPI description.

    POST /v2/models/NAME[/versions/V]/infer        tensors as JSON or as bytes
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready|/config|/stats]
    POST /v2/repository/index, /v2/repository/models/NAME/load|unload
    POST /predict?output=mask|overlay|labels|json&version=V  a picture file in, alone or in a form; a picture or JSON out
    GET  /, /page/...                              the page (`page.routes`)
    GET  /metrics, /openapi.json

Every request passes the same steps: limit of requests in flight, token, headers, body, route, access log.
"""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import nullcontext
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from muntin.errors import DataError, MuntinError
from muntin.serving.http.bodies import Body, ClientLeftError, Message, Receive, Scope, Send
from muntin.serving.http.exchange import LEFT, Exchange
from muntin.serving.http.forms import form_file, is_form
from muntin.serving.http.image_route import ImageRoute, PictureAnswer
from muntin.serving.http.inference import INFER, PLAIN, InferenceRoute, headers_by_name, read_head
from muntin.serving.http.loop_lag import LoopLag
from muntin.serving.http.page.routes import PageRoutes
from muntin.serving.inference.service import Service
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.json_codec import decode_index_request, decode_repository_request, encode_json
from muntin.serving.protocol.messages import LACKING, Limits, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.metadata import (
    VERSION,
    configuration_document,
    index_document,
    metadata_document,
    server_document,
    statistics_document,
)
from muntin.serving.protocol.openapi import openapi
from muntin.serving.security.bearer_tokens import Tokens
from muntin.serving.security.same_origin import check_origin
from muntin.serving.telemetry.access_log import AccessLog
from muntin.serving.telemetry.tracing import Tracing
from muntin.serving.versions.control import Control

_EXTENSION = re.compile(r"/v2/(?:models/[^/]+/(?:versions/[^/]+/)?)?(?:system|cuda)?(trace/setting|logging|sharedmemory)(?:/.*)?")
"""Paths of Triton's extensions that are not supported."""
_NO_TOKEN = ("/v2/health/live", "/v2/health/ready")
"""Paths that anybody may ask for: orchestrators do."""
_ALWAYS = frozenset((*_NO_TOKEN, "/metrics"))
"""Paths that are answered beyond the limit of requests in flight, so that a busy server does not look dead."""
_JSON = (b"content-type", b"application/json")


class HttpApp:
    """The application. `tokens`: as of `Tokens`. `local`, `hosts`: as in `check_origin`. `page`: None if there is none."""

    def __init__(
        self,
        service: Service,
        control: Control,
        pictures: ImageRoute,
        *,
        limits: Limits,
        budget: MemoryBudget,
        tokens: tuple[str, ...],
        log: AccessLog | None,
        tracing: Tracing | None = None,
        local: bool = False,
        hosts: tuple[str, ...] = (),
        page: PageRoutes | None = None,
    ) -> None:
        self._service, self._control, self._pictures = service, control, pictures
        self._limits, self._budget, self._log, self._tracing = limits, budget, log, tracing
        self._local, self._hosts = local, hosts
        self._tokens = Tokens(tokens)
        self._inference = InferenceRoute(service, limits=limits, tracing=tracing)
        self._page = page
        self._open_paths = {*_NO_TOKEN, *(() if page is None else page.files)}
        self._router = Router(self._routes(page), redirect_slashes=False)  # a redirect would lead to the host that the request names
        self._in_flight: set[Exchange] = set()
        self._lag = LoopLag()

    @property
    def in_flight(self) -> int:
        """Requests that are being received or answered."""
        return len(self._in_flight)

    def cut(self) -> int:
        """End all requests in flight; those whose answer has not begun get 503. Returns their number."""
        for exchange in self._in_flight:
            exchange.cancel()
        return len(self._in_flight)

    def close(self) -> None:
        """End the thread that unpacks bodies."""
        self._inference.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r}: this application speaks http only")
        exchange, body = Exchange(scope, send, self._budget, lag=self._lag.observe()), Body(scope, self._budget)
        self._in_flight.add(exchange)
        outcome = "failed"
        try:
            outcome = await self._answer(exchange, body, receive)
        finally:
            body.release()
            self._in_flight.discard(exchange)
            if INFER.fullmatch(scope["path"]) or scope["path"] == "/predict":
                self._service.metrics.requests["http", outcome] += 1
            if self._log is not None:
                exchange.write(self._log)
        if not body.complete and exchange.status not in (0, LEFT):
            self._budget.refused[exchange.status] += 1
            if not any(name == b"expect" for name, _ in scope["headers"]):  # such a client has not begun to send
                await body.drain(receive)

    async def _answer(self, exchange: Exchange, body: Body, receive: Receive) -> str:
        """Answer a request or its error. Returns the outcome for the metrics."""
        try:
            await self._route(exchange, body, receive)
            return "answered"
        except ClientLeftError:
            exchange.status = LEFT
            return "cancelled"
        except asyncio.CancelledError:
            if not exchange.client_left and not exchange.status:
                await self._refuse(exchange, *refusal_of(RefusedRequestError("the server is shutting down"), exchange.scope))
                return "refused"
            exchange.status = exchange.status or LEFT
            return "cancelled"
        except Exception as error:  # noqa: BLE001 - answered, and reported to the loop's handler if unforeseen
            refusal, headers = refusal_of(error, exchange.scope)
            if not exchange.status:
                await self._refuse(exchange, refusal, headers if body.complete else headers | {"connection": "close"})
            return refusal.outcome

    async def _route(self, exchange: Exchange, body: Body, receive: Receive) -> None:
        scope = exchange.scope
        if len(self._in_flight) > self._budget.bounds.connections and scope["path"] not in _ALWAYS:
            raise RefusedRequestError(f"{self._budget.bounds.connections} requests are in flight already (--max-connections)")
        if scope["path"] not in self._open_paths:
            if self._tokens:  # no other site's page has one
                self._tokens.check(next((value for name, value in scope["headers"] if name == b"authorization"), b""))
            else:
                check_origin(scope["headers"], local=self._local, hosts=self._hosts)
        head = read_head(scope)
        await body.read(receive)
        with exchange.watched(receive):
            if head is not None:
                await self._inference.answer(exchange, head, body.data, arrived=exchange.arrived(whole_at_once=body.at_once))
                return
            scope["app"] = self  # so that Starlette's router raises HTTPException for unknown paths

            async def whole_body() -> Message:
                return {"type": "http.request", "body": body.data, "more_body": False}

            await self._router(scope, whole_body, exchange.send)

    async def _refuse(self, exchange: Exchange, error: ProtocolError, headers: dict[str, str]) -> None:
        fields = [_JSON, *((name.encode(), value.encode()) for name, value in headers.items())]
        await exchange.reply(error.status, fields, encode_json({"error": str(error)}))

    # ---- routes ----

    def _routes(self, page: PageRoutes | None) -> list[Route]:
        return [
            *(() if page is None else page.routes()),
            Route("/v2", self._server),
            Route("/v2/", self._server, include_in_schema=False),  # as the protocol's own OpenAPI document spells it
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST", "GET"]),
            Route("/v2/repository/models/{model}/load", self._load, methods=["POST"]),
            Route("/v2/repository/models/{model}/unload", self._unload, methods=["POST"]),
            Route("/v2/models/stats", self._statistics),  # before the model of that name
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
            Route("/predict", self._predict, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]

    async def _server(self, request: Request) -> Response:
        return _json(server_document("muntin", VERSION))

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        return _json({"live": True, "ready": self._service.ready}, 200 if self._service.ready else 503)

    async def _metadata(self, request: Request) -> Response:
        return _json(metadata_document(self._service.describe(*_named(request))))

    async def _model_ready(self, request: Request) -> Response:
        try:
            ready = bool(self._service.describe(*_named(request)).versions) and self._service.ready
        except RefusedRequestError:
            ready = False
        return _json({"name": self._service.name, "ready": ready}, 200 if ready else 503)

    async def _config(self, request: Request) -> Response:
        return _json(configuration_document(self._service.describe(*_named(request))))

    async def _statistics(self, request: Request) -> Response:
        model, version = _named(request)
        return _json(statistics_document(self._service.statistics(model, version)))

    async def _index(self, request: Request) -> Response:
        ready = decode_index_request(await _plain_body(request), self._limits)
        return _json(index_document(await self._control.indexed(ready=ready)))

    async def _load(self, request: Request) -> Response:
        parameters = decode_repository_request(await _plain_body(request), self._limits)
        await self._control.loaded(request.path_params["model"], parameters)
        return _json({})

    async def _unload(self, request: Request) -> Response:
        parameters = decode_repository_request(await _plain_body(request), self._limits)
        await self._control.unloaded(request.path_params["model"], parameters)
        return _json({})

    async def _predict(self, request: Request) -> Response:
        tracing = self._tracing
        with nullcontext() if tracing is None else tracing.inference("http", self._service.name, headers_by_name(request.scope)) as span:
            answer = await self._picture(request)
            if span is not None:
                span.set_attribute("muntin.version", answer.version)
        return Response(answer.content, media_type=answer.media_type, headers=answer.headers)

    async def _picture(self, request: Request) -> PictureAnswer:
        try:
            fields = parse_qs(request.scope["query_string"].decode("latin-1"), max_num_fields=16)
        except ValueError as error:
            raise ProtocolError('the query has more than 16 fields: it takes "output" and "version"') from error
        query = {name: values[-1] for name, values in fields.items()}
        content_type = request.headers.get("content-type", "")
        body = await _form_file(request, content_type) if is_form(content_type) else await _plain_body(request)
        try:
            return await self._pictures.answer(body, query)
        except ProtocolError as error:
            # curl sends this type with --data-binary too; -d removes line ends and zeros.
            encoded = content_type.startswith("application/x-www-form-urlencoded")
            if not (
                encoded and isinstance(error.__cause__, DataError) and error.status == 400 and not any(byte in body for byte in b"\n\r\0")
            ):
                raise
            raise ProtocolError(f"{error}; curl changes a file that -d sends: give --data-binary @FILE") from error

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi(self._service.name, page=self._page is not None))


async def _plain_body(request: Request) -> bytes:
    """Return the body of a request other than inference. Raises ProtocolError 415 if it is compressed."""
    _refuse_packed(request)
    return await request.body()


async def _form_file(request: Request, content_type: str) -> bytes:
    """Return the file in a form; the body itself is not copied. Raises ProtocolError: 415 if it is compressed, 400 otherwise."""
    _refuse_packed(request)
    (body,) = [chunk async for chunk in request.stream() if len(chunk)] or [b""]
    return form_file(body, content_type)


def _refuse_packed(request: Request) -> None:
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower().encode("latin-1") not in PLAIN:
        raise ProtocolError(
            f"content-encoding {shown(coding)}: only requests for inference may be packed; send the body as it is", status=415
        )


def refusal_of(error: Exception, scope: Scope) -> tuple[ProtocolError, dict[str, str]]:
    """Return (error for the client, header fields). An unforeseen one is named by its type; the loop's exception handler gets it."""
    if isinstance(error, RefusedRequestError):
        return error, {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, ProtocolError):
        return error, {401: {"www-authenticate": "Bearer"}, 405: {"allow": "POST"}}.get(error.status, {})
    if isinstance(error, HTTPException):
        if error.status_code == 404 and (extension := _EXTENSION.fullmatch(scope["path"])):
            return ProtocolError(LACKING[extension[1]], status=501), {}
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        advice = f", use {headers['allow']}" if "allow" in headers else "; /openapi.json lists the routes"
        text = f"{scope['method']} {shown(scope['path'])}: {error.detail}{advice}"
        return ProtocolError(text, status=error.status_code), headers
    if isinstance(error, MuntinError):
        return ProtocolError(str(error), status=500), {}
    asyncio.get_running_loop().call_exception_handler({"message": "a request failed", "exception": error})
    return ProtocolError(f"the server failed ({type(error).__name__})", status=500), {}


def _json(document: object, status: int = 200) -> Response:
    return Response(encode_json(document), status, media_type="application/json")


def _named(request: Request) -> tuple[str | None, str | None]:
    return request.path_params.get("model"), request.path_params.get("version")
