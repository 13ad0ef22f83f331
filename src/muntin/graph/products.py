"""The products of a graph: what multiplies, by a weight or by another activation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from muntin.graph.onnx_graph import Array, Graph, attributes

COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OPAQUE = ("Attention", "Einsum", "GRU", "If", "LSTM", "Loop", "MultiHeadAttention", "RNN", "Scan")
"""Operators that may multiply inside, stay in floats and are not counted."""
_AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
"""Axis of the output channels of a weight."""


@dataclass(frozen=True, kw_only=True)
class GraphProduct:
    """A node that multiplies. `activations`: its inputs that are no constants, by index. `softmax`: the node whose result it mixes."""

    name: str
    node: onnx.NodeProto
    activations: dict[int, str]
    weight: str | None
    axis: int
    softmax: onnx.NodeProto | None = None

    def parameters(self, graph: Graph) -> list[str]:
        """Return its constants: the weight and the bias, of a MatMul that of the sum behind it."""
        if self.weight is None:
            return []
        names = [self.weight, *self.node.input[2:]]
        added = graph.only_reader(self.node.output[0]) if self.node.op_type == "MatMul" else None
        if added is not None and added.op_type == "Add":
            names += [name for name in added.input if name in graph.constants and graph.constants[name].ndim == 1]
        return [name for name in names if name in graph.constants]

    def macs(self, graph: Graph, output_shape: tuple[int, ...], left_shape: tuple[int, ...]) -> int:
        """Return the multiply-adds of one run."""
        if self.node.op_type == "ConvTranspose":
            weight = graph.constants[self.node.input[1]]
            return math.prod(left_shape) * int(weight[0].size)
        if self.node.op_type == "Conv" and self.weight is not None:
            return math.prod(output_shape) * int(graph.constants[self.weight][0].size)
        return math.prod(output_shape) * left_shape[-1]


def find_products(graph: Graph) -> list[GraphProduct]:
    """Return the products in the order of the graph. Nodes without a name of their own are named by their first output."""
    products = []
    used: set[str] = set()
    for node in graph.nodes:
        if node.op_type not in COMPUTE:
            continue
        constants = [name for name in node.input[:2] if name in graph.constants]
        if len(constants) == 2:
            continue
        if not node.name or node.name in used:
            node.name = node.output[0]
        used.add(node.name)
        activations = {index: name for index, name in enumerate(node.input[:2]) if name not in graph.constants}
        weight = node.input[1] if node.input[1] in graph.constants else None
        products.append(
            GraphProduct(
                name=node.name,
                node=node,
                activations=activations,
                weight=weight,
                axis=_AXES.get(node.op_type, 0) % graph.constants[weight].ndim if weight is not None else 0,
                softmax=_softmax(graph, node) if weight is None else None,
            )
        )
    return products


def _softmax(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the Softmax over the last axis that is the first operand of this MatMul."""
    maker = graph.makers.get(node.input[0])
    last = maker is not None and maker.op_type == "Softmax" and attributes(maker).get("axis", -1) == -1
    return maker if node.op_type == "MatMul" and last else None


def no_integer_form(graph: Graph, product: GraphProduct) -> str | None:
    """Return why engines have no integer kernel for a product, or None."""
    if product.node.op_type == "Gemm":
        return "a Gemm of a transposed first operand, or of two computed ones"
    if 0 not in product.activations:
        return f"a {product.node.op_type} whose first operand is a constant"
    if product.node.op_type in ("Conv", "ConvTranspose") and product.weight is None:
        return "its weight is computed from the input"
    weight: Array | None = graph.constants.get(product.weight or "")
    return None if weight is None or weight.dtype.kind == "f" else f"its weight is {weight.dtype}"
