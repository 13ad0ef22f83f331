"""The Open Inference Protocol as values: requests, answers, and errors with their status.

    HTTP body    -- json_codec -->  InferRequest  -->  batcher, engine  -->  InferResponse  -- json_codec -->  HTTP body
    gRPC message -- grpc_codec -->       "                                        "         -- grpc_codec -->  gRPC message

The protocol is KServe's V2 ("Open Inference Protocol") with these extensions of Triton Inference Server: binary tensor data,
classification, schedule policy (`priority`, `timeout`), parameters. Shared memory and sequences are refused by name.

A codec checks names, shapes, sizes and counts against `Limits` and against the bytes received before it makes an array, so the memory of a
request is a bounded multiple of its bytes. A decoder returns an InferRequest or raises ProtocolError, and nothing else; whether a request
fits the model is checked by the service.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from numpy.typing import NDArray

from muntin.errors import MuntinError, RecipeError
from muntin.text import plain

Parameter = bool | int | float | str
"""Value of a parameter of a request, a tensor or a response."""
Tensor = NDArray[Any]
"""C-contiguous array in one of `tensors.DATATYPES`; a tensor of BYTES holds `bytes` objects."""

JSON_ELEMENTS = 1 << 23
"""Maximum number of elements of an output in JSON, some ten bytes each."""
GRPC_CODES: Mapping[int, str] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""HTTP status -> name of the corresponding gRPC status."""

LACKING: Mapping[str, str] = {
    "trace/setting": "trace settings: this server has none; --trace and OpenTelemetry's environment say what is traced",
    "logging": "log settings: this server has none; --access-log writes requests down",
    "sharedmemory": "shared memory: this server shares none with its clients; send tensors in the request (as binary data for speed)",
}
"""Part of the HTTP path of an unsupported extension of Triton's -> message of its refusal."""
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
_SHARED_MEMORY = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
_RANGES = {"name_length": (32, 1 << 20), "rank": (1, 32), "elements": (1, 1 << 48)}
"""Field of `Limits` -> its range: the protocol's own names fit, and numpy can hold any shape that does."""
_LONGEST = 1000
"""Characters of an error: a client's names may be in it."""
_SHOWN = 48
"""Maximum number of characters of a client's text in an error."""


class ProtocolError(MuntinError):
    """A wrong request, or an answer that cannot be given in the requested form. `status`: HTTP status, a key of `GRPC_CODES`."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        assert status in GRPC_CODES
        super().__init__(plain(message)[:_LONGEST])
        self.status = status

    @property
    def grpc_code(self) -> str:
        """Name of the corresponding member of `grpc.StatusCode`."""
        return GRPC_CODES[self.status]

    @property
    def outcome(self) -> str:
        """Outcome of the request in the metrics."""
        return "refused" if self.status == 503 else "failed" if self.status >= 500 else "wrong"


class RefusedRequestError(ProtocolError):
    """A request that is not served now. `retry_after`: seconds after which another try may succeed."""

    def __init__(self, message: str, *, status: int = 503, retry_after: float = 1.0) -> None:
        super().__init__(message, status=status)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one request; beyond them it is refused before anything is allocated. Raises RecipeError for a value out of range.

    `body_bytes`: the whole body, or all tensors of a gRPC message. `json_bytes`: the JSON part; parsed, it takes 13 times its size
    (numbers) to 50 times (empty arrays in arrays). `tensors`: inputs, and requested outputs. `rank`: axes of a tensor. `elements`: of one
    tensor. `byte_strings`: elements of one BYTES tensor, and requested classes. `name_length`: characters of a name, an id or a key.
    `parameters`: of a request, and of each of its tensors.
    """

    body_bytes: int = 128 << 20
    json_bytes: int = 4 << 20
    tensors: int = 32
    rank: int = 8
    elements: int = 1 << 28
    byte_strings: int = 1 << 16
    name_length: int = 256
    parameters: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least, most = _RANGES.get(item.name, (1, sys.maxsize))
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise RecipeError(f"Limits: {item.name}={value!r}: give a whole number from {least} to {most}")


# eq=False: comparing arrays gives arrays, so values with arrays are compared by identity.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferInput:
    """One input tensor. `data` has `shape`; it may be a read-only view of the request's body."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestedOutput:
    """One requested output. `binary`: as bytes behind the JSON (HTTP only). `classification`: number of best classes, None: the tensor."""

    name: str
    binary: bool = False
    classification: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferRequest:
    """A request: at least one input, names unique among inputs and among outputs. `outputs`: empty for all of the model's.

    `id`: "" for none. `parameters`: the protocol's and the client's own, checked.
    """

    id: str
    inputs: tuple[InferInput, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]

    @property
    def priority(self) -> int:
        """Priority from 1, the most urgent; 0: the server's default."""
        return int(self.parameters.get("priority", 0))

    @property
    def timeout_us(self) -> int | None:
        """Time limit of the whole request in microseconds; None (or 0, as in Triton) for none."""
        return int(self.parameters.get("timeout", 0)) or None

    @property
    def binary_default(self) -> bool:
        """True if outputs are bytes behind the JSON unless the request says otherwise."""
        return bool(self.parameters.get("binary_data_output", False))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferOutput:
    """One output tensor. `labels`: class names by index, for the classification extension."""

    name: str
    data: Tensor
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferResponse:
    """An answer with all outputs of the model. `id`: the request's."""

    model: str
    version: str
    id: str
    outputs: tuple[InferOutput, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def shown(value: object) -> str:
    """Describe a client's value in an error message, as one short line."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}... ({len(value):,} characters)"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return f"a {type(value).__name__}"


def check_name(name: object, what: str, limits: Limits) -> str:
    """Return the name. Raises ProtocolError unless it is a string of 1 to `limits.name_length` characters."""
    if type(name) is not str or not 1 <= len(name) <= limits.name_length:
        raise ProtocolError(f"{what} has the name {shown(name)}: give a string of 1 to {limits.name_length} characters")
    return name


def check_id(identity: object, limits: Limits) -> str:
    """Return the id of a request, "" for None. Raises ProtocolError unless it is a string of at most `limits.name_length` characters."""
    if identity is None:
        return ""
    if type(identity) is not str or len(identity) > limits.name_length:
        raise ProtocolError(f"the request's id is {shown(identity)}: give a string of at most {limits.name_length} characters")
    return identity


def check_count(count: int, what: str, limits: Limits) -> None:
    """Raise ProtocolError for more than `limits.tensors` tensors."""
    if count > limits.tensors:
        raise ProtocolError(f"{count:,} {what}: this server takes at most {limits.tensors} a request")


def check_names(names: Sequence[str], what: str, limits: Limits) -> None:
    """Raise ProtocolError for more than `limits.tensors` tensors, or two with the same name."""
    check_count(len(names), what, limits)
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"two {what} are named {shown(duplicate)}: name each once")


def check_shape(shape: Sequence[object], tensor: str, limits: Limits) -> tuple[tuple[int, ...], int]:
    """Return (shape, number of elements). Raises ProtocolError unless it is at most `limits.rank` whole numbers within `limits.elements`.

    Axes of 0 count as 1 against the limit: numpy refuses shapes whose other axes are too large.
    """
    if len(shape) > limits.rank:
        raise ProtocolError(f"input {shown(tensor)} has {len(shape):,} axes: this server takes at most {limits.rank}")
    sizes: list[int] = []
    elements, bound = 1, 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ProtocolError(f"input {shown(tensor)} has {shown(size)} in its shape: give whole numbers from 0")
        sizes.append(size)
        elements *= size
        bound *= size or 1
        if bound > limits.elements:
            raise ProtocolError(
                f"input {shown(tensor)} has a shape of more than {limits.elements:,} elements: this server takes no more (--max-body)",
                status=413,
            )
    return tuple(sizes), elements


def check_request_parameters(parameters: Mapping[str, object], limits: Limits) -> dict[str, Parameter]:
    """Return the parameters of a request. Raises ProtocolError for sequences, too many parameters, and a wrong type or range.

    Sequence parameters of 0 or false are ignored: some clients fill in every field.
    """
    checked = _check_parameters(parameters, "the request", limits)
    for name in _SEQUENCE:
        if checked.pop(name, None):
            raise ProtocolError(f'parameter "{name}": this server keeps no state between requests; send each request without it')
    for name, bits, unit in (("priority", 32, "a level from 1, 0 for the default"), ("timeout", 63, "microseconds, 0 for none")):
        value = checked.get(name, 0)
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise ProtocolError(f'parameter "{name}" is {shown(value)}: give a whole number from 0 to {(1 << bits) - 1} ({unit})')
    _check_flag(checked, "binary_data_output", "the request")
    return checked


def check_repository_parameters(parameters: Mapping[str, object], limits: Limits) -> dict[str, Parameter]:
    """Return the parameters of a request to load or unload a model. Raises ProtocolError 501 for a model sent with it."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise ProtocolError(
                f"parameter {shown(name)}: this server loads what its repository holds and takes no model from a request", status=501
            )
    return _check_parameters(parameters, "the request", limits)


def check_tensor_parameters(parameters: Mapping[str, object], tensor: str, limits: Limits) -> dict[str, Parameter]:
    """Return the parameters of a tensor. Raises ProtocolError for shared memory, too many parameters and a wrong type."""
    checked = _check_parameters(parameters, f"tensor {shown(tensor)}", limits)
    for name in _SHARED_MEMORY:
        if name in checked:
            raise ProtocolError(
                f'tensor {shown(tensor)} has the parameter "{name}": this server shares no memory with its clients; '
                "send tensors in the request (as binary data for speed)"
            )
    return checked


def check_requested(name: str, parameters: Mapping[str, object], *, binary_default: bool, limits: Limits) -> RequestedOutput:
    """Return a requested output. Raises ProtocolError for wrong parameters; a `classification` of 0 is none."""
    checked = check_tensor_parameters(parameters, name, limits)
    binary = _check_flag(checked, "binary_data", f"output {shown(name)}", default=binary_default)
    classes = checked.get("classification", 0)
    if type(classes) is not int or not 0 <= classes <= limits.byte_strings:
        raise ProtocolError(
            f"output {shown(name)}: classification is {shown(classes)}: give how many of the best classes, 1 to {limits.byte_strings}"
        )
    return RequestedOutput(name=name, binary=binary, classification=classes or None)


def _check_flag(parameters: Mapping[str, Parameter], name: str, where: str, *, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise ProtocolError(f'parameter "{name}" of {where} is {shown(value)}: give true or false')
    return value


def _check_parameters(parameters: Mapping[str, object], where: str, limits: Limits) -> dict[str, Parameter]:
    if len(parameters) > limits.parameters:
        raise ProtocolError(f"{where} has {len(parameters):,} parameters: this server takes at most {limits.parameters}")
    checked: dict[str, Parameter] = {}
    for name, value in parameters.items():
        if len(name) > limits.name_length:
            raise ProtocolError(f"{where} has a parameter {shown(name)}: a name has at most {limits.name_length} characters")
        if not isinstance(value, bool | int | float | str):
            raise ProtocolError(f"parameter {shown(name)} of {where} is {shown(value)}: give a string, a number, true or false")
        checked[name] = value
    return checked
