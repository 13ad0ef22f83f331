"""Patterns of the zeros of weights, N:M: at most N of M neighbours along the inputs of a layer are not zero.

An artefact stores such weights as others, zeros included: fewer bits for every weight take fewer bytes at the same accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

GROUPS = (2, 4, 8, 16)
"""Lengths of groups in which patterns are looked for."""
LEAST_VALUES = 256
"""Values of a weight from which on a pattern counts: fewer may have one by chance, as weights of few bits have many zeros."""


def sparsity_of(model: onnx.ModelProto) -> dict[str, str]:
    """The pattern along the inputs of each Conv, MatMul and Gemm whose constant weight has one, by the node's name: "2:4".

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
    """The pattern of the zeros along the axis of a weight's inputs, N of at most M/2, with the smallest share; empty if there is none."""
    if not values.any():
        return ""
    counts, found = (np.moveaxis(values, axis, 0) != 0).astype(np.uint8), []  # of groups of 1, then 2, 4, ...
    for m in GROUPS:
        if len(counts) % 2:
            break
        counts = counts[::2] + counts[1::2]
        if 2 * (n := int(counts.max())) <= m:
            found.append((n / m, m, f"{n}:{m}"))
    return min(found)[2] if found else ""
