"""gRPC messages, against tritonclient's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import (
    decode_infer,
    encode_infer,
    repository_parameters,
)
from muntin.serving.protocol.messages import InferOutput, InferRequest, InferResponse, Limits, ProtocolError, RequestedOutput
from muntin.serving.protocol.metadata import (
    BatchStatistics,
    Duration,
    IndexEntry,
    Statistics,
    index_document,
    statistics_document,
)
from muntin.serving.protocol.tensors import DATATYPES

LIMITS = Limits()
CONTENTS = {
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}


def to_ours(message: Any) -> Any:
    """Return our message with the bytes of tritonclient's."""
    return getattr(messages, type(message).__name__).FromString(message.SerializeToString())


def to_theirs(message: Any) -> Any:
    """Return tritonclient's message with the bytes of ours."""
    return getattr(service_pb2, type(message).__name__).FromString(message.SerializeToString())


def typed(datatype: str, shape: list[int], field: str, values: list[Any]) -> Any:
    message = messages.ModelInferRequest()
    item = message.inputs.add(name="x", datatype=datatype, shape=shape)
    getattr(item.contents, field).extend(values)
    return message


def raw(datatype: str, shape: list[int], *buffers: bytes) -> Any:
    message = messages.ModelInferRequest(raw_input_contents=buffers)
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    return message


def drawn(data: Any, datatype: str) -> Any:
    shape = data.draw(hnp.array_shapes(max_dims=4, min_side=0, max_side=4))
    if datatype == "BYTES":
        array = np.empty(int(np.prod(shape)), object)
        array[:] = data.draw(st.lists(st.binary(max_size=4), min_size=array.size, max_size=array.size))
        return array.reshape(shape)
    return data.draw(hnp.arrays(DATATYPES[datatype], shape))


def assert_same(one: Any, other: Any) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.reshape(-1).tolist() == other.reshape(-1).tolist() if one.dtype == object else one.tobytes() == other.tobytes()


def decoded(inputs: list[Any], outputs: list[Any] | None = None, **more: Any) -> InferRequest:
    """Decode a request as tritonclient's blocking client, its asynchronous one and its streams build it."""
    options = {"model_name": "m", "model_version": "2", "request_id": "7", "priority": 0, "timeout": None, "parameters": None}
    sequence = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    return decode_infer(to_ours(_get_inference_request(inputs=inputs, outputs=outputs, **options | sequence | more)), LIMITS)


@given(st.data(), st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=3))
def test_decode_tritonclients_request(data: Any, datatypes: list[str]) -> None:
    arrays = [drawn(data, datatype) for datatype in datatypes]
    inputs = [
        tritonclient.grpc.InferInput(f"x{index}", list(array.shape), datatype).set_data_from_numpy(array)
        for index, (datatype, array) in enumerate(zip(datatypes, arrays, strict=True))
    ]
    outputs = [tritonclient.grpc.InferRequestedOutput("y"), tritonclient.grpc.InferRequestedOutput("z", class_count=3)]
    own = {"text": "a", "flag": True, "whole": -3, "real": 0.5}
    request = decoded(inputs, outputs, priority=2, timeout=900, parameters=own)
    assert (request.id, request.priority, request.timeout_us) == ("7", 2, 900)
    assert {name: request.parameters[name] for name in own} == own
    assert request.outputs == (RequestedOutput(name="y", binary=True), RequestedOutput(name="z", binary=True, classification=3))
    for item, datatype, array in zip(request.inputs, datatypes, arrays, strict=True):
        assert (item.datatype, item.shape) == (datatype, array.shape)
        assert_same(item.data, array)


@given(st.data(), st.sampled_from(list(CONTENTS)))
def test_decode_contents(data: Any, datatype: str) -> None:
    array = drawn(data, datatype)
    request = decode_infer(typed(datatype, list(array.shape), CONTENTS[datatype], array.reshape(-1).tolist()), LIMITS)
    assert_same(request.inputs[0].data, array)


@given(st.data(), st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=3))
def test_tritonclient_decodes_the_answer(data: Any, datatypes: list[str]) -> None:
    arrays = [drawn(data, datatype) for datatype in datatypes]
    outputs = tuple(InferOutput(name=f"y{index}", data=array) for index, array in enumerate(arrays))
    parameters = {"a": True, "b": 2, "c": 0.5, "d": "text"}
    message = to_theirs(encode_infer(InferResponse(model="m", version="2", id="7", outputs=outputs, parameters=parameters), ()))
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "7")
    assert message.parameters["a"].bool_param is True
    assert (message.parameters["b"].int64_param, message.parameters["c"].double_param, message.parameters["d"].string_param) == (
        2,
        0.5,
        "text",
    )
    result = tritonclient.grpc.InferResult(message)
    for index, (datatype, array) in enumerate(zip(datatypes, arrays, strict=True)):
        assert result.get_output(f"y{index}").datatype == datatype
        assert_same(result.as_numpy(f"y{index}"), array)


def test_bytes_on_the_wire() -> None:
    """Field 1 "m", field 4 nothing, field 5 an input (name x, UINT8, shape packed [2]), field 7 its bytes."""
    wire = b"\x0a\x01m" + b"\x2a\x0d" + b"\x0a\x01x" + b"\x12\x05UINT8" + b"\x1a\x01\x02" + b"\x3a\x02\x05\x06"
    request = decode_infer(messages.ModelInferRequest.FromString(wire), LIMITS)
    assert request.inputs[0].data.tolist() == [5, 6]
    answer = InferResponse(model="m", version="", id="", outputs=(InferOutput(name="y", data=np.int8([-1])),))
    assert (
        encode_infer(answer, ()).SerializeToString()
        == b"\x0a\x01m" + b"\x2a\x0c" + b"\x0a\x01y" + b"\x12\x04INT8" + b"\x1a\x01\x01" + b"\x32\x01\xff"
    )


def test_empty_tensor_without_contents() -> None:
    message = messages.ModelInferRequest()
    message.inputs.add(name="x", datatype="FP32", shape=[0, 3])
    assert decode_infer(message, LIMITS).inputs[0].data.shape == (0, 3)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (messages.ModelInferRequest(), "no inputs"),
        (raw("UINT8", [2], b"ab", b"cd"), "2 raw_input_contents for 1 inputs"),
        (raw("UINT8", [2], b"abc"), "came with 3 bytes"),
        (typed("FP16", [1], "fp32_contents", [1.0]), "FP16, which has no contents: send it in raw_input_contents"),
        (typed("UINT8", [1], "int_contents", [1]), "has int_contents: UINT8 goes into uint_contents"),
        (typed("UINT8", [1], "uint_contents", [256]), "value 256: UINT8 holds 0 to 255"),
        (typed("UINT8", [2], "uint_contents", [1]), "1 values"),
        (typed("BYTES", [2], "bytes_contents", [b"a"]), "1 values"),
    ],
)
def test_invalid_message(message: Any, text: str) -> None:
    with pytest.raises(ProtocolError, match=text) as caught:
        decode_infer(message, LIMITS)
    assert "\n" not in str(caught.value)


def changed(**fields: Any) -> Any:
    message = raw("UINT8", [1], b"a")
    for name, change in fields.items():
        change(getattr(message, name))
    return message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"inputs": lambda inputs: inputs[0].contents.uint_contents.append(1)}, "has contents, and the request raw_input_contents"),
        ({"inputs": lambda inputs: setattr(inputs[0].parameters["shared_memory_region"], "string_param", "r")}, "shares no memory"),
        ({"inputs": lambda inputs: [inputs.add(name=f"x{index}") for index in range(32)]}, "33 inputs"),
        ({"outputs": lambda outputs: [outputs.add(name=f"y{index}") for index in range(33)]}, "33 outputs"),
        ({"inputs": lambda inputs: inputs.add(name="x")}, "two inputs are named 'x'"),
        ({"outputs": lambda outputs: [outputs.add(name="y"), outputs.add(name="y")]}, "two outputs are named 'y'"),
        (
            {"outputs": lambda outputs: setattr(outputs.add(name="y").parameters["classification"], "int64_param", -1)},
            "classification is -1",
        ),
        ({"parameters": lambda parameters: parameters["nothing"].SetInParent()}, "'nothing' of the request is nothing"),
        ({"parameters": lambda parameters: [setattr(parameters[str(i)], "bool_param", True) for i in range(65)]}, "65 parameters"),
    ],
)
def test_invalid_change_of_a_message(change: dict[str, Any], text: str) -> None:
    decode_infer(changed(), LIMITS)
    with pytest.raises(ProtocolError, match=text):
        decode_infer(changed(**change), LIMITS)


def encoded(document: Any, name: str) -> Any:
    """Return tritonclient's message with the bytes of ours from a document."""
    return to_theirs(messages.from_document(document, getattr(messages, name)))


def test_tritonclient_decodes_statistics() -> None:
    took = Duration(count=2, ns=70)
    batch = BatchStatistics(batch_size=4, compute_input=took, compute_infer=took, compute_output=took)
    value = Statistics(name="m", version="1", last_inference_ms=5, inference_count=8, execution_count=2, queue=took, batches=(batch,))
    (statistics,) = encoded(statistics_document([value]), "ModelStatisticsResponse").model_stats
    assert (statistics.last_inference, statistics.inference_count, statistics.execution_count) == (5, 8, 2)
    assert (statistics.inference_stats.queue.count, statistics.inference_stats.queue.ns) == (2, 70)
    assert (statistics.batch_stats[0].batch_size, statistics.batch_stats[0].compute_infer.ns) == (4, 70)
    entry = IndexEntry(name="m", version="1", state="READY")
    (listed,) = encoded({"models": index_document([entry])}, "RepositoryIndexResponse").models
    assert (listed.name, listed.version, listed.state, listed.reason) == ("m", "1", "READY", "")


def test_load_parameters() -> None:
    loading = service_pb2.RepositoryModelLoadRequest(model_name="m")
    loading.parameters["version"].string_param = "2"
    message = to_ours(loading)
    assert message.model_name == "m"
    assert repository_parameters(message, LIMITS) == {"version": "2"}
    message.parameters["file:1/model.onnx"].bytes_param = b"model"
    with pytest.raises(ProtocolError, match="takes no model"):
        repository_parameters(message, LIMITS)
