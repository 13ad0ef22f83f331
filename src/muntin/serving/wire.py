"""The bytes of a gRPC message, held against the limits before protobuf makes a message of them.

protobuf takes 2 bytes for an empty tensor and makes some 90 of them in memory, so a message of the size that an image needs could take
gigabytes. What is large for a good reason is raw: here the message's own fields are walked through, which costs nothing for what is inside
them, and everything but the raw tensors has to fit into `Limits.json_bytes`, as the JSON beside binary tensors does over HTTP.

A face that registers its handlers without a deserialiser of grpc's gets these bytes and can say why it refuses them: what a deserialiser
raises, grpc makes "internal error" of.
"""

from __future__ import annotations

from typing import TypeVar

from muntin.serving import open_inference_pb2 as messages
from muntin.serving.protocol import Limits, ProtocolError

M = TypeVar("M", bound=messages.Message)

_LENGTH = 2
"""The wire type of what has a length."""
_RAW = 7 << 3 | _LENGTH
"""The tag of `raw_input_contents`."""
_SPARE = 16
"""Fields beside tensors and parameters: three names, and what later protocols may add."""
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes of its values."""


def parse(wire: bytes, kind: type[M], limits: Limits) -> M:
    """The message. Raises ProtocolError for bytes that are none, and (413) for more than the limits allow."""
    raw = _raw_bytes(wire, limits) if kind is messages.ModelInferRequest else 0
    if len(wire) - raw > limits.json_bytes:
        raise ProtocolError(
            f"a message of {len(wire) - raw:,} bytes, raw tensors not counted: this server takes at most {limits.json_bytes:,}; "
            "send large tensors in raw_input_contents",
            status=413,
        )
    try:
        return kind.FromString(wire)
    except (messages.DecodeError, UnicodeDecodeError) as error:  # the latter from protobuf without its compiled part
        raise _unreadable(kind.__name__) from error


def _raw_bytes(wire: bytes, limits: Limits) -> int:
    """How many of a request's bytes are raw tensors. Raises ProtocolError for more fields than one within the limits has."""
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
    """(number, where it ends)."""
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
