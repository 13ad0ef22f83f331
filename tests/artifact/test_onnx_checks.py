"""An ONNX model of somebody else: external data at every place that the schema has, compiled forms, foreign domains, unknown fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from muntin.artifact.onnx_checks import check_data, check_operators
from muntin.artifact.onnx_weights import join_model
from muntin.errors import ArtifactError

Path = tuple[Any, ...]


def places(message: Any, before: Path = ()) -> Iterator[Path]:
    """Yield the fields that lead from a message to each TensorProto of its schema, each field once in a path."""
    for field in message.fields:
        if field.message_type is None or field in before:
            continue
        path = (*before, field)
        if field.message_type is TensorProto.DESCRIPTOR:
            yield path
        yield from places(field.message_type, path)


PLACES = list(places(onnx.ModelProto.DESCRIPTOR))


def inside(path: Path) -> tuple[onnx.ModelProto, Any]:
    """A model with one message at the end of a path, and that message."""
    model = onnx.ModelProto(ir_version=10)
    message: Any = model
    for field in path:
        value = getattr(message, field.name)
        message = value if hasattr(value, "SetInParent") else value.add()
        if hasattr(message, "SetInParent"):
            message.SetInParent()
    return model, message


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(field.name for field in path))
def test_external_data(path: Path) -> None:
    model, tensor = inside(path)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(ArtifactError, match="external file"):
        join_model(model.SerializeToString(), {}, {})


def test_places_are_those_of_the_schema() -> None:
    names = {".".join(field.name for field in path) for path in PLACES}
    expected = {"graph.initializer", "graph.node.attribute.t", "graph.sparse_initializer.indices", "functions.attribute_proto.t"}
    assert expected <= names and len(names) > 50


def test_functions() -> None:
    model = onnx.ModelProto()
    model.functions.add(name="hidden").attribute_proto.add(name="value")
    with pytest.raises(ArtifactError, match="holds the function 'hidden'"):
        check_operators(model)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0), "node EPContext is an engine's compiled form"),
        (helper.make_node("Read", [], ["y"], name="r", domain="org.files"), "node r is Read of the domain 'org.files'"),
    ],
)
def test_operators(node: onnx.NodeProto, message: str) -> None:
    inner = helper.make_graph([node], "inner", [], [])
    model = onnx.ModelProto()
    model.graph.node.append(helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner))
    with pytest.raises(ArtifactError, match=message):
        check_operators(model)


def test_unknown_fields_are_removed() -> None:
    graph = b"\x3a\x05" + b"\xc2\xf1\x04\x01\x00"  # field 10,000 of the graph, with one byte
    model = onnx.ModelProto()
    model.ParseFromString(graph)
    assert model.SerializeToString() == graph
    check_data(model)
    assert model.SerializeToString() == b"\x3a\x00"
