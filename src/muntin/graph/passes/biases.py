"""Gives the mean error of each quantised product's output to its bias.

    product after product:  nodes since the last one, in floats and in integers -> mean error of the output -> bias

The errors of a network's layers add up: behind a ReLU, noise of mean 0 has a mean. So each product is corrected with inputs that the
quantised, corrected products before it give, and every node is computed once. Source: Nagel et al., 1906.04721, section 4.2. Deviation: a
channel is corrected where its mean makes up a good part of its squared error; elsewhere a few inputs have most of the error, such as single
tokens of a transformer, and the others would get it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from muntin.graph.calibration import Inputs, output_shapes
from muntin.graph.float_run import FloatRun
from muntin.graph.insertion import Grids, insert
from muntin.graph.onnx_graph import Array, Graph, tensors_read
from muntin.graph.products import GraphProduct, find_products

ROWS = 64
"""About the rows on which mean errors are measured: more cost more time, and means hardly change."""
LARGEST = 1 << 28
"""Bytes of the largest output of a product, over all rows, in float32: of larger ones fewer rows are taken."""
POSITIONS = 1 << 14
"""About the positions of maps, or tokens, of one batch at which errors are measured."""
SYSTEMATIC = 0.1
"""Least share of a channel's squared error that its mean must be, to be corrected."""


def correct_biases(graph: Graph, grids: Grids, batches: Sequence[Inputs], *, trained: Collection[str] = ()) -> None:
    """Change the biases of the products that have grids, in place; a convolution without a bias gets one. `trained`: names to leave.

    Costs a pass over about `ROWS` rows in floats and one in integers, each in one session for each product, and the memory of their
    tensors.
    """
    products = [product for product in find_products(graph) if product.name in grids and product.name not in trained]
    order = {node.name: index for index, node in enumerate(graph.proto().graph.node)}
    due = sorted((product for product in products if _takes_bias(graph, product)), key=lambda product: order[product.name])
    if not due:
        return
    batches = _few(graph, [product.node.output[0] for product in due], batches)
    integers = Graph(graph.proto())
    insert(integers, grids)
    floats_run, integers_run = (_PartRuns(one, [product.name for product in due], batches) for one in (graph, integers))
    for product, floats, integer in zip(due, floats_run, integers_run, strict=True):
        axis = 1 if product.node.op_type in ("Conv", "ConvTranspose") else -1
        pairs = zip(floats, integer, strict=True)
        shift_O = _mean_error([_at_positions(exact, axis) - _at_positions(rounded, axis) for exact, rounded in pairs])
        if shift_O is not None:
            for rounded in integer:
                rounded += shift_O.reshape(-1, *[1] * (rounded.ndim - 2)) if axis == 1 else shift_O
            _shift(graph, product, shift_O)
    graph.reindex()


def _takes_bias(graph: Graph, product: GraphProduct) -> bool:
    return product.weight is not None and (product.node.op_type != "MatMul" or _sum_behind(graph, product) is not None)


def _sum_behind(graph: Graph, product: GraphProduct) -> tuple[onnx.NodeProto, int] | None:
    """Return the sum of a MatMul's output and a constant vector, and the index of the vector."""
    added = graph.only_reader(product.node.output[0])
    if added is None or added.op_type != "Add":
        return None
    width = graph.constants[product.weight or ""].shape[-1]
    return next(
        ((added, index) for index, name in enumerate(added.input) if getattr(graph.constants.get(name), "shape", None) == (width,)), None
    )


def _few(graph: Graph, tensors: Sequence[str], batches: Sequence[Inputs]) -> list[Inputs]:
    """Return batches, evenly from all, with about `ROWS` rows, or fewer where tensors are large."""
    rows = max([1, *(len(value) for value in batches[0].values() if value.ndim)])
    largest = 4 * max(math.prod(shape) for shape in output_shapes(graph, tensors, batches[0]).values())
    count = max(1, min(len(batches), -(-ROWS // rows), LARGEST // max(1, largest)))
    return list(batches[:: max(1, len(batches) // count)][:count])


def _at_positions(output: Array, axis: int) -> Array:
    """Return the channels of an output, which lie on `axis`, at about `POSITIONS` positions of all rows: (N, O)."""
    rows_NO = np.moveaxis(output.reshape(*output.shape[:2], -1), 1, -1) if axis == 1 else output
    count = max(1, math.prod(rows_NO.shape[:-1]))
    step = max(1, count // POSITIONS)
    while math.gcd(step, count) > 1:  # a step that divides the positions would see the same ones of each row
        step += 1
    places = np.unravel_index(np.arange(0, count, step), rows_NO.shape[:-1])
    return rows_NO[places]


def _mean_error(errors: Sequence[Array]) -> Array | None:
    """Return the mean error of each channel, 0 where it is a small part of its squared error; None if all are. `errors`: each (N, O)."""
    rows_NO = np.concatenate(errors)
    mean_O, square_O = rows_NO.mean(0, dtype=np.float64), np.square(rows_NO).mean(0, dtype=np.float64)
    shift_O: Array = np.where(mean_O**2 > SYSTEMATIC * square_O, mean_O, 0).astype(np.float32)
    return shift_O if shift_O.any() and np.isfinite(shift_O).all() else None


def _shift(graph: Graph, product: GraphProduct, shift_O: Array) -> None:
    node, index = product.node, 2
    if node.op_type == "MatMul":
        found = _sum_behind(graph, product)
        assert found is not None
        node, index = found
    before = graph.constants[node.input[index]] if len(node.input) > index and node.input[index] else np.zeros_like(shift_O)
    name = graph.constant(f"{product.name}/bias", (before.astype(np.float32) + shift_O).astype(before.dtype))
    if len(node.input) > index:
        node.input[index] = name
    else:
        node.input.append(name)


@dataclass
class _PartRuns:
    """Runs a graph up to each of some products in turn. An iteration yields the product's output for each batch, which may be changed.

    `products`: names, in an order in which each follows those that it depends on.
    """

    graph: Graph
    products: Sequence[str]
    batches: Sequence[Inputs]

    def __iter__(self) -> Iterator[list[Array]]:
        model = self.graph.proto()
        nodes = list(model.graph.node)  # each after the makers of its inputs
        ends = {node.name: index for index, node in enumerate(nodes) if node.name in self.products}
        last: dict[str, int] = {}
        for index, node in enumerate(nodes):
            last.update(dict.fromkeys(tensors_read(node), index))
        values: list[dict[str, Array]] = [dict(batch) for batch in self.batches]
        start = 0
        for end in (ends[name] for name in self.products):
            part = nodes[start : end + 1]
            output = nodes[end].output[0]
            made = [name for node in part for name in node.output if name and (last.get(name, -1) > end or name == output)]
            run = self._session(model, part, values[0], made)
            for one in values:
                one.update(run({name: one[name] for name in run.input_names}, made))
                for name in [name for name in one if last.get(name, -1) <= end and name != output]:
                    del one[name]
            yield [one[output] for one in values]
            start = end + 1

    def _session(self, model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], known: Inputs, outputs: Sequence[str]) -> FloatRun:
        """Return some nodes as a model of their own, whose inputs are tensors that are known."""
        read = {name for node in nodes for name in tensors_read(node)}
        part = onnx.ModelProto(ir_version=model.ir_version)
        part.opset_import.extend(model.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(nodes)
        part.graph.initializer.extend(
            numpy_helper.from_array(self.graph.constants[name], name) for name in read & self.graph.constants.keys()
        )
        part.graph.input.extend(_declared(name, known[name]) for name in known.keys() & read)
        part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        return FloatRun(part, exact=True)


def _declared(name: str, value: Array | list[Array]) -> onnx.ValueInfoProto:
    """Return the declaration of a tensor, or of a sequence of tensors.

    Lists of integers, such as sizes, are declared with their length: ONNX Runtime takes ranks from it.
    """
    if isinstance(value, list):
        kind = value[0].dtype if value else np.dtype(np.float32)
        return helper.make_tensor_sequence_value_info(name, helper.np_dtype_to_tensor_dtype(kind), None)
    shape = list(value.shape) if value.dtype.kind in "iu" and value.ndim < 2 else [None] * value.ndim
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
