"""The compute nodes of an ONNX graph, and finding them again in what an engine made of it.

Engines fuse, split and rename: OpenVINO reports "conv1/WithoutBiases,Multiply_4446,conv1,conv2_quantize" for one kernel, ONNX Runtime
"conv1_token_0". A kernel's names are traced back to the one node that multiplies; that a *quantiser* of the next layer was fused into
it must not make it pass for that layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx

COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
AFFINE = frozenset({"Mul", "Add", "Sub", "Div", "BatchNormalization"})


@dataclass(frozen=True)
class ComputeNodes:
    """The names of the nodes that multiply, and what else engines call them by: the graph output they give, a scale merged into them."""

    names: frozenset[str]
    outputs: dict[str, str]

    def find(self, reported: Iterable[str], *, derived: bool) -> str | None:
        """The compute node that a kernel's reported names belong to; None when there is none.

        `derived`: names that the engine made by adding to a node's ("conv1/WithoutBiases", "conv1_token_0", "fused conv1") count too.
        """
        for name in reported:
            if (found := self._exact(name)) is not None:
                return found
            if not derived:
                continue
            shorter = re.sub(r"_token_\d+$", "", name.removeprefix("fused "))
            while True:
                if (found := self._exact(shorter)) is not None:
                    return found
                shorter, slash, _ = shorter.rpartition("/")
                if not slash:
                    break
        return None

    def _exact(self, name: str) -> str | None:
        return name if name in self.names else self.outputs.get(name)


def compute_nodes(model: bytes) -> ComputeNodes:
    """Reads the compute nodes of a serialised ONNX model; a node without a name goes by its first output, as engines call it."""
    graph = onnx.load_model_from_string(model).graph
    names = {node.name or node.output[0]: node for node in graph.node if node.op_type in COMPUTE}
    outputs = {output.name for output in graph.output}
    aliases = {node.output[0]: name for name, node in names.items() if node.output[0] in outputs}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    constants = _constants(graph)
    for name, node in names.items():
        for follower in _affine_followers(node, readers, constants):
            aliases |= {called: name for called in (follower.name, follower.output[0]) if called}
    return ComputeNodes(names=frozenset(names), outputs=aliases)


def _affine_followers(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: set[str]) -> Iterator[onnx.NodeProto]:
    """What an engine merges into a product and may name it by: scales and biases that alone read it, one after the other."""
    while len(found := readers.get(node.output[0], [])) == 1:
        (follower,) = found
        others = [tensor for tensor in follower.input if tensor != node.output[0]]
        if follower.op_type not in AFFINE or not constants.issuperset(others):
            return
        yield follower
        node = follower


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Tensors that no input reaches."""
    constants = {initializer.name for initializer in graph.initializer} | {""}
    for node in graph.node:  # ONNX keeps its nodes in topological order
        if constants.issuperset(node.input):
            constants.update(node.output)
    return constants
