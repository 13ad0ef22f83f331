"""Requests made to break the decoders: valid ones, mutated; every one is made from a seed and a number, so that each can be made again.

    run(20_000, seed=0)      # a test's worth: a second or two
    run(10_000_000, seed=1)  # a night's

What must hold for each: a decoder gives an InferRequest whose arrays are what it announces, or raises ProtocolError in one line, and
nothing else; what is accepted is answered or refused by the encoder in the same way; neither takes more memory than a multiple of that.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import orjson

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import decode_infer, encode_infer
from muntin.serving.protocol.json_codec import decode_request, encode_response
from muntin.serving.protocol.messages import GRPC_CODES, InferOutput, InferRequest, InferResponse, Limits, ProtocolError
from muntin.serving.protocol.tensors import DATATYPES
from muntin.serving.protocol.wire import parse

LIMITS = Limits(body_bytes=1 << 16, json_bytes=1 << 14, elements=1 << 30)
"""Those of bytes are near what comes, so that they are met; a billion elements may be announced."""
TRACED = 32
"""One request in so many is made under tracemalloc, which slows it down."""
GROWTH, SLACK = 100, 1 << 16
"""Bytes that a decoder may take for each byte that came, and at any rate."""
ERROR = 1000
"""Characters of an error's line, at most."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many requests were accepted and refused; CPU seconds of the slowest; the most bytes that one took, of those that were traced."""

    accepted: int
    refused: int
    slowest: float
    most_bytes: int


def _tensor(name: str, datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **more}


def _http_seeds() -> list[tuple[bytes, bytes]]:
    size = "binary_data_size"
    image = _tensor("images", "UINT8", [1, 4, 4, 3], parameters={size: 48})
    text = _tensor("a", "BYTES", [2], parameters={size: 11})
    half = _tensor("a", "FP16", [3], parameters={size: 6})
    numbers = _tensor("a", "FP32", [2, 2], data=[1.5, -2, 3e10, 0])
    nested = _tensor("a", "INT8", [2, 2], data=[[1, 2], [-3, 4]])
    documents: list[tuple[dict[str, Any], bytes]] = [
        ({"id": "1", "inputs": [image], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, bytes(range(48))),
        ({"inputs": [image], "parameters": {"binary_data_output": True, "priority": 1, "timeout": 1000}}, bytes(48)),
        ({"inputs": [numbers], "outputs": [{"name": "y", "parameters": {"classification": 2}}]}, b""),
        ({"inputs": [nested, _tensor("b", "BOOL", [2], data=[True, False])]}, b""),
        ({"inputs": [text, _tensor("b", "FP64", [1], parameters={size: 8})]}, b"\3\0\0\0abc\0\0\0\0" + bytes(8)),
        ({"inputs": [_tensor("a", "BYTES", [1, 2], data=["text", "é"])], "parameters": {"own": "value", "real": 0.5}}, b""),
        ({"inputs": [half, _tensor("b", "UINT64", [1], data=[2**64 - 1])]}, b"\0\x3c\0\x7c\1\x7e"),
    ]
    return [(orjson.dumps(document), tail) for document, tail in documents]


def _grpc_seeds() -> list[bytes]:
    seeds = []
    for datatype, shape, field, values in (
        ("UINT8", [1, 2, 2, 3], "uint_contents", list(range(12))),
        ("FP32", [2, 2], "fp32_contents", [1.5, -2.0, 3e10, 0.0]),
        ("BYTES", [2], "bytes_contents", [b"abc", b""]),
        ("INT64", [2], "int64_contents", [-(2**63), 2**63 - 1]),
        ("BOOL", [2], "bool_contents", [True, False]),
    ):
        message = messages.ModelInferRequest(model_name="m", id="7")
        item = message.inputs.add(name="x", datatype=datatype, shape=shape)
        message.parameters["priority"].uint64_param = 1
        message.outputs.add(name="y").parameters["classification"].int64_param = 2
        array = np.array(values, DATATYPES[datatype])
        raw = b"\3\0\0\0abc\0\0\0\0" if datatype == "BYTES" else array.tobytes()
        getattr(item.contents, field).extend(values)
        seeds.append(message.SerializeToString())
        item.ClearField("contents")  # type: ignore[attr-defined]
        message.raw_input_contents.append(raw)
        seeds.append(message.SerializeToString())
    return seeds


HTTP_SEEDS = _http_seeds()
GRPC_SEEDS = _grpc_seeds()
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 256, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, -0.0, 1e308, 1e39),
    *("", "x", "x" * 300, "\0", "\n", "UINT8", "BYTES", "FP16", "BF16", "é", "NaN", "binary_data_size", "shared_memory_region"),
    *([], {}, [[]], [{}], [1], [2**40, 2**40], [0, 2**62], [1] * 9, [[1, 2], [3]], [-1], [[[[[[[[[[1]]]]]]]]]]),
    *({"a": 1}, {"sequence_id": 1}, {"classification": 10**6}, {"binary_data_size": 2**62}, {"data": [1]}, dict.fromkeys("abcdefgh", 1)),
]
KEYS = ["name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id", "binary_data_size", "binary_data", "timeout"]
PARAMETERS = [*KEYS, "priority", "sequence_id", "shared_memory_region", "classification", "x" * 300]
CHOICES = ["bool_param", "int64_param", "string_param", "double_param", "uint64_param"]
SHAPES = [[-1], [2**62], [2**40, 2**40], [0, 2**62], [1] * 9, []]
BYTES = [0, 1, 2, 0x7F, 0x80, 0xFF, *b'"[]{},:-0e.\\']


def mutated_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """Some bytes of it changed, put in, left out, repeated, or taken from another."""
    body = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(body) + 1)
        to = min(len(body), at + random.randrange(1, 9))
        match random.randrange(6):
            case 0:
                body[at:to] = bytes([random.choice(BYTES)]) * (to - at)
            case 1:
                body[at : at + 1] = bytes([(body[at] ^ 1 << random.randrange(8)) if at < len(body) else 0])
            case 2:
                del body[at:to]
            case 3:
                body[at:at] = body[at:to] * random.choice((1, 2, 40))
            case 4:
                body[at:] = other[random.randrange(len(other)) :]
            case _:
                body[at:at] = random.randbytes(random.randrange(1, 9))
    return bytes(body)


def mutated_document(document: Any, random: Random) -> None:
    """One place in a JSON document put to something else."""
    places: list[tuple[Any, Any]] = []
    holders = [document]
    while holders:
        holder = holders.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                holders.append(holder[key])
    holder, key = random.choice(places)
    match random.randrange(5):
        case 0 if isinstance(holder, dict):
            holder[random.choice(KEYS)] = holder.pop(key)
        case 1:
            del holder[key]
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * random.choice((1, 2, 40)))
        case 3 if isinstance(holder, dict):
            holder[random.choice(KEYS)] = deepcopy(random.choice(VALUES))
        case _:
            holder[key] = deepcopy(random.choice(VALUES))


def http_request(random: Random) -> tuple[bytes, int | None]:
    """(body, length of its JSON)."""
    header, tail = random.choice(HTTP_SEEDS)
    if random.random() < 0.6:
        document = orjson.loads(header)
        for _ in range(random.randint(1, 2)):
            if document:
                mutated_document(document, random)
        header = orjson.dumps(document)
    length: int | None = len(header) if tail else None
    body = header + tail
    if random.random() < 0.5:
        body = mutated_bytes(body, random.choice(HTTP_SEEDS)[0], random)
    if random.random() < 0.2:
        length = random.choice((None, 0, -1, 1, len(header) - 1, len(header) + 1, len(body), len(body) + 1, 2**63))
    return body, length


def mutated_message(message: Any, random: Random) -> None:
    """One field of a message put to something else; what protobuf itself does not take is left."""
    item = random.choice(message.inputs) if message.inputs else message.inputs.add()
    try:
        match random.randrange(9):
            case 0:
                item.shape[random.randrange(len(item.shape) or 1) :] = random.choice(SHAPES)
            case 1:
                item.datatype = random.choice((*DATATYPES, "BF16", "", "x" * 300))
            case 2:
                item.name = random.choice(("", "x" * 300, "y", "\n"))
            case 3:
                message.inputs.extend([item] * random.choice((1, 2, 40)))
            case 4:
                holder = random.choice((message, item, message.outputs[0] if message.outputs else message))
                setattr(holder.parameters[random.choice(PARAMETERS)], random.choice(CHOICES), random.choice(VALUES))
            case 5:
                message.raw_input_contents.append(random.randbytes(random.choice((0, 1, 12, 300))))
            case 6:
                del message.raw_input_contents[:]
            case 7:
                values = random.choice([[1], [2**31 - 1], [-1], [1] * 12, [0] * 300])
                getattr(item.contents, random.choice(("bool_contents", "int_contents", "uint_contents", "fp64_contents"))).extend(values)
            case _:
                message.outputs.add(name=random.choice(("y", "", "x" * 300)))
    except (TypeError, ValueError, OverflowError):
        pass


def grpc_request(random: Random) -> bytes:
    """A message's bytes."""
    wire = random.choice(GRPC_SEEDS)
    if random.random() < 0.7:
        message = messages.ModelInferRequest.FromString(wire)
        for _ in range(random.randint(1, 2)):
            mutated_message(message, random)
        wire = message.SerializeToString()
    if random.random() < 0.4:
        wire = mutated_bytes(wire, random.choice(GRPC_SEEDS), random)
    return wire


def check(request: InferRequest) -> None:
    """What everyone behind a decoder relies on."""
    assert type(request) is InferRequest
    assert request.inputs and len({item.name for item in request.inputs}) == len(request.inputs)
    assert len({item.name for item in request.outputs}) == len(request.outputs)
    assert request.priority >= 0 and (request.timeout_us is None or request.timeout_us > 0) and request.binary_default in (True, False)
    for item in request.inputs:
        assert item.data.shape == item.shape and item.data.dtype == DATATYPES[item.datatype] and item.data.flags.aligned
        if item.datatype == "BYTES":
            assert all(type(value) is bytes for value in item.data.reshape(-1))


def echo(request: InferRequest) -> InferResponse:
    """A response that gives back what came, as the output that most requests ask for."""
    return InferResponse(model="m", version="1", id=request.id, outputs=(InferOutput(name="y", data=request.inputs[0].data),))


def http_attempt(random: Random) -> tuple[Callable[[], None], int]:
    """(decoding and answering a new request, how many bytes came)."""
    body, length = http_request(random)

    def attempt() -> None:
        request = decode_request(body, length, LIMITS)
        check(request)
        encode_response(echo(request), request.outputs, binary_default=request.binary_default)

    return attempt, len(body)


def grpc_attempt(random: Random) -> tuple[Callable[[], None], int]:
    """The same, for gRPC."""
    wire = grpc_request(random)

    def attempt() -> None:
        request = decode_infer(parse(wire, messages.ModelInferRequest, LIMITS), LIMITS)
        check(request)
        encode_infer(echo(request), request.outputs)

    return attempt, len(wire)


def run(count: int, seed: int) -> Summary:
    """`count` requests, half of them for each decoder. Raises AssertionError, with how to make the request again, for what must not be."""
    accepted = refused = most_bytes = 0
    slowest = 0.0
    for number in range(count):
        random = Random(seed << 32 | number)  # noqa: S311
        traced = number % TRACED < 2
        attempt, size = (http_attempt, grpc_attempt)[number % 2](random)
        if traced:
            tracemalloc.start()
        began = time.thread_time()
        try:
            attempt()
            accepted += 1
        except ProtocolError as error:
            refused += 1
            line = str(error)
            assert line.isprintable() and len(line) <= ERROR and error.status in GRPC_CODES, f"seed {seed}, number {number}: {line!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {type(error).__name__}: {error}") from error
        finally:
            slowest = max(slowest, time.thread_time() - began)
            if traced:
                taken = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
        if traced:
            most_bytes = max(most_bytes, taken)
            assert taken <= GROWTH * size + SLACK, f"seed {seed}, number {number}: {taken:,} bytes for {size:,}"
    return Summary(accepted=accepted, refused=refused, slowest=slowest, most_bytes=most_bytes)
