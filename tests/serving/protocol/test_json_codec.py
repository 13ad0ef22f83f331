"""HTTP bodies: the protocol's own examples, tritonclient's reader and writer as references, and what is refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from muntin.serving.protocol.json_codec import (
    decode_index_request,
    decode_raw_request,
    decode_repository_request,
    decode_request,
    encode_json,
    encode_response,
    parse_header_length,
)
from muntin.serving.protocol.messages import InferOutput, InferRequest, InferResponse, Limits, ProtocolError, RequestedOutput
from muntin.serving.protocol.tensors import DATATYPES

LIMITS = Limits()
NUMBERS = [name for name in DATATYPES if name != "BYTES"]


def decode(document: Any, tail: bytes | None = None, limits: Limits = LIMITS) -> InferRequest:
    header = orjson.dumps(document)
    return decode_request(header + (tail or b""), None if tail is None else len(header), limits)


def one(datatype: str, shape: list[Any], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, **more}]}


def binary(size: Any) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": size}}


def response(*outputs: InferOutput, **more: Any) -> InferResponse:
    return InferResponse(model="m", version="3", id="", outputs=outputs, **more)


def encode(answer: InferResponse, *requested: RequestedOutput, binary_default: bool = False) -> tuple[bytes, int | None]:
    parts, length = encode_response(answer, requested, binary_default=binary_default)
    return b"".join(parts), length


def drawn(data: Any, datatype: str, *, finite: bool) -> Any:
    """An array of a datatype, of any small shape."""
    shape = data.draw(hnp.array_shapes(max_dims=4, min_side=0, max_side=4))
    if datatype == "BYTES":
        array = np.empty(int(np.prod(shape)), object)
        array[:] = data.draw(st.lists(st.text(max_size=4).map(str.encode), min_size=array.size, max_size=array.size))
        return array.reshape(shape)
    dtype = DATATYPES[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else {}
    return data.draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **elements)))


def assert_same(one: Any, other: Any) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.reshape(-1).tolist() == other.reshape(-1).tolist() if one.dtype == object else one.tobytes() == other.tobytes()


# ---- the documented examples ----

BINARY_EXAMPLE = b"""{
  "model_name" : "mymodel",
  "inputs" : [
    {
      "name" : "input0",
      "shape" : [ 2, 2 ],
      "datatype" : "UINT32",
      "parameters" : {
        "binary_data_size" : 16
      }
    },
    {
      "name" : "input1",
      "shape" : [ 3 ],
      "datatype" : "BOOL",
      "parameters" : {
        "binary_data_size" : 3
      }
    }
  ],
  "outputs" : [
    {
      "name" : "output0",
      "parameters" : {
        "binary_data" : true
      }
    }
  ]
}
"""


def test_example_of_the_binary_extension() -> None:
    tail = struct.pack("<4I", 1, 2, 3, 4000000000) + b"\1\0\1"
    request = decode_request(BINARY_EXAMPLE + tail, len(BINARY_EXAMPLE), LIMITS)
    first, second = request.inputs
    assert (first.name, first.datatype, first.shape) == ("input0", "UINT32", (2, 2))
    assert first.data.tolist() == [[1, 2], [3, 4000000000]]
    assert (second.name, second.data.tolist()) == ("input1", [True, False, True])
    assert request.outputs == (RequestedOutput(name="output0", binary=True),)
    assert request.id == ""


def test_example_of_the_protocol() -> None:
    request = decode(
        {
            "id": "42",
            "inputs": [
                {"name": "input0", "shape": [2, 2], "datatype": "UINT32", "data": [1, 2, 3, 4]},
                {"name": "input1", "shape": [3], "datatype": "BOOL", "data": [True, False, True]},
            ],
            "outputs": [{"name": "output0"}],
        }
    )
    assert request.id == "42"
    assert [item.data.tolist() for item in request.inputs] == [[[1, 2], [3, 4]], [True, False, True]]
    assert request.outputs == (RequestedOutput(name="output0"),)
    scores = np.float32([[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]])
    answer = InferResponse(model="mymodel", version="1", id="42", outputs=(InferOutput(name="output0", data=scores),))
    assert encode(answer, *request.outputs) == (
        b'{"model_name":"mymodel","model_version":"1","id":"42","outputs":'
        b'[{"name":"output0","datatype":"FP32","shape":[3,2],"data":[1.0,1.1,2.0,2.1,3.0,3.1]}]}',
        None,
    )


def test_bytes_of_a_binary_response() -> None:
    answer = response(InferOutput(name="a", data=np.uint16([[1, 258]])), InferOutput(name="b", data=np.array([b"xy", b""], object)))
    header = (
        b'{"model_name":"m","model_version":"3","outputs":[{"name":"a","datatype":"UINT16","shape":[1,2],"parameters":{"binary_data_size":4}},'
        b'{"name":"b","datatype":"BYTES","shape":[2],"parameters":{"binary_data_size":10}}]}'
    )
    assert encode(answer, binary_default=True) == (header + b"\1\0\2\1" + b"\2\0\0\0xy\0\0\0\0", len(header))


def test_json_and_binary_outputs_in_one_response() -> None:
    answer = response(InferOutput(name="a", data=np.int8([-1])), InferOutput(name="b", data=np.int8([-2])), parameters={"recovered": True})
    body, length = encode(answer, RequestedOutput(name="b", binary=True), RequestedOutput(name="a"))
    assert length is not None and body[length:] == b"\xfe"
    document = orjson.loads(body[:length])
    assert document["parameters"] == {"recovered": True}
    assert [("data" in entry, entry.get("parameters")) for entry in document["outputs"]] == [(False, {"binary_data_size": 1}), (True, None)]


# ---- round trips, with tritonclient as the other side ----


@given(st.data(), st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=3), st.booleans())
def test_requests_of_tritonclient(data: Any, datatypes: list[str], as_bytes: bool) -> None:
    arrays = [drawn(data, datatype, finite=not as_bytes) for datatype in datatypes]
    inputs = []
    for index, (datatype, array) in enumerate(zip(datatypes, arrays, strict=True)):
        item = tritonclient.http.InferInput(f"x{index}", list(array.shape), datatype)
        inputs.append(item.set_data_from_numpy(array, binary_data=as_bytes))
    wanted = tritonclient.http.InferRequestedOutput
    outputs = [wanted("y", binary_data=as_bytes), wanted("z", class_count=3)]
    body, length = tritonclient.http.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, request_id="7", priority=2, timeout=900, parameters={"own": "value"}
    )
    request = decode_request(body, length, LIMITS)
    assert (request.id, request.priority, request.timeout_us, request.parameters["own"]) == ("7", 2, 900, "value")
    assert request.outputs == (RequestedOutput(name="y", binary=as_bytes), RequestedOutput(name="z", binary=True, classification=3))
    for item, datatype, array in zip(request.inputs, datatypes, arrays, strict=True):
        assert (item.datatype, item.shape) == (datatype, array.shape)
        assert_same(item.data, array)


@given(st.data(), st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=3), st.booleans())
def test_responses_in_tritonclient(data: Any, datatypes: list[str], as_bytes: bool) -> None:
    arrays = [drawn(data, datatype, finite=not as_bytes) for datatype in datatypes]
    body, length = encode(
        response(*(InferOutput(name=f"y{index}", data=array) for index, array in enumerate(arrays))), binary_default=as_bytes
    )
    result = tritonclient.http.InferResult.from_response_body(body, header_length=length)
    for index, array in enumerate(arrays):
        found = result.as_numpy(f"y{index}")
        if array.dtype == object and not as_bytes:  # JSON gives it text
            found = np.array([text.encode() for text in found.reshape(-1)], object).reshape(found.shape)
        assert_same(found, array)


@given(st.data(), st.sampled_from(list(DATATYPES)))
def test_nested_data(data: Any, datatype: str) -> None:
    array = drawn(data, datatype, finite=True)
    values = np.array([item.decode() for item in array.reshape(-1)], object).reshape(array.shape) if datatype == "BYTES" else array
    flat = decode(one(datatype, list(array.shape), data=values.reshape(-1).tolist()))
    nested = decode(one(datatype, list(array.shape), data=values.tolist()))
    assert_same(nested.inputs[0].data, flat.inputs[0].data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda body: np.frombuffer(body, np.uint8).data])
def test_arrays_are_views_of_any_buffer(kind: Any) -> None:
    header = orjson.dumps(one("UINT8", [3], **binary(3)))
    body = kind(header + b"\1\2\3")
    array = decode_request(body, len(header), LIMITS).inputs[0].data
    assert array.tolist() == [1, 2, 3]
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_outputs_that_json_cannot_hold() -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ProtocolError, match=r"output 'y' holds NaN or infinity.*binary data"):
            encode(response(InferOutput(name="y", data=np.float16([0, value]))))
        assert encode(response(InferOutput(name="y", data=np.float16([0, value]))), binary_default=True)[1] is not None
    with pytest.raises(ProtocolError, match="output 'y' holds bytes that are no text"):
        encode(response(InferOutput(name="y", data=np.array([b"\xff"], object))))


# ---- one tensor without JSON ----


def test_raw_body() -> None:
    request = decode_raw_request(bytes(range(12)), "images", (1, 2, 2, 3), LIMITS)
    assert request.binary_default
    (item,) = request.inputs
    assert (item.name, item.shape) == ("images", (1, 2, 2, 3))
    assert item.data.reshape(-1).tolist() == list(range(12))
    with pytest.raises(ProtocolError, match=r"came with 13 bytes.*takes 12"):
        decode_raw_request(bytes(13), "images", (1, 2, 2, 3), LIMITS)


# ---- what is refused ----

GOOD = {"name": "x", "datatype": "UINT8", "shape": [1], "data": [1]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the request is an array: give a JSON object"),
        ("x", "the request is 'x'"),
        ({}, '"inputs" is nothing'),
        ({"inputs": {}}, '"inputs" is an object: give an array'),
        ({"inputs": []}, '"inputs" is empty'),
        ({"inputs": [1]}, '"inputs" holds 1: give an object'),
        ({"inputs": [{}]}, "one of inputs has the name nothing"),
        ({"inputs": [GOOD] * 2}, "two inputs are named 'x'"),
        ({"inputs": [GOOD | {"name": str(index)} for index in range(33)]}, "33 inputs: this server takes at most 32"),
        ({"inputs": [GOOD | {"shape": 1}]}, "shape 1: give an array"),
        ({"inputs": [GOOD | {"data": 1}]}, 'has 1 as "data"'),
        ({"inputs": [GOOD | {"data": {}}]}, 'has an object as "data"'),
        ({"inputs": [GOOD | {"data": None}]}, "has no tensor"),
        ({"inputs": [GOOD | {"data": [[1]]}]}, "has an array in its data"),
        ({"inputs": [GOOD | {"parameters": []}]}, "\"parameters\" of input 'x' is an array"),
        ({"inputs": [GOOD | {"parameters": {"shared_memory_region": "r"}}]}, "shared_memory_region"),
        ({"inputs": [GOOD], "parameters": 3}, '"parameters" of the request is 3'),
        ({"inputs": [GOOD], "id": 3}, "the request's id is 3"),
        ({"inputs": [GOOD], "id": "x" * 257}, "257 characters"),
        ({"inputs": [GOOD], "outputs": {}}, '"outputs" is an object'),
        ({"inputs": [GOOD], "outputs": [{"name": "y"}] * 2}, "two outputs are named 'y'"),
        ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}, "shares no memory"),
    ],
)
def test_refused_documents(document: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        decode(document)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 2], [[1, 2], [3]]),
        ([2, 2], [[1, 2, 3, 4]]),
        ([2, 2], [[[1, 2], [3, 4]]]),
        ([2, 2], [1, [2, 3], 4]),
        ([4], [[1], [2], [3], [4]]),
    ],
)
def test_data_nested_wrongly(shape: list[int], data: Any) -> None:
    with pytest.raises(ProtocolError, match=r"nested otherwise|in its data"):
        decode(one("UINT8", shape, data=data))


@pytest.mark.parametrize(
    ("size", "tail", "more", "message"),
    [
        (4, b"abc", {}, "binary_data_size of 4: 3 bytes are left"),
        (3, b"abcd", {}, "1 bytes follow the last tensor"),
        (2, b"ab", {}, "came with 2 bytes"),
        (-3, b"abc", {}, "binary_data_size of -3"),
        (3.0, b"abc", {}, "binary_data_size of 3.0"),
        (True, b"abc", {}, "binary_data_size of true"),
        (2**63, b"abc", {}, "3 bytes are left"),
        (3, b"abc", {"data": [1, 2, 3]}, 'has "data" and a binary_data_size'),
        (3, None, {}, "no Inference-Header-Content-Length"),
    ],
)
def test_wrong_binary_sizes(size: Any, tail: bytes | None, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(one("UINT8", [3], **binary(size), **more), tail)


@pytest.mark.parametrize("tail", [b"x", b"   "])
def test_bytes_after_the_json(tail: bytes) -> None:
    with pytest.raises(ProtocolError, match="follow the last tensor"):
        decode({"inputs": [GOOD]}, tail)
    assert decode({"inputs": [GOOD]}, b"").inputs[0].data.tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b'{"inputs": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 5000,
        b'{"a":' * 5000,
        b"{}x",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b"\0",
    ],
)
def test_invalid_json(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="JSON") as caught:
        decode_request(text, None, LIMITS)
    assert "\n" not in str(caught.value)


def test_integers_beyond_64_bits() -> None:
    """The parser makes floats of them, which a tensor of integers does not take."""
    text = b'{"inputs":[{"name":"x","datatype":"UINT64","shape":[1],"data":[18446744073709551616]}]}'
    with pytest.raises(ProtocolError, match="beyond 64 bits"):
        decode_request(text, None, LIMITS)


@pytest.mark.parametrize(("length", "message"), [(0, "0 bytes of JSON"), (-1, "-1 bytes of JSON"), (3, "3 bytes of JSON in a body of 2")])
def test_header_length_beyond_the_body(length: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode_request(b"{}", length, LIMITS)


def test_body_and_json_limits() -> None:
    small = Limits(body_bytes=200, json_bytes=100)
    for body, length, message in ((bytes(201), 10, "body of 201 bytes.*--max-body"), (b" " * 101, None, "101 bytes of JSON.*--max-json")):
        with pytest.raises(ProtocolError, match=message) as caught:
            decode_request(body, length, small)
        assert caught.value.status == 413
    with pytest.raises(ProtocolError, match="body of 201 bytes") as caught:
        decode_raw_request(bytes(201), "x", (201,), small)
    assert caught.value.status == 413


@pytest.mark.parametrize(("text", "length"), [(None, None), ("0", 0), ("0012", 12), ("999999999999", 999999999999)])
def test_header_lengths(text: str | None, length: int | None) -> None:
    assert parse_header_length(text) == length


@pytest.mark.parametrize("text", ["", "-1", "+1", "1e3", "0x10", "1_0", " 1", "٣", "²", "9" * 13, "9" * 5000])
def test_invalid_header_lengths(text: str) -> None:
    with pytest.raises(ProtocolError, match="Inference-Header-Content-Length is"):
        parse_header_length(text)


# ---- the repository's routes ----


def test_index_requests() -> None:
    assert not decode_index_request(b"", LIMITS)
    assert not decode_index_request(b"{}", LIMITS)
    assert decode_index_request(b'{"ready":true}', LIMITS)
    for body in (b'{"ready":1}', b"[]", b"x"):
        with pytest.raises(ProtocolError):
            decode_index_request(body, LIMITS)


def test_repository_requests() -> None:
    assert decode_repository_request(b"", LIMITS) == {}
    assert decode_repository_request(b'{"parameters":{"unload_dependents":false}}', LIMITS) == {"unload_dependents": False}
    for body, message in ((b'{"parameters":{"config":"{}"}}', "config"), (b'{"parameters":{"file:1/model.onnx":""}}', "file:1/model.onnx")):
        with pytest.raises(ProtocolError, match=message):
            decode_repository_request(body, LIMITS)


def test_encode_json() -> None:
    assert encode_json({"error": "no"}) == b'{"error":"no"}'
