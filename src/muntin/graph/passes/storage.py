"""Weights that no product multiplies in integers, as they are stored: FP16, lookup tables in 8 bits, where that changes them little."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper

from muntin.graph.grids import quantize_weight, weight_scale
from muntin.graph.onnx_graph import Array, Graph, attributes

UNPACKED = 64
"""Maximum number of values of a tensor that is stored as it is."""
HALF_DB = 60.0
"""Signal over noise below which a weight stays in FP32. FP16 gives 73 dB unless values are out of its range."""
LARGE_TABLE = 1 << 16
"""Values of a lookup table from which on it is stored in 8 bits."""
TABLE_DB = 35.0
"""Signal over noise that a table in 8 bits has to keep."""


def quantize_tables(graph: Graph) -> None:
    """Store each lookup table, a matrix whose rows Gather takes, in 8 bits with a scale for each row, if `TABLE_DB` remains.

    The scales of a table that is of integers already stay as they are.
    """
    for gather in [node for node in graph.nodes if node.op_type == "Gather" and attributes(node).get("axis", 0) == 0]:
        name = gather.input[0]
        table = graph.constants.get(name)
        readers = graph.readers.get(name, [])
        if table is None or table.dtype != np.float32 or table.ndim != 2 or table.size < LARGE_TABLE or len(readers) > 1:
            continue
        if _are_scales(graph, gather, table):
            continue
        scale_O = weight_scale(table, 0)
        integers = quantize_weight(table, 0, scale_O, 8)
        noise, signal = (float(np.square(x, dtype=np.float64).sum()) for x in (table - integers * scale_O[:, None], table))
        if noise < signal * 10 ** (-TABLE_DB / 10):
            inputs = [graph.constant(f"{name}/integers", integers), graph.constant(f"{name}/scale", scale_O)]
            graph.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}/table"], name=f"{name}/table", axis=0))
            gather.input[0] = f"{name}/table"
    graph.reindex()


def _are_scales(graph: Graph, gather: onnx.NodeProto, table: Array) -> bool:
    """Return True if the same indices read rows of a wider table of integers."""
    others = [graph.constants.get(node.input[0]) for node in graph.readers[gather.input[1]] if node.op_type == "Gather"]
    return any(other is not None and other.dtype == np.int8 and len(other) == len(table) and other.size > table.size for other in others)


def round_to_half(graph: Graph, *, spared: Collection[str] = ()) -> None:
    """Round each matrix of floats to FP16 in place, if `HALF_DB` remains. `spared`: constants that become integers."""
    for name, value in graph.constants.items():
        if name in spared or value.dtype != np.float32 or value.ndim < 2 or value.size <= UNPACKED:
            continue
        with np.errstate(over="ignore"):
            rounded = value.astype(np.float16).astype(np.float32)
        noise, signal = (float(np.square(x, dtype=np.float64).sum()) for x in (value - rounded, value))
        if noise < signal * 10 ** (-HALF_DB / 10):
            graph.constants[name] = rounded


def is_half(value: Array) -> bool:
    """Return True if a tensor is stored in FP16: more than `UNPACKED` values, all exact in FP16."""
    if value.size <= UNPACKED or np.abs(value).max() > np.finfo(np.float16).max:
        return False
    return np.array_equal(value, value.astype(np.float16).astype(np.float32))
