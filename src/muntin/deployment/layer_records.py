"""Manifest entries of an exported model: a record for each product and the packing of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from torch import nn

from muntin.artifact import LayerRecord
from muntin.artifact.packing import BITS, value_range
from muntin.compression import Change
from muntin.graph.half import is_half
from muntin.graph.records import ProductRecord, QuantizedOnnx


def packing_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return the packing of each initializer: integers in the fewest bits, floats in FP16 where that is exact; others are left out."""
    packing: dict[str, Any] = {}
    for initializer in proto.graph.initializer:
        if initializer.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and initializer.dims:
            packing[initializer.name] = _bits_for(onnx.numpy_helper.to_array(initializer))
        elif initializer.data_type == onnx.TensorProto.FLOAT and is_half(onnx.numpy_helper.to_array(initializer)):
            packing[initializer.name] = "f16"
    return packing


def _bits_for(values: NDArray[Any]) -> int:
    """Return the smallest width, 2 to 8 bits, that holds every value."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    signed = values.dtype.kind == "i"
    return next(bits for bits in BITS if low >= value_range(bits, signed)[0] and high <= value_range(bits, signed)[1])


def layer_records(model: nn.Module, result: QuantizedOnnx) -> list[LayerRecord]:
    """Return a record for each product of the graph. The kind of a layer is its class, that of another product its ONNX operator."""
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules() if not list(layer.children())}
    return [
        LayerRecord(
            name=record.name,
            kind=kinds.get(record.name.partition("/")[0], record.kind),
            weight_bits=record.weight_bits,
            activation_bits=record.bits,
            parameters=record.parameters,
            macs=record.macs,
            note=record.reason,
        )
        for record in result.products
    ]


def quantization_changes(products: Iterable[ProductRecord]) -> list[Change]:
    """Return the manifest's entry of each product that calibration quantised or left in floats."""
    return [
        Change(
            layer=record.name,
            pass_="quantize",
            done="kept" if record.bits is None else "W8A8" if record.parameters else "A8",
            reason=record.reason,
            sqnr_db=record.sqnr_db,
        )
        for record in products
    ]


def reasons_of(changes: Iterable[Change]) -> Mapping[str, str]:
    """Return why layers stayed in floats, by name: the first of several passes on a layer decided."""
    reasons: dict[str, str] = {}
    for change in changes:
        if change.pass_ in ("qat", "mix", "quantize") and change.reason:
            reasons.setdefault(change.layer, change.reason)
    return reasons
