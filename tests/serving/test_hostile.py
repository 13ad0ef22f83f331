"""No request makes a decoder do anything but decode or refuse it. Some thousands of mutated ones here, ten million in `test_soak`."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import METHODS, decode_infer
from muntin.serving.protocol.json_codec import decode_index_request, decode_raw_request, decode_repository_request, decode_request
from muntin.serving.protocol.messages import Limits, ProtocolError
from muntin.serving.protocol.tensors import DATATYPES
from muntin.serving.protocol.wire import parse

LIMITS = Limits()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "classification", "priority", "timeout", "shared_memory_region"]), JSON, max_size=3
)
TENSOR = st.fixed_dictionaries(
    {"name": st.text(max_size=3) | JSON},
    optional={
        "datatype": st.sampled_from(list(DATATYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**40), max_size=4) | JSON,
        "data": st.lists(st.integers(-1, 300), max_size=6) | JSON,
        "parameters": PARAMETERS | JSON,
    },
)
DOCUMENT = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | JSON},
    optional={"outputs": st.lists(TENSOR, max_size=3) | JSON, "parameters": PARAMETERS | JSON, "id": JSON},
)


def test_mutated_requests(hostile: Any) -> None:
    """CPU time, so that a busy machine is no failure: what would fail is a request whose cost grows with what it announces."""
    summary = hostile.run(20_000, seed=0)
    assert min(summary.accepted, summary.refused) > 2_000
    assert summary.accepted + summary.refused == 20_000
    assert summary.slowest < 1


def test_a_request_can_be_made_again(hostile: Any) -> None:
    for make in (hostile.http_request, hostile.grpc_request):
        assert make(hostile.Random(5)) == make(hostile.Random(5)) != make(hostile.Random(6))


def only_protocol_errors(decode: Any, *arguments: Any) -> None:
    try:
        decode(*arguments)
    except ProtocolError as error:
        assert str(error).isprintable()


@settings(max_examples=150)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 210))
def test_any_bytes(body: bytes, length: int | None) -> None:
    only_protocol_errors(decode_request, body, length, LIMITS)
    only_protocol_errors(decode_index_request, body, LIMITS)
    only_protocol_errors(decode_repository_request, body, LIMITS)
    only_protocol_errors(decode_raw_request, body, "x", (1, 4, 3), LIMITS)


@settings(max_examples=150)
@given(DOCUMENT | JSON, st.binary(max_size=20), st.booleans())
def test_any_document(document: Any, tail: bytes, with_tail: bool) -> None:
    header = orjson.dumps(document)
    only_protocol_errors(decode_request, header + tail * with_tail, len(header) if with_tail else None, LIMITS)
    only_protocol_errors(decode_repository_request, header, LIMITS)


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_any_message(wire: bytes) -> None:
    only_protocol_errors(lambda: decode_infer(parse(wire, messages.ModelInferRequest, LIMITS), LIMITS))
    for method in METHODS:
        only_protocol_errors(parse, wire, method.request, LIMITS)


def test_a_billion_announced_elements_cost_nothing() -> None:
    """What is announced is compared with what came; were it allocated, this would need 8 GB."""
    large = Limits(elements=1 << 40)
    for shape in ([1 << 30], [1 << 20, 1 << 20], [0, 1 << 39], [1 << 39, 0]):
        for datatype in DATATYPES:
            entry = {"name": "x", "datatype": datatype, "shape": shape}
            body = orjson.dumps({"inputs": [entry | {"data": []}]})
            only_protocol_errors(decode_request, body, None, large)
            header = orjson.dumps({"inputs": [entry | {"parameters": {"binary_data_size": 4}}]})
            only_protocol_errors(decode_request, header + bytes(4), len(header), large)
            message = messages.ModelInferRequest(raw_input_contents=[bytes(4)])
            message.inputs.add(name="x", datatype=datatype, shape=shape)
            only_protocol_errors(decode_infer, message, large)
            del message.raw_input_contents[:]
            only_protocol_errors(decode_infer, message, large)


def test_arrays_of_a_request_do_not_alias_each_other() -> None:
    """Two tensors of one body are two parts of it."""
    entries = [{"name": name, "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}} for name in "ab"]
    header = orjson.dumps({"inputs": entries})
    first, second = decode_request(bytearray(header + b"\1\2\3\4"), len(header), LIMITS).inputs
    assert not np.shares_memory(first.data, second.data)
    assert (first.data.tolist(), second.data.tolist()) == ([1, 2], [3, 4])
