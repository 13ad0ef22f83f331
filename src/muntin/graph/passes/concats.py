"""Keeps OpenVINO 2026.4 from moving a signed quantiser of concatenated maps that feeds a convolution before the Concat.

There it computes in unsigned integers and loses half of the range. A clip to just inside the outermost steps (-127.51 rounds to -128)
keeps the quantiser behind the Concat, which then joins floats. It changes no integer.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from muntin.graph.onnx_graph import Graph


def clip_before_signed_quantizers(graph: Graph) -> None:
    """Insert the clips; see the head of this file."""
    for quantizer in [node for node in graph.nodes if node.op_type == "QuantizeLinear"]:
        scale, zero = (graph.constants.get(name) for name in quantizer.input[1:3])
        if scale is None or zero is None or zero.dtype != np.int8:
            continue
        if not (_feeds_convolution(graph, quantizer) and _is_concat(graph, graph.makers.get(quantizer.input[0]))):
            continue
        ends = [
            graph.constant(f"{quantizer.output[0]}/{name}", np.asarray(scale * np.float32(end), np.float32))
            for name, end in (("low", -127.51), ("high", 126.51))
        ]
        clipped = f"{quantizer.output[0]}/clipped"
        graph.nodes.append(helper.make_node("Clip", [quantizer.input[0], *ends], [clipped]))
        quantizer.input[0] = clipped
    graph.reindex()


def _feeds_convolution(graph: Graph, quantizer: onnx.NodeProto) -> bool:
    rounded = [reader.output[0] for reader in graph.readers.get(quantizer.output[0], []) if reader.op_type == "DequantizeLinear"]
    readers = [(name, reader) for name in rounded for reader in graph.readers.get(name, [])]
    return any(reader.op_type in ("Conv", "ConvTranspose") and reader.input[0] == name for name, reader in readers)


def _is_concat(graph: Graph, node: onnx.NodeProto | None) -> bool:
    """Return True for a Concat, or one followed by sums and products with constants, as in a norm."""
    while node is not None and node.op_type in ("Add", "Sub", "Mul", "Div", "BatchNormalization"):
        variable = [name for name in node.input if name not in graph.constants]
        node = graph.makers.get(variable[0]) if len(variable) == 1 else None
    return node is not None and node.op_type == "Concat"
