"""The HTTP face's bodies: JSON, with tensors as numbers in it or as bytes behind it (Triton's binary tensor data extension).

    body = JSON of `Inference-Header-Content-Length` bytes | bytes of the first binary tensor | bytes of the second | ...

A binary tensor is the entry's `parameters.binary_data_size` bytes long. Request and response have the same form; without binary tensors the
header field is absent and the body is JSON alone. A body whose header field is 0 is one raw tensor without JSON (`decode_raw_request`).

Reading one image of 512 x 512 in binary costs some microseconds whatever its size: the JSON is short and the array is a view of the body.
A client says the same of every image of a size, so what such a JSON said is remembered (`Heads`) and read once. JSON numbers cost a Python
object each, some 50 ns and as many bytes: `Limits.json_bytes` is what bounds them.

Where the protocol leaves something open:
- `data` is flat, or nested exactly as `shape` says; a FP16 tensor may come and go as JSON numbers, which Triton refuses;
- JSON has no NaN and no infinity. An output that holds one and was not asked for as binary data is an error that says so;
- a BYTES output goes into JSON as text, so it must be UTF-8; otherwise it is an error that says so;
- keys that the protocol does not name are passed over, as it asks; parameters that it does not name are kept for the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import orjson

from muntin.serving.protocol.messages import (
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
    check_repository_parameters,
    check_request_parameters,
    check_requested,
    check_shape,
    check_tensor_parameters,
    check_unique,
    shown,
)
from muntin.serving.protocol.selection import select
from muntin.serving.protocol.tensors import DATATYPES, Buffer, check_datatype, datatype_of, from_binary, from_values, to_binary

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header field that says how many bytes of a body are JSON."""
JSON_ELEMENTS = 1 << 23
"""Numbers of an answer that go into JSON at most, some ten bytes each."""
_DIGITS = 12
_HEADS, _HEAD_BYTES = 64, 2048  # that are remembered, and their length at most


class Announced(NamedTuple):
    """An input as a request's JSON has it. `data`: its values, or None where `size` bytes of them follow the JSON."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: int
    size: int
    data: Tensor | None


class Head(NamedTuple):
    """What the JSON of a request says, checked; whether it fits the bytes behind it is not known yet."""

    id: str
    inputs: tuple[Announced, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]


class Heads:
    """The heads of requests that came lately, by their bytes. Only those whose tensors all follow the JSON, and short ones."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Head] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def read(self, header: memoryview, limits: Limits) -> Head:
        """What a JSON says. Raises ProtocolError as `decode_request` does. `limits` are the same at every call."""
        if len(header) > _HEAD_BYTES:
            return _head(header, limits)
        key = header.tobytes()
        head = self._known.get(key)
        if head is None:
            head = _head(header, limits)
            if all(announced.data is None for announced in head.inputs):
                self._known[key] = head
                if len(self._known) > _HEADS:
                    self._known.popitem(last=False)
        return head


def parse_header_length(text: str | None) -> int | None:
    """The value of the header field `HEADER_LENGTH`; None where a request has none. Raises ProtocolError for what is no number of bytes."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise ProtocolError(f"{HEADER_LENGTH} is {shown(text)}: give the number of bytes that the JSON takes")
    return int(text)


def decode_request(body: Buffer, header_length: int | None, limits: Limits, heads: Heads | None = None) -> InferRequest:
    """An inference request's body. `header_length`: how many bytes of it are JSON, None for all. `heads`: those that are remembered.

    Arrays of binary tensors are views of `body` (read-only where it is), copies only where they would not be aligned.
    """
    header, tail = _split(body, header_length, limits)
    head = _head(header, limits) if heads is None else heads.read(header, limits)
    return InferRequest(
        id=head.id,
        inputs=_tensors(head.inputs, None if header_length is None else tail, limits),
        outputs=head.outputs,
        parameters=head.parameters,
    )


def decode_raw_request(body: Buffer, name: str, datatype: str, shape: tuple[int, ...], limits: Limits) -> InferRequest:
    """A body that is nothing but the one input's bytes (`HEADER_LENGTH` 0), for a model whose only input has this name, type and shape.

    At most one axis of `shape` may be -1: its size follows from the body's. BYTES: the body is the one element, without a length before it,
    and the shape is made of ones. All outputs go back in binary.
    """
    raw = _bytes(body, limits)
    if datatype == "BYTES":
        data: Tensor = np.empty(1, object)
        data[0] = bytes(raw)
        data = data.reshape([1] * len(shape))
    else:
        sizes, elements = check_shape(_inferred(shape, len(raw) // DATATYPES[datatype].itemsize, name), name, limits)
        data = from_binary(raw, datatype, sizes, elements, name, limits)
    tensor = InferInput(name=name, datatype=datatype, shape=data.shape, data=data)
    return InferRequest(id="", inputs=(tensor,), outputs=(), parameters={"binary_data_output": True})


def decode_index_request(body: Buffer, limits: Limits) -> bool:
    """Whether a request for the repository's index wants ready models only. Its body may be empty."""
    ready = _parse(_split(body, None, limits)[0]).get("ready", False) if len(body) else False
    if type(ready) is not bool:
        raise ProtocolError(f'"ready" is {shown(ready)}: give true or false')
    return ready


def decode_repository_request(body: Buffer, limits: Limits) -> dict[str, Parameter]:
    """The parameters of a request to load or to unload a model. Its body may be empty."""
    document = _parse(_split(body, None, limits)[0]) if len(body) else {}
    return check_repository_parameters(_object(document, "parameters", "the request"), limits)


def encode_response(
    response: InferResponse, requested: tuple[RequestedOutput, ...], *, binary_default: bool
) -> tuple[list[bytes | memoryview], int | None]:
    """(parts of the body in their order, value for `HEADER_LENGTH` or None): what a request asked for, of what the model answered.

    `requested` and `binary_default` are the request's. Binary tensors are views of the outputs' arrays, which must stay as they are until
    the parts are sent. Raises ProtocolError for an output that the model does not give, and for one that JSON cannot carry: 413 where it
    has more than `JSON_ELEMENTS`.
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
    """A document as JSON; arrays in it as flat lists, floats with the digits that tell them from their neighbours."""
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _bytes(body: Buffer, limits: Limits) -> memoryview:
    view = memoryview(body).cast("B")
    if len(view) > limits.body_bytes:
        raise ProtocolError(f"a body of {len(view):,} bytes: this server takes at most {limits.body_bytes:,}", status=413)
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
            f"{length:,} bytes of JSON: this server takes at most {limits.json_bytes:,}; send large tensors as binary data", status=413
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
    """(name, entry) of each tensor in a list of them."""
    if type(value) is not list:
        raise ProtocolError(f'"{what}" is {shown(value)}: give an array of tensors')
    check_count(len(value), what, limits)
    entries: list[tuple[str, dict[str, Any]]] = []
    for entry in value:
        if type(entry) is not dict:
            raise ProtocolError(f'"{what}" holds {shown(entry)}: give an object for each tensor')
        entries.append((check_name(entry.get("name"), f"one of {what}", limits), entry))
    check_unique((name for name, _ in entries), what)
    return entries


def _head(header: memoryview, limits: Limits) -> Head:
    document = _parse(header)
    parameters = check_request_parameters(_object(document, "parameters", "the request"), limits)
    return Head(
        id=check_id(document.get("id"), limits),
        inputs=_inputs(document.get("inputs"), limits),
        outputs=_outputs(document.get("outputs"), binary_default=parameters.get("binary_data_output") is True, limits=limits),
        parameters=parameters,
    )


def _inputs(value: object, limits: Limits) -> tuple[Announced, ...]:
    entries = _entries(value, "inputs", limits)
    if not entries:
        raise ProtocolError('"inputs" is empty: give at least one tensor')
    return tuple(_announced(name, entry, limits) for name, entry in entries)


def _announced(name: str, entry: dict[str, Any], limits: Limits) -> Announced:
    datatype = check_datatype(entry.get("datatype"), name)
    axes = entry.get("shape")
    if type(axes) is not list:
        raise ProtocolError(f"input {shown(name)} has the shape {shown(axes)}: give an array of whole numbers")
    shape, elements = check_shape(axes, name, limits)
    parameters = check_tensor_parameters(_object(entry, "parameters", f"input {shown(name)}"), name, limits)
    size, values = parameters.get("binary_data_size"), entry.get("data")
    if size is None:
        if values is None:
            raise ProtocolError(f'input {shown(name)} has no tensor: give "data", or the parameter "binary_data_size" and its bytes')
        return Announced(
            name, datatype, shape, elements, 0, from_values(_flat(values, shape, name), datatype, shape, elements, name, limits)
        )
    if values is not None:
        raise ProtocolError(f'input {shown(name)} has "data" and a binary_data_size: give one of them')
    if type(size) is not int or size < 0:
        raise ProtocolError(f"input {shown(name)} has a binary_data_size of {shown(size)}: give its number of bytes")
    return Announced(name, datatype, shape, elements, size, None)


def _tensors(announced: tuple[Announced, ...], tail: memoryview | None, limits: Limits) -> tuple[InferInput, ...]:
    """The inputs, with the bytes of those that follow the JSON."""
    inputs: list[InferInput] = []
    start = 0
    for name, datatype, shape, elements, size, data in announced:
        if data is None:
            if tail is None:
                raise ProtocolError(
                    f"input {shown(name)} has a binary_data_size, and the request no {HEADER_LENGTH}: say where its JSON ends"
                )
            if size > len(tail) - start:
                raise ProtocolError(
                    f"input {shown(name)} has a binary_data_size of {size:,}: {len(tail) - start:,} bytes are left in the body"
                )
            data = from_binary(tail[start : start + size], datatype, shape, elements, name, limits)
            start += size
        inputs.append(InferInput(name=name, datatype=datatype, shape=shape, data=data))
    if tail is not None and start != len(tail):
        raise ProtocolError(f"{len(tail) - start:,} bytes follow the last tensor: give each binary tensor its binary_data_size")
    return tuple(inputs)


def _outputs(value: object, *, binary_default: bool, limits: Limits) -> tuple[RequestedOutput, ...]:
    if value is None:
        return ()
    return tuple(
        check_requested(name, _object(entry, "parameters", f"output {shown(name)}"), binary_default=binary_default, limits=limits)
        for name, entry in _entries(value, "outputs", limits)
    )


def _flat(data: object, shape: tuple[int, ...], name: str) -> list[Any]:
    """The values of a tensor row by row, from a flat list or from one nested as `shape` says."""
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


def _inferred(shape: tuple[int, ...], elements: int, name: str) -> list[int]:
    """The shape with the size of its one free axis; any size that is wrong is left for the reader to find."""
    free = [axis for axis, size in enumerate(shape) if size < 0]
    if len(free) > 1:
        raise ProtocolError(
            f"input {shown(name)} has the shape {list(shape)}, which the length of a raw body does not settle: "
            f"say it in JSON, with {HEADER_LENGTH} for the JSON's length"
        )
    known = prod(size for size in shape if size >= 0)
    return [size if size >= 0 else elements // max(known, 1) for size in shape]


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
