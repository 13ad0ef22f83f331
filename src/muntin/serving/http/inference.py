"""The inference route: `POST /v2/models/NAME[/versions/V]/infer`, tensors as JSON or as bytes."""

from __future__ import annotations

import asyncio
import math
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from muntin.artifact import Signature
from muntin.serving.http.bodies import Scope
from muntin.serving.http.exchange import Exchange
from muntin.serving.inference.requests import INPUT
from muntin.serving.inference.service import Answered, Service
from muntin.serving.protocol.json_codec import (
    HEADER_LENGTH,
    decode_raw_request,
    decode_request,
    encode_response,
    parse_header_length,
)
from muntin.serving.protocol.messages import InferRequest, InferResponse, Limits, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.tensors import Buffer
from muntin.serving.telemetry.tracing import Tracing, set_answer

INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
PLAIN = frozenset({b"", b"identity"})
"""Content codings (RFC 9110, 8.4.1), in lower case, that leave a body as it is."""
_PACKED = frozenset({b"gzip", b"x-gzip", b"deflate"})
_INFLATE = zlib.MAX_WBITS | 32
"""zlib's window bits for gzip and deflate; the data tell which."""
INLINE_PACKED, INLINE = 1 << 16, 1 << 18
"""Maximum bytes of a body, packed and unpacked, that is unpacked on the event loop, in at most half a millisecond."""
_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_JSON = (b"content-type", b"application/json")
_OCTETS = (b"content-type", b"application/octet-stream")


class Head(NamedTuple):
    """Path and headers. `length`: bytes of JSON before the tensors, None if the whole body is JSON. `packed`: by gzip or deflate."""

    model: str
    version: str | None
    length: int | None
    packed: bool


def read_head(scope: Scope) -> Head | None:
    """Read the path and headers; None for other routes. Raises ProtocolError: 405 for another method, 415 and 400 for wrong headers."""
    target = INFER.fullmatch(scope["path"])
    if target is None:
        return None
    if scope["method"] != "POST":
        raise ProtocolError(f"{scope['method']} {scope['path'][:100]}: use POST", status=405)
    length, packed = None, False
    for name, value in scope["headers"]:
        if name == _HEADER_LENGTH:
            length = parse_header_length(value.strip().decode("latin-1"))  # RFC 9112, 5: blanks around it are ignored
        elif name == b"content-encoding" and (coding := value.strip().lower()) not in PLAIN:
            if packed or coding not in _PACKED:
                raise ProtocolError(
                    f"content-encoding {shown(value.decode('latin-1'))}: send gzip, deflate, or the body as it is", status=415
                )
            packed = True
    return Head(target[1], target[2], length, packed)


def headers_by_name(scope: Scope) -> dict[str, str]:
    """Header fields by their names in lower case."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


class InferenceRoute:
    """Answers requests for inference."""

    def __init__(self, service: Service, *, limits: Limits, tracing: Tracing | None) -> None:
        self._service, self._limits, self._tracing = service, limits, tracing
        self._unpacker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="muntin-unpack")
        self._unpacking = asyncio.Lock()

    def close(self) -> None:
        """End the thread that unpacks."""
        self._unpacker.shutdown(wait=True, cancel_futures=True)

    async def answer(self, exchange: Exchange, head: Head, body: Buffer, *, arrived: float) -> None:
        """Answer a request whose body was complete at the monotonic time `arrived`.

        Raises ProtocolError as `Service.infer` does, and for a body that cannot be read.
        """
        if self._tracing is None:
            await self._infer(exchange, head, body, arrived)
            return
        with self._tracing.inference("http", head.model, headers_by_name(exchange.scope)) as span:
            set_answer(span, await self._infer(exchange, head, body, arrived))

    async def _infer(self, exchange: Exchange, head: Head, body: Buffer, arrived: float) -> Answered:
        if not head.packed:
            return await self._ask(exchange, head, body, arrived)
        if len(body) <= INLINE_PACKED and (unpacked := inflated(body, self._limits.body_bytes, INLINE)) is not None:
            return await self._ask(exchange, head, unpacked, arrived)
        async with self._unpacking:  # one unpacked body at a time waits for admission, beside those that wait for their batch
            self._check_time(arrived)
            loop = asyncio.get_running_loop()
            unpacked = await loop.run_in_executor(self._unpacker, inflated, body, self._limits.body_bytes)
            assert unpacked is not None
            self._check_time(arrived)
        return await self._ask(exchange, head, unpacked, arrived)

    async def _ask(self, exchange: Exchange, head: Head, body: Buffer, arrived: float) -> Answered:
        request = self._decode(body, head)
        exchange.request_id = request.id
        answered = await self._service.infer(
            request, model=head.model, version=head.version, arrived=arrived, encode=partial(_encoded, request=request)
        )
        exchange.answered = answered
        content, length = answered.encoded
        headers = [_JSON] if length is None else [_OCTETS, (_HEADER_LENGTH, b"%d" % length)]
        await exchange.reply(200, headers, content)
        return answered

    def _check_time(self, arrived: float) -> None:
        if self._service.objective is not None and time.monotonic() - arrived >= self._service.objective:
            raise RefusedRequestError("it could not be unpacked in time: try again")

    def _decode(self, body: Buffer, head: Head) -> InferRequest:
        if head.length != 0:
            return decode_request(body, head.length, self._limits)
        with self._service.lease_to_compute(head.model, head.version) as lease:
            signature = lease.version.signature
        if not isinstance(signature, Signature):
            raise ProtocolError(f"raw bytes without JSON: the model takes {signature.text}: name the inputs and their shapes in JSON")
        channels = signature.channels
        side = math.isqrt(len(body) // channels)
        if not body or side * side * channels != len(body):
            raise ProtocolError(
                f"{len(body):,} raw bytes: without JSON they must be one square image of {channels} channels; state the shape in JSON"
            )
        return decode_raw_request(body, INPUT, (1, side, side, channels), self._limits)


def _encoded(response: InferResponse, *, request: InferRequest) -> tuple[bytes, int | None]:
    """Return (body of an answer, length of its JSON if tensors follow). The body is copied, since granian takes `bytes` only."""
    parts, length = encode_response(response, request.outputs, binary_default=request.binary_default)
    return b"".join(parts), length


def inflated(body: Buffer, most: int, few: int | None = None) -> bytes | None:
    """Return the unpacked body; None if it has more than `few` bytes. Unpacks at most `most` bytes.

    Raises ProtocolError: 400 for a body that is neither gzip nor deflate or ends early, 413 for more than `most` bytes.
    """
    unpacker = zlib.decompressobj(_INFLATE)
    bound = most if few is None else min(few, most)
    try:
        unpacked = unpacker.decompress(body, bound + 1)
    except zlib.error as error:
        raise ProtocolError(f"the body is neither gzip nor deflate ({error})") from error
    if bound < len(unpacked) <= most:
        return None
    if len(unpacked) > most:
        raise ProtocolError(f"a body of more than {most:,} bytes, unpacked: this server takes no more (--max-body)", status=413)
    if not unpacker.eof or unpacker.unused_data:
        raise ProtocolError("the packed body ends too early, or something follows it: send one whole gzip or deflate stream")
    return unpacked
