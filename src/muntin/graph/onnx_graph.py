"""An ONNX graph that passes rewrite: makers and readers of tensors, constants as arrays, new names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from muntin.errors import ExportError

Array = NDArray[Any]


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its local functions inlined."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


class Graph:
    """A model's main graph with its indices. Passes change `nodes` and `constants`, then call `reindex`; `proto` gives the model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        model = without_functions(model)
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = [copy.deepcopy(node) for node in graph.node]
        self.constants: dict[str, Array] = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
        self.inputs = {entry.name: entry for entry in graph.input if entry.name not in self.constants}
        self.outputs = [entry.name for entry in graph.output]
        self._frame = onnx.ModelProto(ir_version=max(model.ir_version, 10), producer_name=model.producer_name)
        """The model without nodes and constants."""
        self._frame.opset_import.extend(model.opset_import)
        self._frame.metadata_props.extend(model.metadata_props)
        self._frame.graph.name = graph.name
        self._frame.graph.input.extend(self.inputs.values())
        self._frame.graph.output.extend(graph.output)
        self.makers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.reindex()

    def reindex(self) -> None:
        """Rebuild `makers` and `readers` from `nodes`."""
        self.makers = {output: node for node in self.nodes for output in node.output if output}
        self.readers = {}
        for node in self.nodes:
            for name in tensors_read(node):
                self.readers.setdefault(name, []).append(node)

    def only_reader(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that alone reads a tensor that is no output of the graph, or None."""
        nodes = self.readers.get(tensor, [])
        return nodes[0] if len(nodes) == 1 and tensor not in self.outputs else None

    def constant(self, name: str, value: Array | float) -> str:
        """Add a constant; return its name, which is made unique."""
        unique, number = name, 1
        while unique in self.constants or unique in self.makers:
            unique, number = f"{name}/{number}", number + 1
        self.constants[unique] = np.asarray(value)
        return unique

    def drop_unread(self) -> None:
        """Remove the nodes whose outputs nothing reads."""
        while unread := [node for node in self.nodes if not any(name in self.readers or name in self.outputs for name in node.output)]:
            ids = {id(node) for node in unread}
            self.nodes = [node for node in self.nodes if id(node) not in ids]
            self.reindex()

    def proto(self, extra_outputs: Iterable[str] = ()) -> onnx.ModelProto:
        """Return the model with the constants that are read. `extra_outputs`: further tensors to return, of unknown type and shape."""
        model = onnx.ModelProto()
        model.CopyFrom(self._frame)
        graph = model.graph
        graph.node.extend(_sorted(self.nodes))
        read = {name for node in self.nodes for name in tensors_read(node)} | set(self.outputs)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in read)
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in extra_outputs)
        return model


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def set_attributes(node: onnx.NodeProto, values: Mapping[str, Any]) -> None:
    """Replace all attributes of a node."""
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())


def tensors_read(node: onnx.NodeProto) -> list[str]:
    """Return the names of a node's inputs, and of what the graphs inside it (If, Loop) read."""
    inner = [graph for entry in node.attribute for graph in (*entry.graphs, *([entry.g] if entry.HasField("g") else []))]
    return [*node.input, *(name for graph in inner for part in graph.node for name in tensors_read(part))]


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes in an order in which each follows the makers of its inputs; otherwise the order stays.

    Raises ExportError where nodes wait for each other.
    """
    made_by = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    order: list[onnx.NodeProto] = []
    done: set[int] = set()
    for start in range(len(nodes)):
        waiting = [start]
        while waiting:
            index = waiting[-1]
            if len(waiting) > len(nodes) ** 2:
                raise ExportError(f"the graph has a cycle through tensor '{nodes[index].output[0]}': check the model")
            needs = {made_by[name] for name in tensors_read(nodes[index]) if name in made_by}
            if index in done or needs <= done:
                waiting.pop()
                if index not in done:
                    done.add(index)
                    order.append(nodes[index])
            else:
                waiting.extend(sorted(needs - done))
    return order
