"""Moves the range of single channels from the inputs of linears into their weights, before calibration.

A grid of 8 bits covers all channels of a tensor, and after a norm a few channels may be many times larger than the others. Dividing channel
j of the input by s_j, and multiplying row j of the weights by it, changes nothing in exact arithmetic. Source: SmoothQuant (Xiao et al.,
2211.10438, section 4), s_j = max|x_j|^a / max|w_j|^(1 - a). Deviation: a is chosen for each tensor, by the error of the quantised linears'
outputs, also "not at all".

Axes: N rows, I input channels, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from muntin.graph.calibration import Inputs, output_shapes
from muntin.graph.float_run import FloatRun
from muntin.graph.grids import ByteGrid, RangeObserver, quantize_weight, weight_scale
from muntin.graph.onnx_graph import Array, Graph

UNEVEN = 2.0
"""Largest over median channel range from which on an input may be smoothed."""
STRENGTHS = (0.5, 0.75, 0.95)
"""Candidates of the exponent a: 1 moves all of the range into the weights."""
WORTH = 0.8
"""Largest error of smoothed linears, as a share of that without, with which a tensor is smoothed: it may cost an operation."""
ROWS = 1024
"""Approximate number of rows on which the error is measured."""
LEAST_SIGNAL = 1e-3
"""Least square that the error of a row is divided by, as a share of the rows' mean."""
_LARGEST = 32.0
"""Largest factor of a channel."""


@dataclass
class _Channels:
    """`ranges` `(I,)`: the largest magnitude of each channel. `rows` `(N, I)`: some rows."""

    ranges: Array
    rows: Array


def smooth(graph: Graph, batches: Sequence[Inputs], *, rounded: Collection[str] = ()) -> None:
    """Rewrite a graph in place; see the head of this file. `rounded`: names of products whose weights are rounded already.

    Costs a run over the batches, and for each strength the product of each uneven linear with `ROWS` rows.
    """
    linears: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        weight = graph.constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2 and weight.dtype.kind == "f" and node.input[0] not in graph.constants:
            linears.setdefault(node.input[0], []).append(node)
    linears = {tensor: nodes for tensor, nodes in linears.items() if not any(node.name in rounded for node in nodes)}
    if not linears:
        return
    for tensor, channels in _channels(graph, list(linears), batches).items():
        factor_I = _chosen(channels, [graph.constants[node.input[1]] for node in linears[tensor]])
        if factor_I is not None:
            _apply(graph, tensor, linears[tensor], factor_I)
    graph.reindex()


def _channels(graph: Graph, tensors: list[str], batches: Sequence[Inputs]) -> dict[str, _Channels]:
    """Return the ranges of the channels, the last axis, over the batches, and rows evenly from all of them."""
    shapes = output_shapes(graph, tensors, batches[0])
    reduced = Graph(graph.proto())
    for name in tensors:
        width = shapes[name][-1]
        count = math.prod(shapes[name][:-1])
        step = max(1, count * len(batches) // ROWS)
        while math.gcd(step, count) > 1:  # a step that divides a row's tokens would see the same ones of each row
            step += 1
        rows = reduced.constant("rows", np.array([-1, width]))
        first, last, axis = (reduced.constant("slice", np.array([value])) for value in (0, np.iinfo(np.int64).max, 0))
        reduced.nodes += [
            helper.make_node("Reshape", [name, rows], [f"{name}~all rows"]),
            helper.make_node("Abs", [f"{name}~all rows"], [f"{name}~magnitude"]),
            helper.make_node("ReduceMax", [f"{name}~magnitude", axis], [f"{name}~range"], keepdims=0),
            helper.make_node(
                "Slice", [f"{name}~all rows", first, last, axis, reduced.constant("step", np.array([step]))], [f"{name}~rows"]
            ),
        ]
    outputs = [f"{name}~{end}" for name in tensors for end in ("range", "rows")]
    run = FloatRun(reduced.proto(outputs))
    seen = [run(batch, outputs) for batch in batches]
    return {
        name: _Channels(np.max([one[f"{name}~range"] for one in seen], axis=0), np.concatenate([one[f"{name}~rows"] for one in seen]))
        for name in tensors
    }


def _chosen(channels: _Channels, weights_IO: Sequence[Array]) -> Array | None:
    """Return the factors with the least error, None for none."""
    range_I, weight_I = channels.ranges, np.max([np.abs(weight).max(1) for weight in weights_IO], axis=0)
    used_I = (range_I > 0) & (weight_I > 0)
    if not used_I.any() or not np.isfinite(range_I).all() or range_I.max() < UNEVEN * np.median(range_I[used_I]):
        return None
    best, least = None, WORTH * _error(channels.rows, np.ones_like(range_I), weights_IO)
    for strength in STRENGTHS:
        factor_I = np.ones_like(range_I)
        factor_I[used_I] = range_I[used_I] ** strength / weight_I[used_I] ** (1 - strength)
        factor_I[used_I] /= np.exp(np.log(factor_I[used_I]).mean())
        factor_I = factor_I.clip(1 / _LARGEST, _LARGEST).astype(np.float32)
        error = _error(channels.rows, factor_I, weights_IO)
        if error < least:
            best, least = factor_I, error
    return best


def _error(rows_NI: Array, factor_I: Array, weights_IO: Sequence[Array]) -> float:
    """Return the squared error of the quantised linears' outputs as a share of their squares, the mean over rows, summed over the linears.

    Rows count alike: a norm that follows divides each by its own size, and a few tokens may have most of the squares.
    """
    scaled_NI, observer = rows_NI / factor_I, RangeObserver()
    observer.see_range(float(scaled_NI.min()), float(scaled_NI.max()))
    observer.see_values(scaled_NI)
    rounded_NI = _rounded(scaled_NI, observer.grid())
    total = 0.0
    for weight_IO in weights_IO:
        scaled_IO = weight_IO * factor_I[:, None]
        scale_O = weight_scale(scaled_IO, 1)
        exact_NO = rows_NI @ weight_IO
        error_NO = rounded_NI @ (quantize_weight(scaled_IO, 1, scale_O, 8) * scale_O) - exact_NO
        signal_N = np.square(exact_NO).sum(1)
        total += float((np.square(error_NO).sum(1) / np.maximum(signal_N, max(LEAST_SIGNAL * float(signal_N.mean()), 1e-30))).mean())
    return total


def _rounded(x: Array, grid: ByteGrid) -> Array:
    low, high = grid.levels
    rounded: Array = (np.round(x / grid.scale).clip(low, high) * grid.scale).astype(np.float32)
    return rounded


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
