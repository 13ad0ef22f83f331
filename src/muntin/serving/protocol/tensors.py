"""Converts arrays to and from the protocol's binary tensors and lists of values.

A binary tensor is its elements, little-endian, row by row, so an array is a view of its bytes and the bytes are a view of an array. Two
cases need a copy: unaligned bytes (FP32 at an odd offset), and BYTES, whose elements are 4 bytes of length (little-endian) and so many
bytes. BOOL is a byte of 0 or 1. Functions that read raise ProtocolError for data that does not have the stated type and shape.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

from muntin.serving.protocol.messages import Limits, ProtocolError, Tensor, shown

Buffer = bytes | bytearray | memoryview

DATATYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
"""The protocol's datatype -> numpy's. BF16, which numpy lacks, is refused."""

_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in DATATYPES.items() if name != "BYTES"}
_LENGTH = struct.Struct("<I")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "b": ((bool,), "true or false"),
    "u": ((int,), "whole numbers"),
    "i": ((int,), "whole numbers"),
    "f": ((int, float), "numbers"),
}
"""Kind of a numpy type -> types of the JSON values that it takes, and their name in errors."""


def check_datatype(datatype: object, tensor: str) -> str:
    """Return the datatype. Raises ProtocolError for one that is not in `DATATYPES`."""
    if type(datatype) is not str or datatype not in DATATYPES:
        raise ProtocolError(f"input {shown(tensor)} has the datatype {shown(datatype)}: give one of {', '.join(DATATYPES)}")
    return datatype


def datatype_of(array: Tensor, tensor: str) -> str:
    """Return the datatype of an output. Raises ProtocolError 500 for a type that the protocol does not have."""
    if array.dtype == object:
        return "BYTES"
    name = _NAMES.get((array.dtype.kind, array.dtype.itemsize))
    if name is None:
        raise ProtocolError(f"output {shown(tensor)} is of type {array.dtype}, which the protocol has no name for", status=500)
    return name


def from_binary(raw: Buffer, datatype: str, shape: tuple[int, ...], elements: int, tensor: str, limits: Limits) -> Tensor:
    """Return the array of a binary tensor: a view of `raw` if it is aligned."""
    if datatype == "BYTES":
        return _array_of_strings(_split_strings(raw, elements, tensor, limits), shape)
    dtype = DATATYPES[datatype]
    if len(raw) != elements * dtype.itemsize:
        raise ProtocolError(
            f"input {shown(tensor)} came with {len(raw):,} bytes: {datatype} of shape {list(shape)} takes {elements * dtype.itemsize:,}"
        )
    if elements == 0:
        return np.empty(shape, dtype)
    array = np.frombuffer(raw, dtype)
    if datatype == "BOOL" and array.view(np.uint8).max() > 1:
        raise ProtocolError(f"input {shown(tensor)} has a BOOL that is neither 0 nor 1: send one byte of 0 or 1 for each element")
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def to_binary(array: Tensor, datatype: str) -> bytes | memoryview:
    """Return the bytes of a tensor: a view of `array` if it is contiguous and little-endian."""
    if datatype == "BYTES":
        return b"".join(part for item in array.reshape(-1) for part in (_LENGTH.pack(len(item)), item))
    if array.size == 0:
        return b""
    flat = np.ascontiguousarray(array, DATATYPES[datatype]).reshape(-1)
    return flat.view(np.uint8).data


def from_values(values: Sequence[object], datatype: str, shape: tuple[int, ...], elements: int, tensor: str, limits: Limits) -> Tensor:
    """Return the array of a flat list of JSON values, each checked for its type and range.

    Whole numbers are allowed in a tensor of floats; nothing else is converted. A number that FP16 or FP32 holds as infinity is refused.
    """
    if len(values) != elements:
        raise ProtocolError(f"input {shown(tensor)} came with {len(values):,} values: shape {list(shape)} takes {elements:,}")
    if datatype == "BYTES":
        return _array_of_strings(_encode_strings(values, tensor, limits), shape)
    dtype = DATATYPES[datatype]
    types, description = _KINDS[dtype.kind]
    _check_types(values, types, f"{datatype} takes {description}", tensor)
    if elements == 0:
        return np.empty(shape, dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = np.array(values, np.float64).astype(dtype)
        if not np.isfinite(array).all():
            raise ProtocolError(f"input {shown(tensor)} has a number beyond {datatype}'s largest, {np.finfo(dtype).max}")
    else:
        if dtype.kind != "b":
            check_range(min(values), max(values), datatype, tensor)  # type: ignore[type-var]
        array = np.array(values, dtype)
    return array.reshape(shape)


def check_range(least: object, most: object, datatype: str, tensor: str) -> None:
    """Raise ProtocolError unless an integer datatype holds the least and the greatest value of a tensor."""
    bounds = np.iinfo(DATATYPES[datatype])
    assert isinstance(least, int) and isinstance(most, int)
    if least < bounds.min or most > bounds.max:
        outside = least if least < bounds.min else most
        raise ProtocolError(f"input {shown(tensor)} has the value {outside}: {datatype} holds {bounds.min} to {bounds.max}")


def strings_array(strings: Sequence[bytes], shape: tuple[int, ...], elements: int, tensor: str, limits: Limits) -> Tensor:
    """Return the array of a BYTES tensor from its elements."""
    if len(strings) != elements:
        raise ProtocolError(f"input {shown(tensor)} came with {len(strings):,} values: shape {list(shape)} takes {elements:,}")
    _check_strings(elements, tensor, limits)
    return _array_of_strings(strings, shape)


def _check_types(values: Sequence[object], allowed: tuple[type, ...], advice: str, tensor: str) -> None:
    unknown = set(map(type, values)).difference(allowed)
    if not unknown:
        return
    culprit = next(value for value in values if type(value) in unknown)
    hint = " (a fraction, or beyond 64 bits)" if type(culprit) is float else ""
    raise ProtocolError(f"input {shown(tensor)} has {shown(culprit)}{hint} in its data: {advice}")


def _check_strings(elements: int, tensor: str, limits: Limits) -> None:
    if elements > limits.byte_strings:
        raise ProtocolError(
            f"input {shown(tensor)} has {elements:,} elements of BYTES: this server takes at most {limits.byte_strings:,}", status=413
        )


def _encode_strings(values: Sequence[object], tensor: str, limits: Limits) -> list[bytes]:
    _check_strings(len(values), tensor, limits)
    _check_types(values, (str,), "BYTES takes strings (send other bytes as binary data)", tensor)
    return [value.encode() for value in values if isinstance(value, str)]


def _split_strings(raw: Buffer, elements: int, tensor: str, limits: Limits) -> list[bytes]:
    """Split a binary BYTES tensor into its elements. Their number is checked before any of them is made."""
    _check_strings(elements, tensor, limits)
    if elements * _LENGTH.size > len(raw):
        raise ProtocolError(
            f"input {shown(tensor)} came with {len(raw):,} bytes: {elements:,} elements of BYTES take 4 each for their lengths alone"
        )
    strings: list[bytes] = []
    start = 0
    while len(strings) < elements and start + _LENGTH.size <= len(raw):
        begin = start + _LENGTH.size
        start = begin + _LENGTH.unpack_from(raw, begin - _LENGTH.size)[0]
        strings.append(bytes(raw[begin:start]))
    if len(strings) != elements or start != len(raw):
        raise ProtocolError(
            f"input {shown(tensor)}: {len(raw):,} bytes are not {elements:,} elements of BYTES; each is 4 bytes of length, then its bytes"
        )
    return strings


def _array_of_strings(strings: Sequence[bytes], shape: tuple[int, ...]) -> Tensor:
    array = np.empty(len(strings), object)
    array[:] = strings
    return array.reshape(shape)
