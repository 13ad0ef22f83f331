"""A model cut in two: the graph without data, and its weights at their real bit width; and put together again.

A weight that is moved out leaves its name, type and shape in the graph, so that nothing has to be guessed when it is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from muntin.artifact.manifest import TensorRecord
from muntin.artifact.packing import pack, unpack
from muntin.errors import ArtifactError

MOVED_FROM = 64  # initializers of more elements are moved out
LARGEST = 2**31 - 2**25  # bytes of weights: a protobuf message holds less than 2 GiB, and the graph needs some of it

Packing = Mapping[str, int | Literal["f16"]]

_FLOATS: dict[str, Literal["f16", "f32", "f64"]] = {"float16": "f16", "float32": "f32", "float64": "f64"}
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")


def join_model(structure: bytes, tensors: Mapping[str, NDArray[Any]], records: Mapping[str, TensorRecord]) -> bytes:
    """The self-contained ONNX: every moved weight back in its place, in the type that the graph kept. Raises ArtifactError on a misfit."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(structure)
    except DecodeError as error:
        raise ArtifactError("model.onnx is no ONNX model: export the artefact again") from error
    _refuse_external(model)
    _refuse_engines(model)
    if tensors.keys() != records.keys():
        raise ArtifactError("weights.safetensors: its tensors are not those of the manifest: export the artefact again")
    restored = set()
    for initializer in model.graph.initializer:
        if (record := records.get(initializer.name)) is not None:
            initializer.raw_data = _expand(initializer, tensors[initializer.name], record)
            restored.add(initializer.name)
    if lost := sorted(tensors.keys() - restored):
        raise ArtifactError(f"model.onnx has no place for the weight {lost[0]}: export the artefact again")
    return bytes(model.SerializeToString(deterministic=True))


def split_model(model: onnx.ModelProto, packing: Packing) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]], dict[str, TensorRecord]]:
    """The model without its large initializers, these as they are stored, and how each is stored."""
    names = {initializer.name for initializer in model.graph.initializer}
    if unknown := sorted(packing.keys() - names):
        raise ArtifactError(f"packing names {unknown[0]}, which is no initializer of the model: name one of its {len(names)}")
    _refuse_external(model)
    _refuse_large(model.graph.initializer)
    structure, tensors, records = onnx.ModelProto(), {}, {}
    structure.CopyFrom(model)
    _strip(structure)
    for initializer in structure.graph.initializer:
        if math.prod(initializer.dims) <= MOVED_FROM and initializer.name not in packing:
            continue
        tensors[initializer.name], records[initializer.name] = _store(initializer, packing.get(initializer.name))
        emptied = onnx.TensorProto(name=initializer.name, data_type=initializer.data_type, dims=initializer.dims)
        initializer.CopyFrom(emptied)
    return structure, tensors, records


def _store(initializer: onnx.TensorProto, how: int | Literal["f16"] | None) -> tuple[NDArray[Any], TensorRecord]:
    values = np.require(numpy_helper.to_array(initializer), requirements="C")
    name, dtype, shape = initializer.name, values.dtype.name, tuple(values.shape)
    if dtype not in _FLOATS and dtype not in _INTEGERS:
        raise ArtifactError(f"initializer {name} is {dtype}: an artefact holds {', '.join((*_FLOATS, *_INTEGERS))}")
    if how is None:
        if dtype in _FLOATS:
            return values, TensorRecord(bits=values.dtype.itemsize * 8, shape=shape, packing=_FLOATS[dtype])
        return values, TensorRecord(bits=values.dtype.itemsize * 8, shape=shape, packing="int")
    if how == "f16":
        if dtype != "float32":
            raise ArtifactError(f'initializer {name} is {dtype} and packed as "f16": only float32 can be')
        if values.size and not float(np.abs(values).max()) <= float(np.finfo(np.float16).max):
            raise ArtifactError(f'initializer {name} has values beyond half precision (65504): leave it out of the "f16" packing')
        return values.astype(np.float16), TensorRecord(bits=16, shape=shape, packing="f16")
    if dtype not in ("int8", "uint8"):
        raise ArtifactError(f"initializer {name} is {dtype} and packed in {how} bits: only int8 and uint8 can be")
    record = TensorRecord(bits=how, shape=shape, packing="int")
    try:
        packed = pack(values, how, signed=dtype == "int8")
    except ArtifactError as error:
        raise ArtifactError(f"initializer {name}: {error}") from error
    return (values if how == 8 else packed), record


def _expand(initializer: onnx.TensorProto, stored: NDArray[Any], record: TensorRecord) -> bytes:
    """The raw data of an emptied initializer, in the type and shape that it kept."""
    dtype = _numpy_type(initializer)
    values: NDArray[Any]
    if record.packing == "int" and record.bits < 8:
        values = unpack(stored, record.bits, record.shape, signed=dtype == np.int8)
    elif record.packing == "f16" and dtype == np.float32:
        values = stored.astype(np.float32)
    else:
        values = stored
    if values.dtype != dtype or values.shape != tuple(initializer.dims):
        raise ArtifactError(
            f"weight {initializer.name} is {values.dtype} {values.shape}, the graph wants {dtype} {tuple(initializer.dims)}: "
            "export the artefact again"
        )
    return values.astype(dtype.newbyteorder("<"), copy=False).tobytes()


def _numpy_type(initializer: onnx.TensorProto) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
    except KeyError as error:
        raise ArtifactError(
            f"initializer {initializer.name} has the type {initializer.data_type}, which is none of ONNX's: export the artefact again"
        ) from error
    return dtype


def _strip(model: onnx.ModelProto) -> None:
    """Removes, in place, what no engine needs: doc strings, metadata (they carry the exporter's file paths) and inferred shapes."""
    del model.metadata_props[:]
    model.doc_string = ""
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        for entries in (function.metadata_props, function.value_info):
            del entries[:]
        _strip_nodes(function.node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    for entries in (graph.metadata_props, graph.value_info):
        del entries[:]
    for holder in (graph.input, graph.output, graph.initializer):
        for value in holder:
            value.doc_string = ""
            del value.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip_graph(attribute.g)


def _refuse_large(initializers: Iterable[onnx.TensorProto]) -> None:
    size = sum(math.prod(item.dims) * _numpy_type(item).itemsize for item in initializers)
    if size > LARGEST:
        raise ArtifactError(f"the model expands to {size / 2**30:.1f} GiB: ONNX holds less than 2 GiB in one file, make it smaller")


def _refuse_external(model: onnx.ModelProto) -> None:
    """A tensor whose data lies in another file could name any file of the machine: an artefact has none."""
    for tensor in _all_tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArtifactError(f"tensor {tensor.name} lies in an external file: load the model with its external data and export it again")


def _refuse_engines(model: onnx.ModelProto) -> None:
    """A node that holds, or names, what a device's compiler made (`EPContext`) would have an engine run code that nobody can check."""
    for node in _all_nodes(model):
        if node.op_type == "EPContext":
            raise ArtifactError(f"model.onnx: node {node.name or node.op_type} is an engine's compiled form: export the model itself")


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting += graph.node


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _sparse_tensors(graph.sparse_initializer)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from _sparse_tensors((attribute.sparse_tensor, *attribute.sparse_tensors))
            for inner in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(inner)


def _sparse_tensors(tensors: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for sparse in tensors:
        yield from (sparse.values, sparse.indices)
