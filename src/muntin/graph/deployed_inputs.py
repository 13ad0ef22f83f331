"""The values that a quantised graph rounds at the inputs of its products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from muntin.graph.calibration import Inputs, observe
from muntin.graph.grids import ByteGrid, RangeObserver
from muntin.graph.onnx_graph import Graph
from muntin.graph.products import COMPUTE


def quantized_inputs(model: bytes, batches: Sequence[Inputs]) -> dict[str, tuple[RangeObserver, ByteGrid]]:
    """Return what the first operand of each quantised product holds over the batches, before it is rounded, and its grid, by name."""
    graph = Graph(onnx.load_model_from_string(model))
    rounded: dict[str, tuple[str, ByteGrid]] = {}
    for node in graph.nodes:
        dequantizer = graph.makers.get(node.input[0]) if node.op_type in COMPUTE else None
        quantizer = graph.makers.get(dequantizer.input[0]) if dequantizer is not None else None
        if quantizer is not None and quantizer.op_type == "QuantizeLinear":
            scale, zero = (graph.constants[name] for name in quantizer.input[1:3])
            grid = ByteGrid(scale=float(scale), unsigned=zero.dtype == np.uint8, zero_point=int(zero))
            rounded[node.name] = quantizer.input[0], grid
    observers = observe(graph, [tensor for tensor, _ in rounded.values()], batches) if rounded else {}
    return {name: (observers[tensor], grid) for name, (tensor, grid) in rounded.items()}
