"""Rewrites a float graph into the form that the quantiser reads; the result is the same in exact arithmetic.

fold_constants   what depends on no input becomes a constant: standardised and reparametrised weights, transposed weights
fold_norms       Conv -> BatchNormalization becomes Conv
merge_pads       Pad with zeros -> Conv becomes Conv with these pads (TensorFlow's 'same' padding at fixed sizes)
plain_linears    Gemm becomes MatMul and Add, with the weight as (I, O), which engines multiply without a transposition
flat_gathers     Gather by a table of indices becomes Gather by a list and Reshape, which OpenVINO compiles behind integers by channel
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper

from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_graph import Array, Graph, attributes, set_attributes

LARGEST_GROWTH = 1 << 16
"""Values by which a folded constant may be larger than all that it is computed from. A larger one stays computed."""
_KEPT = ("DequantizeLinear", "QuantizeLinear", "If", "Loop", "Scan")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def simplify(graph: Graph) -> None:
    """Rewrite a graph in place; see the head of this file."""
    fold_constants(graph)
    merge_pads(graph)
    fold_norms(graph)
    plain_linears(graph)
    flat_gathers(graph)


def fold_constants(graph: Graph) -> None:
    """Compute every tensor that depends on no input, in ONNX Runtime, and make it a constant."""
    sizes = {name: value.size for name, value in graph.constants.items()} | {"": 0}
    folded: list[onnx.NodeProto] = []
    for node in graph.nodes:
        random = node.op_type.startswith(("Random", "Bernoulli", "Multinomial"))
        if all(name in sizes for name in node.input) and node.op_type not in _KEPT and not random:
            folded.append(node)
            own = sum(math.prod(entry.t.dims) for entry in node.attribute) if node.op_type == "Constant" else 0
            sizes |= dict.fromkeys(node.output, own + sum(sizes[name] for name in node.input))
    if not folded:
        return
    ids = {id(node) for node in folded}
    rest = [node for node in graph.nodes if id(node) not in ids]
    read = {name for node in rest for name in node.input} | set(graph.outputs)
    names = [name for node in folded for name in node.output if name in read]
    values = _evaluate(graph, folded, names)
    arrays = {name for name, value in values.items() if isinstance(value, np.ndarray) and value.size <= sizes[name] + LARGEST_GROWTH}
    if others := values.keys() - arrays:  # a sequence, or an expanded constant, such as a mask: what makes it stays
        kept = [node for node in folded if _leads_to(graph, node, others)]
        rest = kept + rest
    graph.constants |= {name: values[name] for name in arrays}
    graph.nodes = rest
    graph.reindex()


def _leads_to(graph: Graph, node: onnx.NodeProto, tensors: Collection[str]) -> bool:
    waiting, seen = list(tensors), set()
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is node:
            return True
        if maker is not None and id(maker) not in seen:
            seen.add(id(maker))
            waiting.extend(maker.input)
    return False


def _evaluate(graph: Graph, nodes: list[onnx.NodeProto], outputs: list[str]) -> dict[str, Array]:
    if not outputs:
        return {}
    part = Graph(graph.proto())
    part.nodes = nodes
    part.outputs = []
    model = part.proto(outputs)
    del model.graph.input[:]
    del model.graph.output[: len(model.graph.output) - len(outputs)]
    return FloatRun(model, exact=True)({})


def fold_norms(graph: Graph) -> None:
    """Fold each BatchNormalization into the convolution that only it reads."""
    for norm in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        conv = graph.makers.get(norm.input[0])
        alone = graph.only_reader(norm.input[0]) is norm
        if conv is None or conv.op_type not in _CONVOLUTIONS or not alone:
            continue
        constant = all(name in graph.constants for name in (*norm.input[1:], *conv.input[1:]))
        if not constant or attributes(norm).get("training_mode", 0):
            continue
        gain, shift, mean, variance = (graph.constants[name].astype(np.float64) for name in norm.input[1:])
        factor = gain / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
        weight = graph.constants[conv.input[1]]
        bias = graph.constants[conv.input[2]] if len(conv.input) > 2 else 0.0
        name = conv.input[1]
        scaled = _times_outputs(weight.astype(np.float64), factor, conv).astype(np.float32)
        inputs = [conv.input[0], graph.constant(f"{name}/folded", scaled)]
        inputs.append(graph.constant(f"{name}/bias", ((bias - mean) * factor + shift).astype(np.float32)))
        del conv.input[:]
        conv.input.extend(inputs)
        conv.output[0] = norm.output[0]
        graph.nodes.remove(norm)
        graph.reindex()


def _times_outputs(weight: Array, factor: Array, conv: onnx.NodeProto) -> Array:
    """Scale the output channels of a weight: axis 0 of a Conv, axis 1 within each group of a ConvTranspose."""
    if conv.op_type == "Conv":
        return weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))
    groups = attributes(conv).get("group", 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:]) * factor.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))
    return grouped.reshape(weight.shape)


def merge_pads(graph: Graph) -> None:
    """Merge each constant Pad of zeros, whose only reader is a Conv, into that Conv. (More readers each merge it.)"""
    for conv in [node for node in graph.nodes if node.op_type == "Conv"]:
        pad = graph.makers.get(conv.input[0])
        if pad is None or pad.op_type != "Pad" or attributes(pad).get("mode", b"constant") != b"constant":
            continue
        pads = graph.constants.get(pad.input[1])
        value = graph.constants.get(pad.input[2], np.zeros(())) if len(pad.input) > 2 and pad.input[2] else np.zeros(())
        own = attributes(conv)
        if pads is None or value.any() or len(pad.input) > 3 or own.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            continue
        spatial = len(own.get("kernel_shape", graph.constants[conv.input[1]].shape[2:]))
        before, after = pads[: spatial + 2], pads[spatial + 2 :]
        if (pads < 0).any() or before[:2].any() or after[:2].any():
            continue
        old = np.asarray(own.get("pads", [0] * 2 * spatial))
        set_attributes(conv, own | {"auto_pad": "NOTSET", "pads": np.add(old, [*before[2:], *after[2:]]).tolist()})
        conv.input[0] = pad.input[0]
    graph.reindex()
    graph.nodes = [
        node for node in graph.nodes if node.op_type != "Pad" or node.output[0] in graph.readers or node.output[0] in graph.outputs
    ]
    graph.reindex()


def plain_linears(graph: Graph) -> None:
    """Write each Gemm with a constant weight as MatMul and Add."""
    nodes: list[onnx.NodeProto] = []
    for gemm in graph.nodes:
        own = attributes(gemm)
        weight = graph.constants.get(gemm.input[1]) if gemm.op_type == "Gemm" else None
        if weight is None or own.get("transA", 0):
            nodes.append(gemm)
            continue
        weight_IO = (weight.T if own.get("transB", 0) else weight) * np.float32(own.get("alpha", 1.0))
        name = graph.constant(f"{gemm.input[1]}/transposed", np.ascontiguousarray(weight_IO))
        biased = len(gemm.input) > 2 and bool(gemm.input[2])
        product = helper.make_node(
            "MatMul", [gemm.input[0], name], [f"{gemm.output[0]}/product" if biased else gemm.output[0]], name=gemm.name
        )
        product.metadata_props.extend(gemm.metadata_props)
        nodes.append(product)
        if biased:
            bias = graph.constants[gemm.input[2]] * np.float32(own.get("beta", 1.0)) if gemm.input[2] in graph.constants else None
            added = gemm.input[2] if bias is None else graph.constant(f"{gemm.input[2]}/scaled", bias)
            nodes.append(helper.make_node("Add", [product.output[0], added], [gemm.output[0]], name=f"{gemm.name}/bias"))
    graph.nodes = nodes
    graph.reindex()


def flat_gathers(graph: Graph) -> None:
    """Write each Gather by a table of indices, constant or computed, as a Gather by a list of them and a Reshape."""
    nodes: list[onnx.NodeProto] = []
    for gather in graph.nodes:
        indices = graph.constants.get(gather.input[1]) if gather.op_type == "Gather" else None
        listed = indices is not None and indices.ndim < 2
        if gather.op_type != "Gather" or listed or gather.input[0] in graph.constants:
            nodes.append(gather)
            continue
        (data, table), (name,) = gather.input, gather.output
        axis = attributes(gather).get("axis", 0)
        parts = [f"{name}/rows"]
        nodes.append(helper.make_node("Shape", [table], [parts[0]], name=parts[0]))
        if axis:
            nodes.append(helper.make_node("Shape", [data], [f"{name}/before"], end=axis, name=f"{name}/before"))
            parts.insert(0, f"{name}/before")
        if axis != -1:
            nodes.append(helper.make_node("Shape", [data], [f"{name}/behind"], start=axis + 1, name=f"{name}/behind"))
            parts.append(f"{name}/behind")
        whole = graph.constant(f"{name}/list", np.array([-1], np.int64))
        nodes += [
            helper.make_node("Reshape", [table, whole], [f"{name}/indices"], name=f"{name}/indices"),
            helper.make_node("Gather", [data, f"{name}/indices"], [f"{name}/flat"], axis=axis, name=f"{name}/flat"),
            helper.make_node("Concat", parts, [f"{name}/shape_of_rows"], axis=0, name=f"{name}/shape_of_rows"),
            helper.make_node("Reshape", [f"{name}/flat", f"{name}/shape_of_rows"], [name], allowzero=1, name=gather.name),
        ]
    graph.nodes = nodes
    graph.reindex()
    fold_constants(graph)
