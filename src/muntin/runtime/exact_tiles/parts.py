"""GraphParts of a model's graph, between named tensors, for pictures or tiles of one size.

In `reducible` form a softmax over the whole picture is written as exp(s - max(s)), whose maximum and sums tiles contribute to:

    softmax(s)·v  ->  (exp(s - max)·v) / sum(exp(s - max))
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from muntin.artifact.tile_plan import TilePlan
from muntin.errors import ArtifactError

IMAGES, SCORES = "images", "scores"
"""Names of the input and of the output."""


def reducible(nodes: Iterable[onnx.NodeProto], softmaxes: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes with some softmaxes over the last axis, named by their outputs, and the products that read them, rewritten.

    Adds "S~max", "S~sum" for a softmax S, and "P~product" for a product P of it.
    """
    chosen = set(softmaxes)
    rewritten: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "Softmax" and node.output[0] in chosen:
            name, logits = node.output[0], node.input[0]
            last = f"{name}~axis"
            rewritten += [
                helper.make_node("Constant", [], [last], value=numpy_helper.from_array(np.array([-1], np.int64))),
                helper.make_node("ReduceMax", [logits, last], [f"{name}~max"], keepdims=1),
                helper.make_node("Sub", [logits, f"{name}~max"], [f"{name}~shifted"]),
                helper.make_node("Exp", [f"{name}~shifted"], [f"{name}~exp"]),
                helper.make_node("ReduceSum", [f"{name}~exp", last], [f"{name}~sum"], keepdims=1),
            ]
        elif node.op_type == "MatMul" and node.input[0] in chosen:
            name, product = node.input[0], f"{node.output[0]}~product"
            multiply = copy.deepcopy(node)
            multiply.input[0], multiply.output[0] = f"{name}~exp", product
            rewritten += [multiply, helper.make_node("Div", [product, f"{name}~sum"], [node.output[0]])]
        else:
            rewritten.append(node)
    return rewritten


class GraphParts:
    """The graph of a model in `reducible` form, from which parts are cut. `model`: self-contained ONNX."""

    def __init__(self, model: onnx.ModelProto, plan: TilePlan) -> None:
        graph = model.graph
        self._model, self._plan = model, plan
        self._nodes = reducible(graph.node, plan.softmaxes)
        self._makers = {name: index for index, node in enumerate(self._nodes) for name in node.output if name}
        self._constants = {entry.name: entry for entry in graph.initializer}
        self._counts = {count.name: count for count in plan.counts}

    def cut(
        self,
        inputs: Mapping[str, tuple[np.dtype[Any], Sequence[int]]],
        outputs: Sequence[str],
        size: tuple[int, int],
        whole: tuple[int, int],
        channels: int,
    ) -> onnx.ModelProto:
        """Return the part from some tensors, by type and shape, to others, as a model of its own.

        `size`: of the tile in pixels, from which the part computes shapes; `whole`: of the picture, from which it computes numbers of
        tokens. Raises ArtifactError for a plan that does not fit the graph.
        """
        picture = np.array([1, *size, channels], np.int64)
        wanted, used, fixed = list(outputs), set(), {}
        constants: dict[str, onnx.TensorProto] = {}
        seen = set(inputs)
        while wanted:
            name = wanted.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            if name in self._constants:
                constants[name] = self._constants[name]
                continue
            if name not in self._makers:
                raise ArtifactError(f"its plan for exact tiles does not fit its graph (tensor '{name}'): export the artefact again")
            index = self._makers[name]
            node = self._nodes[index]
            if node.op_type == "Shape" and (value := self._shape_of(node, picture, whole)) is not None:
                fixed[name] = value
                continue
            used.add(index)
            wanted += node.input
        graph = helper.make_graph(
            [self._nodes[index] for index in sorted(used)],
            "part",
            [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind), shape) for name, (kind, shape) in inputs.items()],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [*constants.values(), *(numpy_helper.from_array(value, name) for name, value in fixed.items())],
        )
        return helper.make_model(graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)

    def _shape_of(self, node: onnx.NodeProto, picture: NDArray[np.int64], whole: tuple[int, int]) -> NDArray[np.int64] | None:
        """The value of a Shape node that a part takes as constant, or None."""
        if (count := self._counts.get(node.output[0])) is not None:
            return np.array([count.tokens(*whole)], np.int64)
        if node.input[0] != IMAGES:
            return None
        ends = {entry.name: entry.i for entry in node.attribute}
        return picture[ends.get("start", 0) : ends.get("end", 4)]
