"""Splits a model into a graph without data and its weights at their real bit width, and joins them again.

A weight that is moved out leaves its name, type and shape in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import numpy_helper

from muntin.artifact.manifest import TensorRecord
from muntin.artifact.onnx_checks import check_data, check_operators, messages
from muntin.artifact.packing import pack, unpack
from muntin.errors import ArtifactError

MOVED_FROM = 64  # initializers of more elements are moved out of the graph
LARGEST = 2**31 - 2**25  # bytes of weights: a protobuf message, graph included, is smaller than 2 GiB

Packing = Mapping[str, int | Literal["f16"]]

_FLOATS: dict[str, Literal["f16", "f32", "f64"]] = {"float16": "f16", "float32": "f32", "float64": "f64"}
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")


def join_model(structure: bytes, tensors: Mapping[str, NDArray[Any]], records: Mapping[str, TensorRecord]) -> bytes:
    """The self-contained ONNX: every weight in its place, in the graph's type. Raises ArtifactError where they do not fit."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(structure)
    except DecodeError as error:
        raise ArtifactError("model.onnx is no ONNX model: export the artefact again") from error
    check_data(model)
    check_operators(model)
    if tensors.keys() != records.keys():
        raise ArtifactError("weights.safetensors: its tensors are not those of the manifest: export the artefact again")
    places = [initializer for initializer in model.graph.initializer if initializer.name in records]
    if lost := sorted(tensors.keys() - {initializer.name for initializer in places}):
        raise ArtifactError(f"model.onnx has no place for the weight {lost[0]}: export the artefact again")
    for initializer in places:
        if (shape := records[initializer.name].shape) != tuple(initializer.dims):
            raise ArtifactError(
                f"weight {initializer.name} is {shape}, the graph wants {tuple(initializer.dims)}: export the artefact again"
            )
    _refuse_large(places)  # before anything is expanded
    for initializer in places:
        initializer.raw_data = _expand(initializer, tensors[initializer.name], records[initializer.name])
    return bytes(model.SerializeToString(deterministic=True))


def split_model(model: onnx.ModelProto, packing: Packing) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]], dict[str, TensorRecord]]:
    """The model without its large initializers, these as stored, and a record of each."""
    names = {initializer.name for initializer in model.graph.initializer}
    if unknown := sorted(packing.keys() - names):
        raise ArtifactError(f"packing names {unknown[0]}, which is no initializer of the model: name one of its {len(names)}")
    structure, tensors, records = onnx.ModelProto(), {}, {}
    structure.CopyFrom(model)
    check_data(structure)
    check_operators(structure)
    _refuse_large(model.graph.initializer)
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
        packing: Literal["int", "f16", "f32", "f64"] = _FLOATS[dtype] if dtype in _FLOATS else "int"  # noqa: SIM401 - keeps the literal type
        return _stored(values, TensorRecord(bits=values.dtype.itemsize * 8, shape=shape, packing=packing))
    if how == "f16":
        if dtype != "float32":
            raise ArtifactError(f'initializer {name} is {dtype} and packed as "f16": only float32 can be')
        if values.size and not float(np.abs(values).max()) <= float(np.finfo(np.float16).max):
            raise ArtifactError(f'initializer {name} has values beyond half precision (65504): leave it out of the "f16" packing')
        return _stored(values.astype(np.float16), TensorRecord(bits=16, shape=shape, packing="f16"))
    if dtype not in ("int8", "uint8"):
        raise ArtifactError(f"initializer {name} is {dtype} and packed in {how} bits: only int8 and uint8 can be")
    try:
        return _stored(values, TensorRecord(bits=how, shape=shape, packing="int"))
    except ArtifactError as error:
        raise ArtifactError(f"initializer {name}: {error}") from error


def _stored(values: NDArray[Any], record: TensorRecord) -> tuple[NDArray[Any], TensorRecord]:
    """Values at their bit width, and their record."""
    if record.packing != "int" or values.dtype.itemsize > 1 or values.dtype.kind not in "iu":
        return values, record
    packed = pack(values, record.bits, signed=values.dtype.kind == "i")  # checks the range at 8 bits, too
    return (values if record.bits == 8 else packed), record


def _expand(initializer: onnx.TensorProto, stored: NDArray[Any], record: TensorRecord) -> bytes:
    """The raw data of an emptied initializer, in its type and shape."""
    dtype = _numpy_type(initializer)
    try:
        values = _dense(stored, record, dtype)
    except ArtifactError as error:
        raise ArtifactError(f"weight {initializer.name}: {error}: export the artefact again") from error
    if values.dtype != dtype or values.shape != tuple(initializer.dims):
        raise ArtifactError(
            f"weight {initializer.name} is {values.dtype} {values.shape}, the graph wants {dtype} {tuple(initializer.dims)}: "
            "export the artefact again"
        )
    return values.astype(dtype.newbyteorder("<"), copy=False).tobytes()


def _dense(stored: NDArray[Any], record: TensorRecord, dtype: np.dtype[Any]) -> NDArray[Any]:
    """All values of a weight, in its shape. `dtype`: of the graph."""
    if record.packing == "int" and record.bits < 8:
        return unpack(stored, record.bits, record.shape, signed=dtype == np.int8)
    return stored.astype(np.float32) if record.packing == "f16" and dtype == np.float32 else stored


def _numpy_type(initializer: onnx.TensorProto) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type))
    except KeyError as error:
        raise ArtifactError(
            f"initializer {initializer.name} has the type {initializer.data_type}, which is none of ONNX's: export the artefact again"
        ) from error
    return dtype


def _strip(model: onnx.ModelProto) -> None:
    """Removes, in place, what no engine needs: doc strings, metadata (these contain the exporter's file paths) and inferred shapes."""
    for message in list(messages(model)):
        if isinstance(message, onnx.GraphProto):
            del message.value_info[:]
        for field in ("doc_string", "metadata_props"):
            if field in message.DESCRIPTOR.fields_by_name:
                message.ClearField(field)


def _refuse_large(initializers: Iterable[onnx.TensorProto]) -> None:
    size = sum(math.prod(item.dims) * _numpy_type(item).itemsize for item in initializers)
    if size > LARGEST:
        raise ArtifactError(f"the model expands to {size / 2**30:.1f} GiB: ONNX holds less than 2 GiB in one file, make it smaller")
