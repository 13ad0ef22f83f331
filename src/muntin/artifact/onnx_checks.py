"""Checks of an ONNX model that somebody else made: it holds all of its data itself, and nothing that an engine would run unchecked."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

from muntin.errors import ArtifactError

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains of the operators that engines have themselves."""


def check_data(model: onnx.ModelProto) -> None:
    """Raise ArtifactError for data in another file: its name could be that of any file of the machine.

    Fields that the installed onnx does not know, but an engine may, are removed.
    """
    model.DiscardUnknownFields()
    for tensor in messages(model):
        if isinstance(tensor, onnx.TensorProto) and (tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data):
            raise ArtifactError(f"tensor {tensor.name} lies in an external file: load it with its external data, export again")


def check_operators(model: onnx.ModelProto) -> None:
    """Raise ArtifactError for a compiled form, for a domain other than `DOMAINS`, and for local functions: an engine
    inlines them, and this check would have to do as it does."""
    if model.functions:
        raise ArtifactError(f"the model holds the function {model.functions[0].name!r}: export it again")
    for node in messages(model):
        if not isinstance(node, onnx.NodeProto):
            continue
        name = node.name or node.op_type
        if node.op_type == "EPContext":
            raise ArtifactError(f"node {name} is an engine's compiled form: export the model itself")
        if node.domain not in DOMAINS:
            raise ArtifactError(f"node {name} is {node.op_type} of the domain {node.domain!r}: allowed are {', '.join(DOMAINS[1:])}")


def messages(message: Message) -> Iterator[Message]:
    """Yield a message and all messages inside of it, by the fields that are set: also at places that no code here names."""
    waiting = [message]
    while waiting:
        one = waiting.pop()
        yield one
        for field, value in one.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if isinstance(value, Message) else value)
