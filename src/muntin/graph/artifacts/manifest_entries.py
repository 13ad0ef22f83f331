"""Manifest entries of a graph: a record for each product, and the packing of each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from numpy.typing import NDArray

from muntin.artifact import LayerRecord
from muntin.artifact.packing import BITS, value_range
from muntin.graph.passes.storage import is_half
from muntin.graph.records import ProductRecord


def packing_of(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the packing of each initializer: integers in the fewest bits, floats in FP16 where that is exact; others are left out."""
    packing: dict[str, Any] = {}
    for initializer in model.graph.initializer:
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


def layer_records(products: Iterable[ProductRecord], kinds: Mapping[str, str] | None = None) -> list[LayerRecord]:
    """Return a record for each product. `kinds`: of layers, by name; the kind of other products is their ONNX operator."""
    return [
        LayerRecord(
            name=record.name,
            kind=(kinds or {}).get(record.name.partition("/")[0], record.kind),
            weight_bits=record.weight_bits,
            activation_bits=record.bits,
            parameters=record.parameters,
            macs=record.macs,
            note=record.reason,
        )
        for record in products
    ]
