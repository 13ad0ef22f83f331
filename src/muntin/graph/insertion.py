"""Inserts QuantizeLinear and DequantizeLinear around the products that have grids: calibrated after training, or trained.

A tensor that several products read on one grid is rounded once. A weight becomes integers with a scale for each output channel.
softmax(s)·v becomes (exp(s - max)·v) / sum: a normalised share over N entries shrinks as 1/N and vanishes in 8 bits. Over more than
`LONGEST_SOFTMAX` entries the shares are divided by the number of started parts of that length, so that the sums fit into 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from muntin.graph.grids import SHARES, ByteGrid, quantize_weight, weight_limit, weight_scale
from muntin.graph.onnx_graph import Array, Graph
from muntin.graph.products import GraphProduct, find_products

LONGEST_SOFTMAX = 24_000
"""Entries of share 1 whose sum of products fits into 32 bits: 255 steps of values times 255 of the share, with a quarter in reserve."""


@dataclass(frozen=True, kw_only=True)
class ProductGrids:
    """The grids of a product: of its activations by input index, and of its weight (`scale` None: by the peak of each channel).

    `spread_softmax`: True if a softmax before it is divided by its sum after the product.
    """

    activations: Mapping[int, ByteGrid]
    weight_bits: int = 8
    scale: Array | None = field(default=None, compare=False)
    spread_softmax: bool = False

    def in_seven_bits(self) -> ProductGrids:
        """Return the grids with a weight of at most 7 bits; trained scales keep their range."""
        if self.weight_bits < 8:
            return self
        scale = None if self.scale is None else self.scale * np.float32(weight_limit(8) / weight_limit(7))
        return replace(self, weight_bits=7, scale=scale)


Grids = Mapping[str, ProductGrids]
"""Grids by the name of a product."""


def insert(graph: Graph, by_product: Grids, *, untouched: Collection[int] = ()) -> None:
    """Quantise the products that have grids in place. `untouched`: ids of nodes that are read but not rewritten."""
    rounded: dict[tuple[str, ByteGrid], str] = {}
    entries = _softmax_entries(graph) if any(grids.spread_softmax for grids in by_product.values()) else {}
    for product in find_products(graph):
        grids = by_product.get(product.name)
        if grids is None or id(product.node) in untouched:
            continue
        if grids.spread_softmax and product.softmax is not None:
            _spread(graph, product, entries[product.softmax.output[0]], rounded)
        for index, grid in grids.activations.items():
            if not (grids.spread_softmax and product.softmax is not None and index == 0):
                product.node.input[index] = _round(graph, product.node.input[index], grid, rounded)
        if product.weight is not None:
            product.node.input[1] = _integers(graph, product, grids)
    graph.reindex()


def _round(graph: Graph, tensor: str, grid: ByteGrid, rounded: dict[tuple[str, ByteGrid], str]) -> str:
    """Return the tensor on its grid."""
    if (tensor, grid) not in rounded:
        number = sum(1 for name, _ in rounded if name == tensor)
        base = tensor if not number else f"{tensor}/{number}"
        scale = graph.constant(f"{base}/scale", np.array(grid.scale, np.float32))
        zero = graph.constant(f"{base}/zero", grid.typed_zero_point())
        graph.nodes.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [f"{base}/integers"], name=f"{base}/quantize"))
        graph.nodes.append(
            helper.make_node("DequantizeLinear", [f"{base}/integers", scale, zero], [f"{base}/rounded"], name=f"{base}/dequantize")
        )
        rounded[tensor, grid] = f"{base}/rounded"
    return rounded[tensor, grid]


def _integers(graph: Graph, product: GraphProduct, grids: ProductGrids) -> str:
    """Return the dequantised weight; a weight that several products share on one scale is stored once."""
    assert product.weight is not None
    weight = graph.constants[product.weight]
    scale_O = weight_scale(weight, product.axis, grids.weight_bits) if grids.scale is None else grids.scale
    base = f"{product.weight}/{product.name}" if len(graph.readers.get(product.weight, [])) > 1 else product.weight
    integers = graph.constant(f"{base}/integers", quantize_weight(weight, product.axis, scale_O, grids.weight_bits))
    scale = graph.constant(f"{base}/scale", scale_O.astype(np.float32))
    output = f"{integers}/dequantized"
    graph.nodes.append(helper.make_node("DequantizeLinear", [integers, scale], [output], name=output, axis=product.axis))
    return output


def _softmax_entries(graph: Graph) -> dict[str, int | None]:
    """Return the length of the last axis of each Softmax, by its output; None where it depends on the input."""
    inferred = onnx.shape_inference.infer_shapes(graph.proto(), data_prop=True).graph
    shapes = {entry.name: entry.type.tensor_type.shape for entry in (*inferred.value_info, *inferred.output)}
    outputs = [node.output[0] for node in graph.nodes if node.op_type == "Softmax"]
    return {name: (shapes[name].dim[-1].dim_value or None) if name in shapes and shapes[name].dim else None for name in outputs}


def _spread(graph: Graph, product: GraphProduct, entries: int | None, rounded: dict[tuple[str, ByteGrid], str]) -> None:
    """Write softmax(s)·v as (exp(s - max)·v) / sum of the rounded exponentials."""
    softmax, node = product.softmax, product.node
    assert softmax is not None
    logits, shares, mixed = softmax.input[0], softmax.output[0], node.output[0]
    sums = next((other for other in graph.nodes if other.output[0] == f"{shares}/sum"), None)
    if sums is None:
        last = graph.constant("last axis", np.array([-1], np.int64))
        graph.nodes += [
            helper.make_node("ReduceMax", [logits, last], [f"{shares}/greatest"], keepdims=1),
            helper.make_node("Sub", [logits, f"{shares}/greatest"], [f"{shares}/shifted"]),
            helper.make_node("Exp", [f"{shares}/shifted"], [f"{shares}/exp"]),
        ]
        exponentials = _round(graph, _in_parts(graph, logits, f"{shares}/exp", entries), SHARES, rounded)
        sums = helper.make_node("ReduceSum", [exponentials, last], [f"{shares}/sum"], keepdims=1)
        graph.nodes.append(sums)
    node.input[0] = sums.input[0]
    node.output[0] = f"{mixed}/product"
    graph.nodes.append(helper.make_node("Div", [node.output[0], f"{shares}/sum"], [mixed]))


def _in_parts(graph: Graph, logits: str, shares: str, entries: int | None) -> str:
    """Return the shares divided by the number of started parts of `LONGEST_SOFTMAX` entries."""
    if entries is not None and entries <= LONGEST_SOFTMAX:
        return shares
    if entries is not None:
        parts = graph.constant(f"{shares}/parts", np.array(-(-entries // LONGEST_SOFTMAX), np.float32))
    else:
        parts, steps = f"{shares}/parts", f"{shares}/parts/"
        constants = {"rest": LONGEST_SOFTMAX - 1, "length": LONGEST_SOFTMAX}
        names = {key: graph.constant(f"{steps}{key}", np.array(value, np.int64)) for key, value in constants.items()}
        graph.nodes += [
            helper.make_node("Shape", [logits], [f"{steps}shape"], start=-1),
            helper.make_node("Squeeze", [f"{steps}shape"], [f"{steps}entries"]),
            helper.make_node("Add", [f"{steps}entries", names["rest"]], [f"{steps}more"]),
            helper.make_node("Div", [f"{steps}more", names["length"]], [f"{steps}count"]),
            helper.make_node("Cast", [f"{steps}count"], [parts], to=onnx.TensorProto.FLOAT),
        ]
    graph.nodes.append(helper.make_node("Div", [shares, parts], [f"{shares}/part"]))
    return f"{shares}/part"
