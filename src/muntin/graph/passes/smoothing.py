"""Moves the range of single channels from the inputs of linears into their weights, before calibration.

A grid of 8 bits covers all channels of a tensor, and after a norm a few channels may be many times larger than the others. Dividing channel
j of the input by s_j, and multiplying row j of the weights by it, changes nothing in exact arithmetic. Source: SmoothQuant (Xiao et al.,
2211.10438, section 4), s_j = max|x_j|^a / max|w_j|^(1 - a), with a = 0.5.

Axes: I input channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from muntin.graph.calibration import Inputs
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_graph import Array, Graph

UNEVEN = 8.0
"""Largest over median channel range from which on an input is smoothed: below, another operation costs more than it gains."""
STRENGTH = 0.5
"""The exponent a: 1 moves all of the range into the weights."""
_LARGEST = 64.0
"""Largest factor of a channel."""


def smooth(graph: Graph, batches: Sequence[Inputs]) -> None:
    """Rewrite a graph in place; see the head of this file. Costs a run over the batches."""
    linears: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        weight = graph.constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2 and node.input[0] not in graph.constants:
            linears.setdefault(node.input[0], []).append(node)
    if not linears:
        return
    for tensor, range_I in _channel_ranges(graph, list(linears), batches).items():
        weights = [graph.constants[node.input[1]] for node in linears[tensor]]
        factor_I = _factors(range_I, np.max([np.abs(weight).max(1) for weight in weights], axis=0))
        if factor_I is not None:
            _apply(graph, tensor, linears[tensor], factor_I)
    graph.reindex()


def _channel_ranges(graph: Graph, tensors: list[str], batches: Sequence[Inputs]) -> dict[str, Array]:
    """Return the largest magnitude of each channel, the last axis."""
    reduced = Graph(graph.proto())
    outputs = {name: f"{name}~channel range" for name in tensors}
    for name, output in outputs.items():
        reduced.nodes += [
            helper.make_node("Abs", [name], [f"{name}~magnitude"]),
            helper.make_node(
                "Reshape", [f"{name}~magnitude", reduced.constant("rows", np.array([-1, _channels(graph, name)]))], [f"{name}~rows"]
            ),
            helper.make_node("ReduceMax", [f"{name}~rows", reduced.constant("first axis", np.array([0]))], [output], keepdims=0),
        ]
    run = FloatRun(reduced.proto(outputs.values()))
    largest: dict[str, Array] = {}
    for batch in batches:
        values = run(batch, list(outputs.values()))
        for name, output in outputs.items():
            largest[name] = np.maximum(largest.get(name, 0.0), values[output])
    return largest


def _channels(graph: Graph, tensor: str) -> int:
    node = next(node for node in graph.readers[tensor] if node.op_type == "MatMul" and node.input[0] == tensor)
    return int(graph.constants[node.input[1]].shape[0])


def _factors(range_I: Array, weight_I: Array) -> Array | None:
    """Return the factor of each channel, None where the ranges are even."""
    used = (range_I > 0) & (weight_I > 0)
    if not used.any() or range_I.max() < UNEVEN * np.median(range_I[used]):
        return None
    factor_I = np.ones_like(range_I)
    factor_I[used] = range_I[used] ** STRENGTH / weight_I[used] ** (1 - STRENGTH)
    factor_I[used] /= np.exp(np.log(factor_I[used]).mean())
    return factor_I.clip(1 / _LARGEST, _LARGEST).astype(np.float32)


def _apply(graph: Graph, tensor: str, linears: Sequence[onnx.NodeProto], factor_I: Array) -> None:
    for name in dict.fromkeys(node.input[1] for node in linears):
        readers = [node for node in linears if node.input[1] == name]
        scaled = graph.constant(f"{name}/smooth", graph.constants[name] * factor_I[:, None])
        for node in readers:
            node.input[1] = scaled
    norm = graph.makers.get(tensor)
    alone = len(graph.readers[tensor]) == len(linears) and tensor not in graph.outputs
    terms = norm.input[1:] if norm is not None and norm.op_type == "LayerNormalization" else ()
    if alone and terms and all(name in graph.constants and graph.constants[name].shape == factor_I.shape for name in terms):
        assert norm is not None
        for index, name in enumerate(terms, 1):
            norm.input[index] = graph.constant(f"{name}/smooth", graph.constants[name] / factor_I)
        return
    smoothed = f"{tensor}/smooth"
    graph.nodes.append(helper.make_node("Mul", [tensor, graph.constant(f"{tensor}/factor", 1 / factor_I)], [smoothed]))
    for node in linears:
        node.input[0] = smoothed
