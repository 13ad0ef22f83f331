"""Converts gRPC messages to and from the values of `messages`.

The tensors of a request are raw (`raw_input_contents`, one for each input, in order) or numbers in each input's `contents`, in the list of
its datatype; never both. Those of an answer are raw. protobuf copies the bytes of a tensor, which HTTP does not.

`wire.parse` bounds the memory of a message before it gets here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from muntin.serving.protocol import messages as protocol
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.messages import (
    InferInput,
    InferRequest,
    InferResponse,
    Limits,
    Parameter,
    ProtocolError,
    RequestedOutput,
    Tensor,
    check_id,
    check_name,
    check_names,
    check_repository_parameters,
    check_request_parameters,
    check_requested,
    check_shape,
    check_tensor_parameters,
    shown,
)
from muntin.serving.protocol.selection import select
from muntin.serving.protocol.tensors import DATATYPES, check_datatype, check_range, datatype_of, from_binary, strings_array, to_binary

SERVICE = "inference.GRPCInferenceService"
"""The service's full name; the path of a method is /SERVICE/NAME."""


class Method(NamedTuple):
    """A method of the service: name, classes of its messages, and whether both sides send a stream of them."""

    name: str
    request: type[messages.Message]
    response: type[messages.Message]
    streams: bool


METHODS = tuple(
    Method(method.name, getattr(messages, method.input_type.name), getattr(messages, method.output_type.name), method.client_streaming)
    for method in messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
)
"""All methods that are served."""

LACKING: Mapping[str, str] = {
    "TraceSetting": protocol.LACKING["trace/setting"],
    "LogSettings": protocol.LACKING["logging"],
    **{
        f"{kind}SharedMemory{what}": protocol.LACKING["sharedmemory"]
        for kind in ("System", "Cuda")
        for what in ("Status", "Register", "Unregister")
    },
}
"""Methods of Triton's service that are not served -> the message of their refusal."""

_CONTENTS: dict[str, tuple[str, type[np.generic]]] = {
    "BOOL": ("bool_contents", np.bool_),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), ("uint_contents", np.uint32)),
    "UINT64": ("uint64_contents", np.uint64),
    **dict.fromkeys(("INT8", "INT16", "INT32"), ("int_contents", np.int32)),
    "INT64": ("int64_contents", np.int64),
    "FP32": ("fp32_contents", np.float32),
    "FP64": ("fp64_contents", np.float64),
    "BYTES": ("bytes_contents", np.object_),
}
"""Datatype -> field of `contents`, and type of its values."""
_CHOICES = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
"""Type of a parameter -> its field in a message."""


def decode_infer(message: messages.ModelInferRequest, limits: Limits) -> InferRequest:
    """Decode a request for inference. Raw tensors become read-only views of the message's bytes. Raises ProtocolError."""
    check_names([item.name for item in message.inputs], "inputs", limits)
    check_names([item.name for item in message.outputs], "outputs", limits)
    if not len(message.inputs):
        raise ProtocolError("the request has no inputs: give at least one tensor")
    return InferRequest(
        id=check_id(message.id, limits),
        parameters=check_request_parameters(_parameters(message.parameters), limits) | {"binary_data_output": True},
        inputs=tuple(_input(item, raw, limits) for item, raw in zip(message.inputs, _raw(message), strict=True)),
        outputs=tuple(_requested(item, limits) for item in message.outputs),
    )


def encode_infer(response: InferResponse, requested: tuple[RequestedOutput, ...]) -> messages.ModelInferResponse:
    """Encode the requested outputs of an answer. Raises ProtocolError for an output that the answer does not have."""
    message = messages.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        setattr(message.parameters[name], _CHOICES[type(value)], value)
    for output in select(response, requested, binary_default=True):
        datatype = datatype_of(output.data, output.name)
        message.outputs.add(name=output.name, datatype=datatype, shape=output.data.shape)
        message.raw_output_contents.append(bytes(to_binary(output.data, datatype)))
    return message


def repository_parameters(
    message: messages.RepositoryModelLoadRequest | messages.RepositoryModelUnloadRequest, limits: Limits
) -> dict[str, Parameter]:
    """Return the parameters of a request to load or unload a model. Raises ProtocolError for a model sent with it."""
    return check_repository_parameters(_parameters(message.parameters), limits)


def _raw(message: messages.ModelInferRequest) -> list[bytes] | list[None]:
    """Return the raw bytes of each input, or None for each where they are numbers in `contents`."""
    count = len(message.raw_input_contents)
    if not count:
        return [None] * len(message.inputs)
    if count != len(message.inputs):
        raise ProtocolError(f"{count:,} raw_input_contents for {len(message.inputs)} inputs: give one for each, in their order, or none")
    return list(message.raw_input_contents)


def _input(item: messages.ModelInferRequest.InferInputTensor, raw: bytes | None, limits: Limits) -> InferInput:
    name = check_name(item.name, "one of inputs", limits)
    datatype = check_datatype(item.datatype, name)
    shape, elements = check_shape(item.shape, name, limits)
    check_tensor_parameters(_parameters(item.parameters), name, limits)
    if raw is None:
        data = _from_contents(item.contents, datatype, shape, elements, name, limits)
    elif item.HasField("contents"):
        raise ProtocolError(f"input {shown(name)} has contents, and the request raw_input_contents: give one of them")
    else:
        data = from_binary(raw, datatype, shape, elements, name, limits)
    return InferInput(name=name, datatype=datatype, shape=shape, data=data)


def _from_contents(
    contents: messages.InferTensorContents, datatype: str, shape: tuple[int, ...], elements: int, name: str, limits: Limits
) -> Tensor:
    if datatype not in _CONTENTS:
        raise ProtocolError(f"input {shown(name)} is {datatype}, which has no contents: send it in raw_input_contents")
    field_name, wire_dtype = _CONTENTS[datatype]
    filled = [field.name for field, _ in contents.ListFields()]
    if any(field != field_name for field in filled):
        raise ProtocolError(f"input {shown(name)} has {', '.join(filled)}: {datatype} goes into {field_name}, or into raw_input_contents")
    values = getattr(contents, field_name)
    if datatype == "BYTES":
        return strings_array(values, shape, elements, name, limits)
    if len(values) != elements:
        raise ProtocolError(f"input {shown(name)} came with {len(values):,} values: shape {list(shape)} takes {elements:,}")
    array: Tensor = np.fromiter(values, wire_dtype, elements)
    dtype = DATATYPES[datatype]
    if elements and dtype.itemsize < array.itemsize:
        check_range(int(array.min()), int(array.max()), datatype, name)
    return array.astype(dtype, copy=False).reshape(shape)


def _requested(item: messages.ModelInferRequest.InferRequestedOutputTensor, limits: Limits) -> RequestedOutput:
    name = check_name(item.name, "one of outputs", limits)
    return check_requested(name, _parameters(item.parameters), binary_default=True, limits=limits)


def _parameters(parameters: Mapping[str, Any]) -> dict[str, object]:
    """Return the values of a message's parameters, None for one without a value."""
    choices = {name: (parameter, parameter.WhichOneof("parameter_choice")) for name, parameter in parameters.items()}
    return {name: choice and getattr(parameter, choice) for name, (parameter, choice) in choices.items()}
