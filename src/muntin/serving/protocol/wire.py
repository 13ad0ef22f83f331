"""Checks the bytes of a gRPC message against the limits before protobuf parses them.

An empty tensor has 2 bytes on the wire and some 90 in memory, so a message of the size that an image needs could take gigabytes. Here the
top-level fields of a message are counted without their contents being read, and everything but the raw tensors has to fit into
`Limits.json_bytes`, as the JSON beside binary tensors does over HTTP.

Handlers are registered without a deserialiser, so that the client is told why a message is refused: grpc answers "internal error" to
whatever a deserialiser raises.
"""

from __future__ import annotations

from typing import TypeVar

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.messages import Limits, ProtocolError

M = TypeVar("M", bound=messages.Message)

_LENGTH = 2
"""Wire type of fields with a length."""
_RAW = 7 << 3 | _LENGTH
"""Tag of `raw_input_contents`."""
_SPARE = 16
"""Fields allowed beside tensors and parameters: three names, and some that later protocols may add."""
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes of a value, for types of fixed size."""


def parse(wire: bytes, kind: type[M], limits: Limits) -> M:
    """Return the message. Raises ProtocolError: 400 for bytes that are no such message, 413 for more than the limits allow."""
    raw = _raw_bytes(wire, limits) if kind is messages.ModelInferRequest else 0
    if len(wire) - raw > limits.json_bytes:
        raise ProtocolError(
            f"a message of {len(wire) - raw:,} bytes, raw tensors not counted: this server takes at most {limits.json_bytes:,}; "
            "send large tensors in raw_input_contents",
            status=413,
        )
    try:
        return kind.FromString(wire)
    except (messages.DecodeError, UnicodeDecodeError) as error:  # the latter from protobuf's pure Python implementation
        raise _unreadable(kind.__name__) from error


def _raw_bytes(wire: bytes, limits: Limits) -> int:
    """Return the number of bytes that are raw tensors. Raises ProtocolError for more fields than a request within the limits has."""
    most = 3 * limits.tensors + limits.parameters + _SPARE
    at = raw = count = 0
    while at < len(wire):
        count += 1
        if count > most:
            raise ProtocolError(f"a message of more than {most} fields: this server takes no more tensors and parameters in one")
        tag, at = _varint(wire, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _varint(wire, at)
            if tag == _RAW:
                raw += size
            at += size
        elif kind == 0:
            _, at = _varint(wire, at)
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise _unreadable()
    if at > len(wire):
        raise _unreadable()
    return raw


def _varint(wire: bytes, at: int) -> tuple[int, int]:
    """Return (number, position behind it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(wire):
            break
        byte = wire[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _unreadable()


def _unreadable(name: str = "ModelInferRequest") -> ProtocolError:
    return ProtocolError(f"the request is no {name}: send one as the protocol's .proto describes it")
