"""Bodies of HTTP requests and answers: JSON, with tensors as numbers in it or as bytes behind it (Triton's binary tensor data extension).

    body = JSON of `Inference-Header-Content-Length` bytes | bytes of the first binary tensor | bytes of the second | ...

A binary tensor has `parameters.binary_data_size` bytes; its array is a view of the body. Requests and answers have the same form. Without
binary tensors the header field is absent and the body is JSON. A body whose header field is 0 is one raw tensor (`decode_raw_request`).
JSON numbers cost a Python object each, some 50 ns and as many bytes; `Limits.json_bytes` bounds them.

Where the protocol leaves something open:
- `data` is flat, or nested exactly as `shape` says; FP16 tensors may be JSON numbers, which Triton refuses;
- JSON has no NaN and no infinity: an output with one that is not requested as binary data is an error;
- a BYTES output in JSON is text, so it must be UTF-8;
- unknown keys are ignored, as the protocol says; unknown parameters are kept for the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import orjson

from muntin.serving.protocol.messages import (
    JSON_ELEMENTS,
    InferInput,
    InferRequest,
    InferResponse,
    Limits,
    Parameter,
    ProtocolError,
    RequestedOutput,
    Tensor,
    check_count,
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
from muntin.serving.protocol.tensors import Buffer, check_datatype, datatype_of, from_binary, from_values, to_binary

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header field: number of bytes of the body that are JSON."""
_DIGITS = 12
"""Maximum number of digits in `HEADER_LENGTH`."""


def parse_header_length(text: str | None) -> int | None:
    """Parse the value of `HEADER_LENGTH`, None if it is absent. Raises ProtocolError for a wrong number."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise ProtocolError(f"{HEADER_LENGTH} is {shown(text)}: give the number of bytes that the JSON takes")
    return int(text)


def decode_request(body: Buffer, header_length: int | None, limits: Limits) -> InferRequest:
    """Decode the body of an inference request. `header_length`: number of bytes that are JSON, None for all. Raises ProtocolError.

    Arrays of binary tensors are views of `body` (read-only if it is); copies only where they would not be aligned.
    """
    header, tail = _split(body, header_length, limits)
    document = _parse(header)
    parameters = check_request_parameters(_object(document, "parameters", "the request"), limits)
    return InferRequest(
        id=check_id(document.get("id"), limits),
        inputs=_inputs(document.get("inputs"), None if header_length is None else tail, limits),
        outputs=_outputs(document.get("outputs"), binary_default=parameters.get("binary_data_output") is True, limits=limits),
        parameters=parameters,
    )


def decode_raw_request(body: Buffer, name: str, shape: tuple[int, ...], limits: Limits) -> InferRequest:
    """Decode a body without JSON (`HEADER_LENGTH` 0): one UINT8 tensor of this name and shape. All outputs are returned in binary."""
    sizes, elements = check_shape(shape, name, limits)
    data = from_binary(_bytes(body, limits), "UINT8", sizes, elements, name, limits)
    tensor = InferInput(name=name, datatype="UINT8", shape=sizes, data=data)
    return InferRequest(id="", inputs=(tensor,), outputs=(), parameters={"binary_data_output": True})


def decode_index_request(body: Buffer, limits: Limits) -> bool:
    """Decode a request for the repository's index: True for ready versions only. The body may be empty."""
    ready = _parse(_split(body, None, limits)[0]).get("ready", False) if len(body) else False
    if type(ready) is not bool:
        raise ProtocolError(f'"ready" is {shown(ready)}: give true or false')
    return ready


def decode_repository_request(body: Buffer, limits: Limits) -> dict[str, Parameter]:
    """Decode the parameters of a request to load or unload a model. The body may be empty."""
    document = _parse(_split(body, None, limits)[0]) if len(body) else {}
    return check_repository_parameters(_object(document, "parameters", "the request"), limits)


def encode_response(
    response: InferResponse, requested: tuple[RequestedOutput, ...], *, binary_default: bool
) -> tuple[list[bytes | memoryview], int | None]:
    """Encode the requested outputs of an answer: (parts of the body in order, value of `HEADER_LENGTH` or None).

    Binary tensors are views of the outputs' arrays, which must not change until the parts are sent. Raises ProtocolError for an output that
    the model does not have, and for one that JSON cannot hold: 413 for more than `JSON_ELEMENTS`.
    """
    entries: list[dict[str, Any]] = []
    tensors: list[bytes | memoryview] = []
    for output in select(response, requested, binary_default=binary_default):
        datatype = datatype_of(output.data, output.name)
        entry: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": output.data.shape}
        if output.binary:
            raw = to_binary(output.data, datatype)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tensors.append(raw)
        else:
            entry["data"] = _json_data(output.data, datatype, output.name)
        entries.append(entry)
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = entries
    header = encode_json(document)
    return [header, *tensors], len(header) if tensors else None


def encode_json(document: object) -> bytes:
    """Encode a document as JSON; arrays in it as flat lists, floats with as few digits as identify them."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _bytes(body: Buffer, limits: Limits) -> memoryview:
    view = memoryview(body).cast("B")
    if len(view) > limits.body_bytes:
        raise ProtocolError(f"a body of {len(view):,} bytes: this server takes at most {limits.body_bytes:,} (--max-body)", status=413)
    return view


def _split(body: Buffer, header_length: int | None, limits: Limits) -> tuple[memoryview, memoryview]:
    view = _bytes(body, limits)
    length = len(view) if header_length is None else header_length
    if not 0 < length <= len(view):
        raise ProtocolError(
            f"{length:,} bytes of JSON in a body of {len(view):,}: give a JSON object, and {HEADER_LENGTH} where binary tensors follow it"
        )
    if length > limits.json_bytes:
        raise ProtocolError(
            f"{length:,} bytes of JSON: this server takes at most {limits.json_bytes:,} (--max-json); send large tensors as binary data",
            status=413,
        )
    return view[:length], view[length:]


def _parse(header: memoryview) -> dict[str, Any]:
    try:
        document = orjson.loads(header)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"the request is not JSON: {error.msg} at byte {error.pos:,}") from error
    if type(document) is not dict:
        raise ProtocolError(f"the request is {shown(document)}: give a JSON object")
    return document


def _object(holder: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = holder.get(key)
    if value is None:
        return {}
    if type(value) is not dict:
        raise ProtocolError(f'"{key}" of {where} is {shown(value)}: give a JSON object')
    return value


def _entries(value: object, what: str, limits: Limits) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, entry) of each tensor in a list."""
    if type(value) is not list:
        raise ProtocolError(f'"{what}" is {shown(value)}: give an array of tensors')
    check_count(len(value), what, limits)  # before the loop: a body may hold many thousands
    entries: list[tuple[str, dict[str, Any]]] = []
    for entry in value:
        if type(entry) is not dict:
            raise ProtocolError(f'"{what}" holds {shown(entry)}: give an object for each tensor')
        entries.append((check_name(entry.get("name"), f"one of {what}", limits), entry))
    check_names([name for name, _ in entries], what, limits)
    return entries


def _inputs(value: object, tail: memoryview | None, limits: Limits) -> tuple[InferInput, ...]:
    """Decode the inputs. `tail`: bytes of the binary tensors, None if the request has no `HEADER_LENGTH`."""
    entries = _entries(value, "inputs", limits)
    if not entries:
        raise ProtocolError('"inputs" is empty: give at least one tensor')
    inputs: list[InferInput] = []
    start = 0
    for name, entry in entries:
        datatype = check_datatype(entry.get("datatype"), name)
        axes = entry.get("shape")
        if type(axes) is not list:
            raise ProtocolError(f"input {shown(name)} has the shape {shown(axes)}: give an array of whole numbers")
        shape, elements = check_shape(axes, name, limits)
        size = _binary_size(name, entry, limits)
        if size is None:
            data = from_values(_flat(entry["data"], shape, name), datatype, shape, elements, name, limits)
        elif tail is None:
            raise ProtocolError(f"input {shown(name)} has a binary_data_size, and the request no {HEADER_LENGTH}: say where its JSON ends")
        elif size > len(tail) - start:
            raise ProtocolError(f"input {shown(name)} has a binary_data_size of {size:,}: {len(tail) - start:,} bytes are left in the body")
        else:
            data = from_binary(tail[start : start + size], datatype, shape, elements, name, limits)
            start += size
        inputs.append(InferInput(name=name, datatype=datatype, shape=shape, data=data))
    if tail is not None and start != len(tail):
        raise ProtocolError(f"{len(tail) - start:,} bytes follow the last tensor: give each binary tensor its binary_data_size")
    return tuple(inputs)


def _binary_size(name: str, entry: dict[str, Any], limits: Limits) -> int | None:
    """Return the number of bytes of a binary tensor, None for one with "data"."""
    parameters = check_tensor_parameters(_object(entry, "parameters", f"input {shown(name)}"), name, limits)
    size, values = parameters.get("binary_data_size"), entry.get("data")
    if size is None:
        if values is None:
            raise ProtocolError(f'input {shown(name)} has no tensor: give "data", or the parameter "binary_data_size" and its bytes')
        return None
    if values is not None:
        raise ProtocolError(f'input {shown(name)} has "data" and a binary_data_size: give one of them')
    if type(size) is not int or size < 0:
        raise ProtocolError(f"input {shown(name)} has a binary_data_size of {shown(size)}: give its number of bytes")
    return size


def _outputs(value: object, *, binary_default: bool, limits: Limits) -> tuple[RequestedOutput, ...]:
    if value is None:
        return ()
    return tuple(
        check_requested(name, _object(entry, "parameters", f"output {shown(name)}"), binary_default=binary_default, limits=limits)
        for name, entry in _entries(value, "outputs", limits)
    )


def _flat(data: object, shape: tuple[int, ...], name: str) -> list[Any]:
    """Return the values of a tensor as a flat list, from one that is flat or nested as `shape` says."""
    if type(data) is not list:
        raise ProtocolError(f'input {shown(name)} has {shown(data)} as "data": give an array')
    if list not in set(map(type, data)):
        return data
    rows: list[Any] = [data]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in rows):
            raise ProtocolError(f'input {shown(name)} has "data" nested otherwise than its shape {list(shape)}: give that, or a flat array')
        rows = list(chain.from_iterable(rows))
    return rows


def _json_data(array: Tensor, datatype: str, name: str) -> Any:
    if array.size > JSON_ELEMENTS:
        raise ProtocolError(
            f"output {shown(name)} has {array.size:,} elements, and JSON carries at most {JSON_ELEMENTS:,}: ask for it as binary data",
            status=413,
        )
    if datatype == "BYTES":
        try:
            return [item.decode() for item in array.reshape(-1)]
        except UnicodeDecodeError as error:
            raise ProtocolError(f"output {shown(name)} holds bytes that are no text: ask for it as binary data") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f"output {shown(name)} holds NaN or infinity, which JSON cannot carry: ask for it as binary data")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1)
