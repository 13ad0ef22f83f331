"""Patterns of the zeros of weights: N:M along the inputs of a layer, or blocks.

    "N:M"         at most N of M neighbours along an axis are not zero
    "block:RxC"   blocks of R rows and C columns along the first two axes, all zero or not; 1x1 is any place

An artefact stores such weights as others, zeros included: fewer bits for every weight take fewer bytes at the same accuracy.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

GROUPS = (2, 4, 8, 16)
"""Lengths of groups in which patterns are looked for."""
BLOCKS = (1, 2, 4, 8, 16, 32)
"""Sides of blocks in which patterns are looked for."""
SMALLEST_BLOCK = 8
"""Weights of a block from which on a pattern counts: smaller ones are zero by chance in weights of few bits."""
LEAST_VALUES = 256
"""Values of a weight from which on a pattern counts: fewer may have one by chance, as weights of few bits have many zeros."""


def sparsity_of(model: onnx.ModelProto) -> dict[str, str]:
    """The pattern along the inputs of each Conv, MatMul and Gemm whose constant weight has one, by the node's name: "2:4", "block:4x4".

    Weights may be quantised (DequantizeLinear). The inputs of a Conv are axis 1 of its weight, those of a product the axis that is summed.
    Grouped convolutions are left out. Costs a few passes over the weights.
    """
    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in ("DequantizeLinear", "Identity")}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        name = node.input[1]
        while name in sources and name not in constants:
            name = sources[name]
        options = {attribute.name: attribute.i for attribute in node.attribute}
        weight = constants.get(name)
        if weight is None or len(weight.dims) < 2 or options.get("group", 1) != 1:
            continue
        values = numpy_helper.to_array(weight)
        axis = 1 if node.op_type == "Conv" or options.get("transB") else len(weight.dims) - 2
        if values.size >= LEAST_VALUES and (pattern := pattern_along(values, axis)):
            found[node.name] = pattern
    return found


def pattern_along(values: NDArray[Any], axis: int) -> str:
    """The pattern of the zeros along the axis of a weight's inputs, 0 or 1; empty if there is none.

    Of N:M with N of at most M/2 the one with the smallest share; else blocks, outputs x inputs, the largest with the most zeros.
    """
    if not values.any():
        return ""
    shares = [(n / m, m, f"{n}:{m}") for at, n, m in _groups(values) if at == axis and 2 * n <= m]
    if shares:
        return min(shares)[2]
    sides = [(stored, -r * c, (r, c) if axis else (c, r)) for r, c, stored in _blocks(values) if r * c >= SMALLEST_BLOCK]
    stored, _, (outputs, inputs) = min(sides, default=(values.size, 0, (1, 1)))
    return f"block:{outputs}x{inputs}" if stored < 0.9 * values.size else ""


def _groups(values: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Axis, N and M of the patterns that hold along the first two axes, with N < M."""
    found = []
    for axis in range(min(2, values.ndim)):
        counts = (values != 0).astype(np.uint8)  # of groups of 1, then 2, 4, ...
        for m in GROUPS:
            if counts.shape[axis] % 2 or not counts.size:
                break
            even, odd = ((slice(None),) * axis + (slice(start, None, 2),) for start in (0, 1))
            counts = counts[even] + counts[odd]
            if 0 < (n := int(counts.max())) < m:
                found.append((axis, n, m))
    return found


def _blocks(values: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Rows and columns of blocks that divide the first two axes, and the values in blocks that are not all zero."""
    if values.ndim < 2:
        return []
    filled = {(1, 1): (values != 0).reshape(*values.shape[:2], -1)}  # by rows and columns: which blocks are not all zero
    for before, side in itertools.pairwise(BLOCKS):
        if values.shape[0] % side == 0:
            filled[side, 1] = _any(filled[before, 1], 0, side // before)
    for rows in [rows for rows, _ in filled]:
        for before, side in itertools.pairwise(BLOCKS):
            if values.shape[1] % side == 0:
                filled[rows, side] = _any(filled[rows, before], 1, side // before)
    return [(rows, columns, int(np.count_nonzero(blocks)) * rows * columns) for (rows, columns), blocks in filled.items()]


def _any(filled: NDArray[np.bool_], axis: int, count: int) -> NDArray[np.bool_]:
    """True where any of `count` neighbours along an axis is."""
    parts = [filled[(slice(None),) * axis + (slice(start, None, count),)] for start in range(count)]
    return functools.reduce(np.logical_or, parts)
