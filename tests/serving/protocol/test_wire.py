"""Limits on the bytes of gRPC messages, checked before protobuf parses them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.messages import Limits, ProtocolError
from muntin.serving.protocol.wire import parse

SMALL = Limits(json_bytes=200, tensors=2, parameters=4)
"""At most 3 * 2 + 4 + 16 = 26 fields."""


def request(*raw: bytes, **fields: Any) -> bytes:
    message = messages.ModelInferRequest(raw_input_contents=raw, **fields)
    message.inputs.add(name="x", datatype="UINT8", shape=[3])
    message.parameters["timeout"].int64_param = 3
    return message.SerializeToString()


def test_large_raw_tensors() -> None:
    message = parse(request(bytes(5000), bytes(300), model_name="m"), messages.ModelInferRequest, SMALL)
    assert (message.model_name, [len(raw) for raw in message.raw_input_contents]) == ("m", [5000, 300])


@pytest.mark.parametrize("field", ["id", "model_name"])
def test_other_large_fields(field: str) -> None:
    with pytest.raises(
        ProtocolError, match=r"message of 2\d\d bytes, raw tensors not counted.*at most 200 \(--max-json\).*raw_input_contents"
    ) as caught:
        parse(request(bytes(5000), **{field: "x" * 200}), messages.ModelInferRequest, SMALL)
    assert caught.value.status == 413


def test_large_contents() -> None:
    message = messages.ModelInferRequest()
    message.inputs.add(name="x", datatype="UINT8", shape=[300]).contents.uint_contents.extend([1] * 300)
    with pytest.raises(ProtocolError, match="send large tensors in raw_input_contents"):
        parse(message.SerializeToString(), messages.ModelInferRequest, SMALL)


@pytest.mark.parametrize("empty", [b"\x2a\x00", b"\x32\x00", b"\x3a\x00", b"\x22\x00", b"\x9a\x06\x00"])
def test_too_many_fields(empty: bytes) -> None:
    """Empty tensors, parameters and unknown fields: each of 2 bytes on the wire, and of many more in memory."""
    assert parse(empty * 20, messages.ModelInferRequest, SMALL) is not None
    with pytest.raises(ProtocolError, match="more than 26 fields"):
        parse(empty * 27, messages.ModelInferRequest, SMALL)


@pytest.mark.parametrize(
    "wire",
    [
        b"\x3a",
        b"\x3a\x05abc",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x3a" + b"\xff" * 20,
        b"\xff" * 20,
        b"\x0b\x0c",
        b"\x0f",
        b"\x08",
        b"\x98\x06\x01",
        b"\xa5\x06abcd",
        b"\x0a\x01\xff",
        b"\x2a\x02\x0a\x05",
        b"\x00\x01",
    ],
)
def test_malformed_message(wire: bytes) -> None:
    with pytest.raises(ProtocolError, match="is no ModelInferRequest") as caught:
        parse(wire, messages.ModelInferRequest, SMALL)
    assert caught.value.grpc_code == "INVALID_ARGUMENT"


def test_messages_without_tensors() -> None:
    assert parse(b"", messages.ServerLiveRequest, SMALL) is not None
    assert parse(b"\x0a\x01m", messages.ModelReadyRequest, SMALL).name == "m"
    with pytest.raises(ProtocolError, match="is no ModelReadyRequest"):
        parse(b"\x0a\x05m", messages.ModelReadyRequest, SMALL)
    with pytest.raises(ProtocolError, match="message of 5,003 bytes") as caught:
        parse(b"\x3a\x88\x27" + bytes(5000), messages.RepositoryModelLoadRequest, SMALL)
    assert caught.value.status == 413


@given(st.lists(st.binary(max_size=300), max_size=2), st.text(max_size=20))
def test_small_requests(raw: list[bytes], identity: str) -> None:
    wire = request(*raw, id=identity)
    assert (
        parse(wire, messages.ModelInferRequest, SMALL).SerializeToString()
        == messages.ModelInferRequest.FromString(wire).SerializeToString()
    )
