"""The compute nodes of an ONNX graph, and how to find them by the names in an engine's compiled model.

Engines fuse, split and rename: OpenVINO reports "conv1/WithoutBiases,Multiply_4446,conv1,conv2_quantize" for one kernel, ONNX Runtime
"conv1_token_0". A kernel's names are traced back to the one node that multiplies. A fused quantiser of the next layer must not make a
kernel count as that layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from muntin.artifact import LayerRecord

COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
AFFINE = frozenset({"Mul", "Add", "Sub", "Div", "BatchNormalization"})
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Gelu"})


@dataclass(frozen=True)
class Weight:
    """The constant operand of a node: name and shape as stored in the model; `groups` of a convolution, otherwise 1."""

    name: str
    shape: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class ComputeNodes:
    """Names of the nodes that multiply, and other names that engines use for them.

    `outputs`: graph outputs and merged scales -> node. `fused`: tensor names that an engine may give a fused kernel (the node's output,
    and those of a sum and an activation that only it feeds) -> nodes; a sum of two products may belong to either. `weights`: of the nodes
    that multiply by a constant.
    """

    names: frozenset[str]
    outputs: dict[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)

    def find(self, reported: Iterable[str], *, derived: bool, taken: Collection[str] = frozenset()) -> str | None:
        """The compute node of a kernel with these reported names, or None.

        `derived`: names that the engine extended ("conv1/WithoutBiases", "conv1_token_0", "fused conv1", "relu1_nchwc") count, too.
        `taken`: nodes of other kernels, which decide where a sum of two products belongs.
        """
        names = list(reported)
        for name in names:
            if (node := self._exact(name)) is not None:
                return node
            if not derived:
                continue
            shorter = _plain(name)
            while True:
                if (node := self._exact(shorter)) is not None:
                    return node
                shorter, slash, _ = shorter.rpartition("/")
                if not slash:
                    break
        return self._fused(names, taken) if derived else None

    def _exact(self, name: str) -> str | None:
        return name if name in self.names else self.outputs.get(name)

    def _fused(self, names: Iterable[str], taken: Collection[str]) -> str | None:
        for name in names:
            left = [node for node in self.fused.get(_plain(name), ()) if node not in taken]
            if len(left) == 1:
                return left[0]
        return None


def _plain(name: str) -> str:
    """A name without ONNX Runtime's additions for copies, fusions and blocked channels ("NCHWc")."""
    return re.sub(r"_token_\d+$", "", name.removeprefix("fused ")).removesuffix("_nchwc")


def compute_nodes(model: bytes) -> ComputeNodes:
    """Reads the compute nodes of a serialised ONNX model. A node without a name is named by its first output, as in engines."""
    graph = onnx.load_model_from_string(model).graph
    names = {node.name or node.output[0]: node for node in graph.node if node.op_type in COMPUTE}
    outputs = {output.name for output in graph.output}
    aliases = {node.output[0]: name for name, node in names.items() if node.output[0] in outputs}
    fused: dict[str, tuple[str, ...]] = {}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    constants = _constants(graph)
    for name, node in names.items():
        for follower in _affine_followers(node, readers, constants):
            aliases |= {alias: name for alias in (follower.name, follower.output[0]) if alias}
        for alias in _fused_names(node, readers, constants):
            fused[alias] = (*fused.get(alias, ()), name)
    return ComputeNodes(names=frozenset(names), outputs=aliases, fused=fused, weights=_weights(graph, names))


def is_node_of(node: str, record: LayerRecord) -> bool:
    """Returns True for a node of the layer's name, or of its name and a "/" before more."""
    return node == record.name or node.startswith(f"{record.name}/")


def _affine_followers(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: set[str]) -> Iterator[onnx.NodeProto]:
    """The scales and biases that follow a product and are its only readers; an engine may merge them and use their names."""
    while (follower := _only_reader(node, readers)) is not None:
        others = [tensor for tensor in follower.input if tensor != node.output[0]]
        if follower.op_type not in AFFINE or not constants.issuperset(others):
            return
        yield follower
        node = follower


def _fused_names(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]], constants: set[str]) -> Iterator[str]:
    """Outputs that a kernel of this product may have: its own, and after scales and biases those of one sum and one activation."""
    yield node.output[0]
    last = [node, *_affine_followers(node, readers, constants)][-1]
    for allowed in (frozenset({"Add"}), ACTIVATIONS):
        follower = _only_reader(last, readers)
        if follower is not None and follower.op_type in allowed:
            yield follower.output[0]
            last = follower


def _only_reader(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    nodes = readers.get(node.output[0], [])
    return nodes[0] if len(nodes) == 1 else None


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Tensors that depend on no input."""
    constants = {initializer.name for initializer in graph.initializer} | {""}
    for node in graph.node:  # ONNX keeps its nodes in topological order
        if constants.issuperset(node.input):
            constants.update(node.output)
    return constants


def _weights(graph: onnx.GraphProto, names: Mapping[str, onnx.NodeProto]) -> dict[str, Weight]:
    """The stored constant behind the second input of each compute node, dequantised or not."""
    stored = {initializer.name: initializer for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type in ("DequantizeLinear", "Cast", "Identity") and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    return {
        name: Weight(name=stored[node.input[1]].name, shape=tuple(stored[node.input[1]].dims), groups=_groups(node))
        for name, node in names.items()
        if len(node.input) > 1 and node.input[1] in stored
    }


def _groups(node: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)
