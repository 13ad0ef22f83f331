"""The HTTP face: the Open Inference Protocol, a route for pictures, metrics and a description of it all.

    POST /v2/models/NAME[/versions/V]/infer        tensors as JSON or as bytes
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready|/config|/stats]
    POST /v2/repository/index, /v2/repository/models/NAME/load|unload
    POST /predict?output=mask|overlay|labels|json  a PNG, JPEG or WebP file in, a picture or JSON out
    GET  /metrics, /openapi.json

All but the first are an ASGI application, with a router. Inference takes a short way beside it (`connection.Direct`): no task and no
messages, a call when the body is whole and another when the answer is there. At a small classifier's rates ASGI would cost a third of it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from muntin.errors import DataError, MuntinError
from muntin.serving.access_log import AccessLog
from muntin.serving.connection import LEFT, REFUSED, Answer, Fields, Reply
from muntin.serving.control import Control
from muntin.serving.description import (
    VERSION,
    configuration_document,
    index_document,
    metadata_document,
    server_document,
    statistics_document,
)
from muntin.serving.json_codec import (
    HEADER_LENGTH,
    Heads,
    decode_index_request,
    decode_raw_request,
    decode_repository_request,
    decode_request,
    encode_json,
    encode_response,
    parse_header_length,
)
from muntin.serving.openapi import openapi
from muntin.serving.origin import check_origin
from muntin.serving.pictures import PictureAnswer, Pictures
from muntin.serving.protocol import LACKING, InferRequest, Limits, ProtocolError, RefusedRequestError, shown
from muntin.serving.service import INPUT, Answered, Cancel, Service
from muntin.serving.tensors import Buffer
from muntin.serving.tokens import Tokens
from muntin.serving.tracing import Inference, Tracing

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_EXTENSION = re.compile(r"/v2/(?:models/[^/]+/(?:versions/[^/]+/)?)?(?:system|cuda)?(trace/setting|logging|sharedmemory)(?:/.*)?")
"""Paths of Triton's extensions that are left out."""
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_OCTETS = (b"content-type", b"application/octet-stream")
_HEAD = "muntin.head"
"""In a scope: what `_read_head` found, where all requests with the same head share it."""
_LIKE_BYTES = 2048
"""Of a request's JSON, at most, that it is held against others by."""
_PLAIN, _PACKED = frozenset({b"", b"identity"}), frozenset({b"gzip", b"x-gzip", b"deflate"})
"""Content codings (RFC 9110, 8.4.1) in lower case: those that leave a body as it is, and those that are taken off."""
_INFLATE = zlib.MAX_WBITS | 32
"""zlib's word for gzip and deflate alike: the data say which it is."""
SMALL_PACKED, SMALL = 1 << 16, 1 << 18
"""Bytes of a body, packed and unpacked, up to which it is unpacked on the event loop: half a millisecond at most."""
_OPEN = ("/v2/health/live", "/v2/health/ready")
"""What needs no token: whoever starts and stops servers asks for it."""

_ESSENTIAL = frozenset(path.encode() for path in (*_OPEN, "/metrics"))


class HttpFace:
    """The ASGI application, and inference beside it.

    `tokens`: of which a request must carry one; empty: none is asked for. `local`: as `check_origin` has it.
    """

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
        local: bool = False,
    ) -> None:
        self._service, self._control, self._pictures = service, control, pictures
        self._limits, self._log, self._tracing, self._local = limits, log, tracing, local
        self._tokens = Tokens(tokens)
        self._heads = Heads()
        self._unpackers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="muntin-unpack")
        self._packed: deque[tuple[_Inference, _Head, Buffer]] = deque()
        self._unpacking = False
        """One of them is being unpacked."""
        answers = dict.fromkeys((ProtocolError, HTTPException, MuntinError, Exception), _error_response)
        self._routes = Starlette(routes=self._table(), exception_handlers=answers)
        self._routes.router.redirect_slashes = False  # to whatever host a request names

    # ---- inference ----

    def essential(self, target: bytes) -> bool:
        """Whether a request is answered on a connection too many: by what starts, stops and watches servers it is asked."""
        return unquote_to_bytes(target.partition(b"?")[0]) in _ESSENTIAL

    def takes(self, scope: Scope) -> bool:
        """Whether `begin` answers a request."""
        return scope["method"] == "POST" and _INFER.fullmatch(scope["path"]) is not None

    def barred(self, scope: Scope) -> Answer | None:
        """The answer to a request that its headers alone are wrong with."""
        try:
            self._authorise(scope)
            scope[_HEAD] = _read_head(scope)
        except ProtocolError as error:
            self._service.metrics.requests["http", "wrong"] += 1
            answer = error_answer(error)
            if self._log is not None:
                self._write(scope, error.status, sum(map(len, answer[2])), time.monotonic())
            return answer
        return None

    def refused(self, client: str, method: str, path: str, status: int, sent: int) -> None:
        """As `Direct` says."""
        if self._log is not None:
            self._log.write(face="http", client=client, method=method, path=path, status=status, sent=sent, seconds=0.0)

    def close(self) -> None:
        """Ends the thread that unpacks."""
        self._unpackers.shutdown(wait=True, cancel_futures=True)

    def begin(self, scope: Scope, body: Buffer, came: float, reply: Reply) -> Cancel:
        """Answers a request for inference whose body is whole since `came`, now or later. Returns what to call if nobody waits any more."""
        inference = _Inference(self, scope, reply, came)
        self._service.deliver()  # in a flood a round of the loop is hundreds of requests, and answers would wait for its end
        try:
            self._authorise(scope)
            head: _Head = scope.get(_HEAD) or _read_head(scope)
            if head.encoded:
                self._inflate(inference, head, body)
            else:
                inference.asked(self._ask(inference, head, body))
        except ProtocolError as error:
            inference.fail(error)
        except Exception as error:  # noqa: BLE001 - the connection is in the middle of reading, and has others to answer
            inference.fail(_fault(error))
        return inference.abandon

    def learn(self, scope: Scope) -> None:
        """As `Direct` says: the head, if there is nothing wrong in it."""
        with suppress(ProtocolError):
            self._authorise(scope)
            scope[_HEAD] = _read_head(scope)

    def refusal(self, scope: Scope, body: memoryview, came: float) -> Answer | None:
        """As `Direct` says. None where every request is written down, or traced."""
        self._service.deliver()
        return None

    def _inflate(self, inference: _Inference, head: _Head, body: Buffer) -> None:
        """Asks when the body is unpacked: a small one at once, others on a thread, since a bomb's sixty megabytes take long enough to keep
        everybody else waiting.

        They wait packed, as the ledger counts them, and one is asked about before the next is unpacked: so what they become is never held
        for more than one at a time, beside what waits for its batch.
        """
        if len(body) <= SMALL_PACKED and (found := _inflated(body, self._limits.body_bytes, SMALL)) is not None:
            inference.asked(self._ask(inference, head, found))
            return
        self._packed.append((inference, head, body))
        self._unpack()

    def _unpack(self) -> None:
        """Has the next body unpacked whose client still waits, if none is being unpacked."""
        while self._packed and not self._unpacking:
            inference, head, body = self._packed.popleft()
            if inference.outcome:  # nobody waits any more
                continue
            try:
                self._check_time(inference)
                unpacking = asyncio.get_running_loop().run_in_executor(self._unpackers, _inflated, body, self._limits.body_bytes)
            except ProtocolError as error:
                inference.fail(error)
            except RuntimeError:  # the face was closed
                inference.fail(RefusedRequestError("the server is shutting down"))
            else:
                self._unpacking = True
                unpacking.add_done_callback(partial(self._unpacked, inference, head))

    def _unpacked(self, inference: _Inference, head: _Head, found: asyncio.Future[bytes | None]) -> None:
        self._unpacking = False
        try:
            if found.cancelled():
                raise RefusedRequestError("the server is shutting down")
            body = found.result()
            if not inference.outcome:
                self._check_time(inference)
                assert body is not None
                inference.asked(self._ask(inference, head, body))
        except ProtocolError as error:
            inference.fail(error)
        except Exception as error:  # noqa: BLE001 - as in `begin`
            inference.fail(_fault(error))
        finally:
            del found  # an error holds this frame by its traceback, and the body by those that it was raised through
        self._unpack()

    def _check_time(self, inference: _Inference) -> None:
        if self._service.objective is not None and time.monotonic() - inference.began >= self._service.objective:
            raise RefusedRequestError("it could not be unpacked in time: try again")

    def _ask(self, inference: _Inference, head: _Head, body: Buffer) -> Cancel:
        scope = inference.scope
        if self._tracing is not None and (found := _INFER.fullmatch(scope["path"])):
            inference.span = self._tracing.begin("http", found[1], _carrier(scope))
        inference.request = request = self._decode(body, head)
        return self._service.submit(
            request, model=head.model, version=head.version, arrived=inference.began, done=inference.done,
            encode=partial(encode_response, requested=request.outputs, binary_default=request.binary_default),
        )  # fmt: skip

    def forget(self, inference: _Inference) -> None:
        """Lets go of a body that waits to be unpacked for one whose client has gone."""
        self._packed = deque(waiting for waiting in self._packed if waiting[0] is not inference)

    def _like(self, scope: Scope, head: _Head, body: Buffer) -> Hashable | None:
        """Equal for requests that differ in their pixels alone. None where that is not known, or nothing is to be refused unread."""
        if not head.length or head.length > _LIKE_BYTES or head.encoded or self._tracing is not None:  # which is told of every request
            return None
        return scope["path"], bytes(body[: head.length])

    def _authorise(self, scope: Scope) -> None:
        if self._tokens and scope["path"] not in _OPEN:
            self._tokens.check(next((value for name, value in scope["headers"] if name == b"authorization"), b""))

    def finish(self, inference: _Inference) -> None:
        """Counts and writes down an inference that came to its end."""
        self._service.metrics.requests["http", inference.outcome] += 1
        if self._log is not None:
            self._write(inference.scope, inference.status, inference.sent, inference.began, inference)

    def _write(self, scope: Scope, status: int, sent: int, began: float, inference: _Inference | None = None) -> None:
        assert self._log is not None
        client = scope.get("client")
        request = None if inference is None else inference.request
        self._log.write(
            face="http",
            client=client[0] if client else "",
            method=scope["method"],
            path=scope["path"],
            status=status,
            sent=sent,
            seconds=time.monotonic() - began,
            request_id="" if request is None else request.id,
            answered=None if inference is None else inference.answered,
        )

    def _decode(self, body: Buffer, head: _Head) -> InferRequest:
        if head.length != 0:
            return decode_request(body, head.length, self._limits, self._heads)
        with self._service.lease_to_compute(head.model, head.version) as lease:
            channels = lease.version.signature.channels
        side = math.isqrt(len(body) // channels)
        if not body or side * side * channels != len(body):
            raise ProtocolError(
                f"{len(body):,} raw bytes: without JSON they have to be one square image of {channels} channels; "
                "send JSON that says the shape"
            )
        return decode_raw_request(body, INPUT, "UINT8", (1, side, side, channels), self._limits)

    # ---- everything else ----

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        began, status, sent = time.monotonic(), 0, 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            self._authorise(scope)
            if scope["method"] != "POST" and _INFER.fullmatch(scope["path"]):
                raise ProtocolError(f"{scope['method']} {scope['path'][:100]}: use POST", status=405)
            await self._routes(scope, receive, counted)
        except ProtocolError as error:
            await _error_answer(error)(scope, receive, counted)
        except asyncio.CancelledError:
            if not status and REFUSED not in scope:  # else it was answered
                if self._service.draining:  # and it had all the time that there is; where the client has gone nobody hears it
                    await _error_answer(RefusedRequestError("the server is shutting down"))(scope, receive, counted)
                else:
                    status = LEFT
        finally:
            if self._log is not None and status:  # else its connection has written it down
                self._write(scope, status, sent, began)

    def _table(self) -> list[Route]:
        return [
            Route("/v2", self._server),
            Route("/v2/", self._server, include_in_schema=False),  # the same, as the protocol's own OpenAPI document spells it
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
        check_origin(request.scope["headers"], local=self._local)
        parameters = decode_repository_request(await _plain_body(request), self._limits)
        await self._control.loaded(request.path_params["model"], parameters)
        return _json({})

    async def _unload(self, request: Request) -> Response:
        check_origin(request.scope["headers"], local=self._local)
        parameters = decode_repository_request(await _plain_body(request), self._limits)
        await self._control.unloaded(request.path_params["model"], parameters)
        return _json({})

    async def _predict(self, request: Request) -> Response:
        """Counted as inference is, and traced."""
        if self._tracing is None:
            return await self._counted(request)
        with self._tracing.inference("http", self._service.name, _carrier(request.scope)) as span:
            response = await self._counted(request)
            span.computed_by(response.headers["x-model-version"])
            return response

    async def _counted(self, request: Request) -> Response:
        outcome = "failed"
        try:
            answer = await self._picture(request)
            outcome = "answered"
            return Response(answer.content, media_type=answer.media_type, headers=answer.headers)
        except ProtocolError as error:
            outcome = error.outcome
            raise
        except (asyncio.CancelledError, ClientDisconnect):
            outcome = "cancelled"
            raise
        finally:
            self._service.metrics.requests["http", outcome] += 1

    async def _picture(self, request: Request) -> PictureAnswer:
        try:
            fields = parse_qs(request.scope["query_string"].decode("latin-1"), max_num_fields=16)
        except ValueError as error:
            raise ProtocolError(f"the query has more than 16 fields: there is {shown('output')}") from error
        query = {name: values[-1] for name, values in fields.items()}
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ProtocolError("a form: send the picture alone, as curl does with --data-binary @FILE", status=415)
        body = await _plain_body(request)
        try:
            return await self._pictures.answer(body, query)
        except ProtocolError as error:
            # curl names this type for --data-binary, too; -d drops line ends.
            form = request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
            if not (form and isinstance(error.__cause__, DataError) and error.status == 400 and not (b"\n" in body or b"\r" in body)):
                raise
            raise ProtocolError(f"{error}; curl changes a file that -d sends: give --data-binary @FILE") from error

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi(self._service.name))


def _carrier(scope: Scope) -> dict[str, str]:
    """The header fields, as tracing wants them."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


class _Head(NamedTuple):
    """What a request's line and headers say. `length`: bytes of the JSON before the tensors; None: all of the body is JSON. `encoded`: the
    body is packed by gzip or deflate."""

    model: str
    version: str | None
    length: int | None
    encoded: bool


def _read_head(scope: Scope) -> _Head:
    found = _INFER.fullmatch(scope["path"])
    assert found is not None
    model, version = found.groups()
    length, encoded = None, False
    for name, value in scope["headers"]:
        if name == _HEADER_LENGTH:
            length = parse_header_length(value.strip().decode("latin-1"))  # RFC 9112, 5: blanks around it are none of its own
        elif name == b"content-encoding" and (coding := value.strip().lower()) not in _PLAIN:
            if encoded or coding not in _PACKED:
                raise ProtocolError(
                    f"content-encoding {shown(value.decode('latin-1'))}: send gzip, deflate, or the body as it is", status=415
                )
            encoded = True
    return _Head(model, version, length, encoded)


async def _plain_body(request: Request) -> bytes:
    """The body of what is no inference. Raises ProtocolError 415 for one that is packed."""
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower().encode("latin-1") not in _PLAIN:
        raise ProtocolError(
            f"content-encoding {shown(coding)}: only requests for inference may be packed; send the body as it is", status=415
        )
    return await request.body()


def _inflated(body: Buffer, most: int, few: int | None = None) -> bytes | None:
    """What was packed, if it is all there and no more than `most` bytes; no more than that is ever unpacked. None: more than `few`."""
    unpacking = zlib.decompressobj(_INFLATE)
    bound = most if few is None else min(few, most)
    try:
        found = unpacking.decompress(body, bound + 1)
    except zlib.error as error:
        raise ProtocolError(f"the body is neither gzip nor deflate ({error})") from error
    if bound < len(found) <= most:
        return None
    if len(found) > most:
        raise ProtocolError(f"a body of more than {most:,} bytes, unpacked: this server takes no more", status=413)
    if not unpacking.eof or unpacking.unused_data:
        raise ProtocolError("the packed body ends too early, or something follows it: send one whole gzip or deflate stream")
    return found


class _Inference:
    """One request for inference, from its last byte, which came at `began`, to its answer."""

    __slots__ = ("_face", "_reply", "answered", "began", "cancel", "outcome", "request", "scope", "sent", "span", "status")

    def __init__(self, face: HttpFace, scope: Scope, reply: Reply, began: float) -> None:
        self._face, self.scope, self._reply = face, scope, reply
        self.began = began
        self.status, self.sent = 0, 0
        self.outcome = ""
        """Empty as long as it goes on."""
        self.request: InferRequest | None = None
        self.answered: Answered | None = None
        self.span: Inference | None = None
        self.cancel: Cancel | None = None

    def asked(self, cancel: Cancel) -> None:
        """The service was asked, and may have answered already."""
        if not self.outcome:
            self.cancel = cancel

    def done(self, found: Answered | Exception) -> None:
        """The service's word."""
        if isinstance(found, Exception):
            self.fail(found if isinstance(found, ProtocolError) else _fault(found))
            return
        parts, length = found.encoded
        headers = [_OCTETS if length is not None else _JSON]
        if length is not None:
            headers.append((_HEADER_LENGTH, b"%d" % length))
        self.answered = found
        if self.span is not None:
            self.span.answered(found)
        self._end("answered", 200, headers, parts)

    def fail(self, error: ProtocolError) -> None:
        """There is no answer but this error. An inference that came to its end stays as it was."""
        if not self.outcome:
            self._end(error.outcome, *error_answer(error), error)

    def abandon(self) -> None:
        """Nobody waits for the answer."""
        if self.outcome:
            return
        if self.cancel is not None:
            self.cancel()
        else:
            self._face.forget(self)
        self.outcome, self.status = "cancelled", LEFT
        self._close(None)

    def _end(self, outcome: str, status: int, headers: Fields, parts: list[Any], error: ProtocolError | None = None) -> None:
        self.outcome, self.status, self.sent = outcome, status, sum(map(len, parts))
        self._reply(status, headers, parts)
        self._close(error)

    def _close(self, error: ProtocolError | None) -> None:
        if self.span is not None:
            self.span.end(error)
        self._face.finish(self)
        # `cancel` leads back here, and all of it to the body and the answer: in a circle they would stay until that is collected.
        self.cancel = self.request = self.answered = None


def _fault(error: Exception) -> ProtocolError:
    """What a client is told of an error that nobody foresaw: no more than its kind. All of it is reported to the loop."""
    asyncio.get_running_loop().call_exception_handler({"message": "an inference failed", "exception": error})
    return ProtocolError(f"the server failed ({type(error).__name__})", status=500)


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404 and (found := _EXTENSION.fullmatch(request.scope["path"])):
        error = ProtocolError(LACKING[found[1]], status=501)
    if isinstance(error, HTTPException):
        allowed = (error.headers or {}).get("Allow")
        text = f"{request.method} {shown(request.scope['path'])}: {error.detail}" + (
            f", use {allowed}" if allowed else "; /openapi.json lists the routes"
        )
        return Response(encode_json({"error": text}), error.status_code, error.headers, "application/json")
    if not isinstance(error, ProtocolError):
        text = str(error) if isinstance(error, MuntinError) else f"the server failed ({type(error).__name__})"
        error = ProtocolError(text, status=500)
    return _error_answer(error)


def _error_answer(error: ProtocolError) -> Response:
    return Response(encode_json({"error": str(error)}), error.status, error_headers(error), "application/json")


def error_answer(error: ProtocolError) -> Answer:
    """What a client is told of an error, without ASGI."""
    headers = [_JSON, *((name.encode(), value.encode()) for name, value in error_headers(error).items())]
    return error.status, headers, [encode_json({"error": str(error)})]


def error_headers(error: ProtocolError) -> dict[str, str]:
    """The header fields that go with an error."""
    if isinstance(error, RefusedRequestError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    return {401: {"www-authenticate": "Bearer"}, 405: {"allow": "POST"}}.get(error.status, {})


def _json(document: object, status: int = 200) -> Response:
    return Response(encode_json(document), status, media_type="application/json")


def _named(request: Request) -> tuple[str | None, str | None]:
    return request.path_params.get("model"), request.path_params.get("version")
