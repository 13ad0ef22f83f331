"""Weights that stay in floats, as they are stored: in FP16 where that changes them little."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from muntin.graph.onnx_graph import Array, Graph

UNPACKED = 64
"""Maximum number of values of a tensor that is stored as it is."""
HALF_DB = 60.0
"""Signal over noise below which a weight stays in FP32. FP16 gives 73 dB unless values are out of its range."""


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
