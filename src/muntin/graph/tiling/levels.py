"""Reductions of a graph over the whole picture, and the order in which tiles have to walk over it.

A *reduction* makes a value of fixed shape from a tensor that covers the picture. Whatever reads it belongs to the next level: it needs a
walk over the whole picture first. A level also ends between windows and a convolution, so that a pass needs the surroundings of a
convolution, or tiles of whole windows, but not both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import onnx

from muntin.errors import ExportError
from muntin.graph.onnx_graph import Array, Graph, attributes
from muntin.graph.tiling.layouts import Layouts

_MERGES: dict[str, Literal["sum", "max", "mean"]] = {
    "ReduceMax": "max", "ReduceSum": "sum", "ReduceMean": "mean", "GlobalAveragePool": "mean", "GlobalMaxPool": "max",
}  # fmt: skip
_SPREADS = frozenset({"ConvTranspose", "AveragePool", "MaxPool", "LpPool"})


class NoPlanError(ExportError):
    """A graph cannot be computed in exact tiles, for the reason in the message."""


def data_tensors(nodes: Sequence[onnx.NodeProto], source: str) -> set[str]:
    """Names of the tensors that depend on the values of `source`, not on its shape alone."""
    data = {source}
    for node in nodes:
        if node.op_type not in ("Shape", "Size") and data.intersection(node.input):
            data.update(name for name in node.output if name)
    return data


def spreads(node: onnx.NodeProto, constants: dict[str, Array]) -> bool:
    """True for an operation whose answer in a cell depends on neighbouring cells."""
    if node.op_type in _SPREADS:
        return True
    options = attributes(node)
    if node.op_type == "Resize":
        return bool(options.get("mode", b"nearest") != b"nearest")
    if node.op_type != "Conv":
        return False
    kernel = options.get("kernel_shape") or constants[node.input[1]].shape[2:]
    return any(side > 1 for side in kernel) or any(side > 1 for side in options.get("strides", ()))


class Levels:
    """Levels of a graph's tensors. `graph`: in reducible form. Raises NoPlanError for a reduction that tiles cannot contribute to."""

    def __init__(self, graph: Graph, layouts: Layouts, source: str) -> None:
        self.graph, self.layouts = graph, layouts
        self.data = data_tensors(graph.nodes, source)
        self.order = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
        self.reductions: dict[str, Literal["sum", "max", "mean"]] = {}
        self.level: dict[str, int] = {source: 0}
        self._windowed: set[str] = set()
        for node in graph.nodes:
            if self.data.issuperset(name for name in node.output if name) and node.output:
                self._place(node)

    def spreads(self, node: onnx.NodeProto) -> bool:
        """True for an operation whose answer in a cell depends on neighbouring cells."""
        return spreads(node, self.graph.constants)

    def inputs(self, node: onnx.NodeProto) -> list[str]:
        """The inputs of a node that depend on the picture, each once."""
        return list(dict.fromkeys(name for name in node.input if name in self.data))

    def covering(self, node: onnx.NodeProto) -> list[str]:
        """Those of them that cover the picture."""
        return [name for name in self.inputs(node) if self.layouts.varies(name)]

    def readers(self, level: int) -> Iterator[onnx.NodeProto]:
        """The nodes of a level."""
        for node in self.graph.nodes:
            if node.output and self.level.get(node.output[0]) == level:
                yield node

    def _place(self, node: onnx.NodeProto) -> None:
        inputs = self.inputs(node)
        level = max(self.level[name] for name in inputs)
        windowed = any(name in self._windowed for name in inputs if self.level[name] == level)
        if self._reduces(node):
            self.reductions[node.output[0]] = self._merge(node)
            level, windowed = level + 1, False
        elif self.spreads(node) and windowed:
            level, windowed = level + 1, False
        for name in node.output:
            if not name:
                continue
            self.level[name] = level
            tensor = self.layouts.of(name)
            if windowed or (tensor is not None and tensor.window is not None):
                self._windowed.add(name)

    def _reduces(self, node: onnx.NodeProto) -> bool:
        return bool(self.covering(node)) and not self.layouts.varies(node.output[0])

    def _merge(self, node: onnx.NodeProto) -> Literal["sum", "max", "mean"]:
        label = f"'{node.name or node.output[0]}' ({node.op_type})"
        if node.op_type == "MatMul":
            left, right = node.input[:2]
            last = len(self.layouts.shape(left)) - 1
            if {left, right} <= self.data and self.layouts.varying_axes(left) == {last}:
                return "sum"
        elif node.op_type in _MERGES:
            return _MERGES[node.op_type]
        raise NoPlanError(f"{label} makes one value of the whole picture, in a form that tiles cannot contribute to")


def whole_softmaxes(graph: Graph, layouts: Layouts, data: set[str]) -> list[str]:
    """Outputs of the softmaxes over the whole picture. Raises NoPlanError for one that a product does not reduce."""
    chosen = []
    for node in graph.nodes:
        if not data.intersection(node.input) or node.op_type not in (
            "Softmax",
            "LogSoftmax",
            "LayerNormalization",
            "InstanceNormalization",
        ):
            continue
        name = node.input[0]
        rank = len(layouts.shape(name))
        axis = attributes(node).get("axis", -1) % rank
        varying = layouts.varying_axes(name)
        label = f"'{node.name or node.output[0]}' ({node.op_type})"
        if node.op_type == "InstanceNormalization" and varying:
            raise NoPlanError(f"{label} takes its statistics from the whole picture")
        if not any(other >= axis for other in varying) if node.op_type == "LayerNormalization" else axis not in varying:
            continue
        if node.op_type != "Softmax" or axis != rank - 1:
            raise NoPlanError(f"{label} goes over the whole picture, in a form that tiles cannot contribute to")
        if varying != {axis}:
            raise NoPlanError(f"{label} is attention between all pairs of tokens")
        readers = graph.readers.get(node.output[0], [])
        if not readers or any(reader.op_type != "MatMul" or reader.input[0] != node.output[0] for reader in readers):
            raise NoPlanError(f"{label} goes over the whole picture, and no product reads it")
        chosen.append(node.output[0])
    return chosen
