"""The Open Inference Protocol as values: what is asked, what is answered, and what is refused with which status.

    HTTP body    -- json_codec -->  InferRequest  -->  batcher, engine  -->  InferResponse  -- json_codec -->  HTTP body
    gRPC message -- grpc_codec -->       "                                        "         -- grpc_codec -->  gRPC message

The protocol is KServe's V2 ("Open Inference Protocol"), with these extensions of Triton Inference Server: binary tensor data,
classification, schedule policy (`priority`, `timeout`), parameters. Shared memory and sequences are refused by name.

Whatever comes from the network is a claim: a codec holds names, shapes, sizes and numbers of things against `Limits` and against the bytes
that really came, before it makes an array. What a request costs in memory is so a bounded multiple of what its sender paid for in bytes.
A decoder gives an InferRequest or raises ProtocolError, and nothing else; whether a request fits the model is for others to say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from muntin.errors import MuntinError, RecipeError
from muntin.text import plain

Parameter = bool | int | float | str
"""Value of a parameter of a request, a tensor or a response."""
Tensor = NDArray[Any]
"""C-contiguous array in one of `tensors.DATATYPES`; a tensor of BYTES holds `bytes` objects."""

GRPC_CODES: Mapping[int, str] = MappingProxyType(
    {
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
)
"""HTTP status -> name of the gRPC status that says the same."""

LACKING: Mapping[str, str] = MappingProxyType(
    {
        "trace/setting": "trace settings: this server has none; --trace and OpenTelemetry's environment say what is traced",
        "logging": "log settings: this server has none; --access-log writes requests down",
        "sharedmemory": "shared memory: this server shares none with its clients; send tensors in the request (as binary data for speed)",
    }
)
"""Part of a path of HTTP -> what a client is told that asks for an extension of Triton's that is left out."""
_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
_SHARED_MEMORY = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
_RANGES = {"name_length": (32, 1 << 20), "rank": (1, 32), "elements": (1, 1 << 48)}
"""Of `Limits`: the protocol's own names have to pass, and numpy has to be able to hold any shape that does."""
_SHOWN = 48
"""Characters of a client's text that an error repeats."""


class ProtocolError(MuntinError):
    """A request cannot be read, or an answer cannot be given in the form asked for. `status`: the HTTP status, a key of `GRPC_CODES`."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        assert status in GRPC_CODES
        super().__init__(plain(message))
        self.status = status

    @property
    def grpc_code(self) -> str:
        """Name of the member of `grpc.StatusCode` that goes with the status."""
        return GRPC_CODES[self.status]

    @property
    def outcome(self) -> str:
        """What a request that ends with it is counted as."""
        return "refused" if self.status == 503 else "failed" if self.status >= 500 else "wrong"


class RefusedRequestError(ProtocolError):
    """A request that is not served now. `retry_after`: seconds after which it may be worth another try."""

    def __init__(self, message: str, *, status: int = 503, retry_after: float = 1.0) -> None:
        super().__init__(message, status=status)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for; beyond, it is refused before anything is allocated for it. Raises RecipeError when made wrongly.

    `body_bytes`: the whole body, or all the tensors of a gRPC message. `json_bytes`: the JSON part of a body; parsed, it takes 13 times
    its size (numbers) to 50 times (empty arrays in arrays), so large tensors belong into the binary part. `tensors`: inputs, and outputs
    asked for. `rank`: axes of a tensor, at most 32. `elements`: of one tensor. `byte_strings`: elements of one BYTES tensor (an encoded
    image is one), and classes asked for. `name_length`: characters of a name, an id or a key, from 32. `parameters`: of a request, and of
    each of its tensors.
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


# Comparing arrays gives arrays, so the values that hold some are compared by identity: eq=False.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferInput:
    """One tensor that came. `data` has `shape`; it may be a view of the request's body, and read-only."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestedOutput:
    """One tensor that is wanted. `binary`: as bytes behind the JSON (HTTP only). `classification`: so many best classes, None: itself."""

    name: str
    binary: bool = False
    classification: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferRequest:
    """What a client asks: at least one input, names unique among inputs and among outputs. `outputs`: empty for all that the model gives.

    `id`: "" where none came. `parameters`: checked, those of the protocol and the client's own.
    """

    id: str
    inputs: tuple[InferInput, ...]
    outputs: tuple[RequestedOutput, ...]
    parameters: Mapping[str, Parameter]
    always_binary: bool = False
    """Whether tensors go back as bytes and nothing else, as over gRPC."""

    @property
    def priority(self) -> int:
        """Level from 1, the most urgent; 0: the server's default."""
        return int(self.parameters.get("priority", 0))

    @property
    def timeout_us(self) -> int | None:
        """Microseconds that the client gives the whole request; None where it sets no such bound (Triton's 0 says so, too)."""
        return int(self.parameters.get("timeout", 0)) or None

    @property
    def binary_default(self) -> bool:
        """Whether outputs that are not listed go back as bytes behind the JSON; for `encode_response`."""
        return self.always_binary or bool(self.parameters.get("binary_data_output", False))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferOutput:
    """One tensor that goes back. `labels`: names of the classes in the order of their indices, for the classification extension."""

    name: str
    data: Tensor
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InferResponse:
    """What the model answered, all of its outputs. `id`: the request's."""

    model: str
    version: str
    id: str
    outputs: tuple[InferOutput, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def shown(value: object) -> str:
    """What came, for an error: one short line whatever a client sent."""
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
    """The name. Raises ProtocolError unless it is a string of 1 to `limits.name_length` characters."""
    if type(name) is not str or not 1 <= len(name) <= limits.name_length:
        raise ProtocolError(f"{what} has the name {shown(name)}: give a string of 1 to {limits.name_length} characters")
    return name


def check_id(identity: object, limits: Limits) -> str:
    """The id of a request, "" for None. Raises ProtocolError unless it is a string of at most `limits.name_length` characters."""
    if identity is None:
        return ""
    if type(identity) is not str or len(identity) > limits.name_length:
        raise ProtocolError(f"the request's id is {shown(identity)}: give a string of at most {limits.name_length} characters")
    return identity


def check_count(count: int, what: str, limits: Limits) -> None:
    """Raises ProtocolError for more than `limits.tensors` tensors."""
    if count > limits.tensors:
        raise ProtocolError(f"{count:,} {what}: this server takes at most {limits.tensors} a request")


def check_unique(names: Iterable[str], what: str) -> None:
    """Raises ProtocolError when two tensors have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ProtocolError(f"two {what} are named {shown(name)}: name each once")
        seen.add(name)


def check_shape(shape: Sequence[object], tensor: str, limits: Limits) -> tuple[tuple[int, ...], int]:
    """(shape, its number of elements). Raises ProtocolError unless it is at most `limits.rank` whole numbers from 0 that hold few enough.

    Axes of 0 count as 1 against the limit: what remains of such a shape still has to fit an array's header.
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
                f"input {shown(tensor)} has a shape of more than {limits.elements:,} elements: this server takes no more in a tensor",
                status=413,
            )
    return tuple(sizes), elements


_HIGHEST = {"priority": (1 << 32) - 1, "timeout": (1 << 63) - 1}


def check_request_parameters(parameters: Mapping[str, object], limits: Limits) -> dict[str, Parameter]:
    """The parameters of a request. Raises ProtocolError for sequences, for too many, and for a value of a wrong type or out of range.

    A sequence of number 0, and one that neither begins nor ends, is none: so clients that fill in every field say it.
    """
    checked = _check_parameters(parameters, "the request", limits)
    for name in _SEQUENCE:
        if checked.pop(name, None):
            raise ProtocolError(f'parameter "{name}": this server keeps no state between requests; send each request without it')
    for name, unit in (("priority", "a level from 1, 0 for the default"), ("timeout", "microseconds, 0 for none")):
        value = checked.get(name, 0)
        if type(value) is not int or not 0 <= value <= _HIGHEST[name]:
            raise ProtocolError(f'parameter "{name}" is {shown(value)}: give a whole number from 0 to {_HIGHEST[name]} ({unit})')
    _check_flag(checked, "binary_data_output", "the request")
    return checked


def check_repository_parameters(parameters: Mapping[str, object], limits: Limits) -> dict[str, Parameter]:
    """The parameters of a request to load or to unload a model. Raises ProtocolError (501) for a model that comes with it."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise ProtocolError(
                f"parameter {shown(name)}: this server loads what its repository holds and takes no model from a request", status=501
            )
    return _check_parameters(parameters, "the request", limits)


def check_tensor_parameters(parameters: Mapping[str, object], tensor: str, limits: Limits) -> dict[str, Parameter]:
    """The parameters of an input or an output. Raises ProtocolError for shared memory, for too many and for a wrong type."""
    checked = _check_parameters(parameters, f"tensor {shown(tensor)}", limits)
    for name in _SHARED_MEMORY:
        if name in checked:
            raise ProtocolError(
                f'tensor {shown(tensor)} has the parameter "{name}": this server shares no memory with its clients; '
                "send tensors in the request (as binary data for speed)"
            )
    return checked


def check_requested(name: str, parameters: Mapping[str, object], *, binary_default: bool, limits: Limits) -> RequestedOutput:
    """An output that a request lists, with its own parameters: whether it goes back as binary data, and as how many classes (0: itself)."""
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
