"""Checks the bytes of a gRPC message against the limits before protobuf parses them.

An empty tensor has 2 bytes on the wire and some 90 in memory, so a message of the size that an image needs could take gigabytes. So the
top-level fields of a message are counted without reading their contents, and everything but the raw tensors has to fit into
`Limits.json_bytes`, as the JSON beside binary tensors does over HTTP.

Handlers are registered without a deserialiser: grpc answers "internal error" to whatever a deserialiser raises.
"""

from __future__ import annotations

from typing import TypeVar

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.messages import Limits, ProtocolError

M = TypeVar("M", bound=messages.Message)

_LENGTH = 2
"""Wire type of fields with a length: all top-level fields of a request for inference."""
_RAW = 7 << 3 | _LENGTH
"""Tag of `raw_input_contents`."""
_SPARE = 16
"""Fields allowed beside tensors and parameters: three names, and some that later protocols may add."""


def parse(wire: bytes, kind: type[M], limits: Limits) -> M:
    """Return the message. Raises ProtocolError: 400 for bytes that are no such message, 413 for more than the limits allow."""
    raw = _raw_bytes(wire, limits) if kind is messages.ModelInferRequest else 0
    if len(wire) - raw > limits.json_bytes:
        raise ProtocolError(
            f"a message of {len(wire) - raw:,} bytes, raw tensors not counted: this server takes at most {limits.json_bytes:,} "
            "(--max-json); send large tensors in raw_input_contents",
            status=413,
        )
    try:
        return kind.FromString(wire)
    except (messages.DecodeError, UnicodeDecodeError) as error:  # the latter from protobuf's pure Python implementation
        raise _unreadable(kind.__name__) from error


def _raw_bytes(wire: bytes, limits: Limits) -> int:
    """Return the number of bytes that are raw tensors. Raises ProtocolError for more fields than a request within the limits has."""
    most = 3 * limits.tensors + limits.parameters + _SPARE
    position = raw = count = 0
    while position < len(wire):
        count += 1
        if count > most:
            raise ProtocolError(f"a message of more than {most} fields: this server takes no more tensors and parameters in one")
        tag, position = _varint(wire, position)
        size, position = _varint(wire, position)
        position += size
        if tag & 7 != _LENGTH or position > len(wire):
            raise _unreadable()
        if tag == _RAW:
            raw += size
    return raw


def _varint(wire: bytes, position: int) -> tuple[int, int]:
    """Return (number, position behind it)."""
    value = 0
    for shift, byte in enumerate(wire[position : position + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise _unreadable()


def _unreadable(name: str = "ModelInferRequest") -> ProtocolError:
    return ProtocolError(f"the request is no {name}: send one as the protocol's .proto describes it")
