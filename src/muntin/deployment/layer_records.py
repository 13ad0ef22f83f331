"""Manifest entries of an exported model: a record for each layer and the packing of each weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import LayerRecord
from muntin.artifact.packing import BITS, value_range
from muntin.compression import Change, QuantizedConv2d, QuantizedLinear
from muntin.compression.rewrite import named
from muntin.deployment.counting import PRODUCTS, UNPACKED, WEIGHTED, bias_count, is_half, layer_macs, weight_count
from muntin.deployment.onnx_export import COMPUTE


def packing_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return the packing of each initializer: integers in the fewest bits, floats in FP16 where that is exact; others are left out."""
    packing: dict[str, Any] = {}
    for initializer in proto.graph.initializer:
        if initializer.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and initializer.dims:
            packing[initializer.name] = _bits_for(onnx.numpy_helper.to_array(initializer))
        elif initializer.data_type == onnx.TensorProto.FLOAT and np.prod(initializer.dims) > UNPACKED:
            values = onnx.numpy_helper.to_array(initializer)
            if np.abs(values).max() <= np.finfo(np.float16).max and np.array_equal(values, values.astype(np.float16).astype(np.float32)):
                packing[initializer.name] = "f16"
    return packing


def _bits_for(values: NDArray[Any]) -> int:
    """Return the smallest width, 2 to 8 bits, that holds every value."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    signed = values.dtype.kind == "i"
    return next(bits for bits in BITS if low >= value_range(bits, signed)[0] and high <= value_range(bits, signed)[1])


def layer_records(
    model: nn.Module, example: Tensor, changes: Iterable[Change], proto: onnx.ModelProto, *, size: tuple[int, int]
) -> list[LayerRecord]:
    """Return a record for each layer with weights and each quantised product: bits and their reason, parameters, multiply-adds.

    Multiply-adds are those of one image of `size` (H, W) with the example's channels. The 8 `weight_bits` of a product are those of its
    second operand.
    """
    macs = layer_macs(model, example.new_zeros(1, example.shape[1], *size))
    notes: dict[str, str] = {}
    for change in changes:  # the first of several passes on a layer decided its bits and has the reason
        if change.pass_ in ("qat", "mix", "quantize") and change.reason:
            notes.setdefault(change.layer, change.reason)
    records = []
    for name, layer in named(model, *WEIGHTED):
        is_integer = isinstance(layer, QuantizedLinear | QuantizedConv2d)
        records.append(
            LayerRecord(
                name=name,
                kind=type(layer).__name__.removeprefix("Quantized"),
                weight_bits=layer.bits if isinstance(layer, QuantizedLinear | QuantizedConv2d) else 16 if is_half(layer.weight) else 32,
                activation_bits=8 if is_integer else None,
                parameters=weight_count(layer) + bias_count(layer),
                macs=macs.get(name),
                note=notes.get(name, ""),
            )
        )
    for name, product in named(model, *PRODUCTS):
        kind = type(product).__name__.removeprefix("Quantized")
        records.append(LayerRecord(name=name, kind=kind, weight_bits=8, activation_bits=8, macs=macs.get(name)))
    nodes = [node.name for node in proto.graph.node if node.op_type in COMPUTE]
    return [_deployed(record, nodes) for record in records]


def _deployed(record: LayerRecord, nodes: Iterable[str]) -> LayerRecord:
    """Mark a quantised layer without a node in the graph, such as an auxiliary head, as not deployed."""
    if record.activation_bits is None or any(name == record.name or name.startswith(f"{record.name}/") for name in nodes):
        return record
    return record.model_copy(update={"activation_bits": None, "note": "not deployed: the answer does not depend on it"})
