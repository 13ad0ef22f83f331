"""Patterns of zeros in the weights of an ONNX model, read from the values: what an engine that takes sparse weights finds."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from muntin.artifact.sparse_packing import pattern_along

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
