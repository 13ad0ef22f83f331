"""Biases for products that have none, so that OpenVINO computes them rightly in 8 bits where sizes are free.

OpenVINO 2026.4 computes a quantised product without a bias wrongly whose answer is read more than once, as a residual around a norm reads
it: in sessions of dynamic sizes, not in static ones (up to one standard deviation of the scores; docs/log.md). A bias of zeros is optimised
away and changes nothing; one of 1e-30 does, and is below what float32 tells apart beside any answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from muntin.runtime.quiet import openvino

TINY = np.float32(1e-30)
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_ON_THE_WAY = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "FakeQuantize")
"""What may lie between a weight as it is stored and the product."""


def with_biases(model: Any) -> Any:
    """The same model, which it changes: each product with a constant has a bias that is not zero."""
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind not in (*_CONVOLUTIONS, "MatMul") or not _is_constant(op.input(1).get_source_output().get_node()):
            continue
        output = op.output(0)
        shape, readers = output.get_partial_shape(), list(output.get_target_inputs())
        if output.get_element_type() != openvino.Type.f32 or shape.rank.is_dynamic or _has_bias(readers):
            continue
        axis = 1 if kind in _CONVOLUTIONS else len(shape) - 1
        if shape[axis].is_dynamic:
            continue
        sides = [1] * len(shape)
        sides[axis] = shape[axis].get_length()
        biased = openvino.opset13.add(output, openvino.opset13.constant(np.full(sides, TINY)))
        for reader in readers:
            reader.replace_source_output(biased.output(0))
    return model


def _is_constant(node: Any) -> bool:
    while node.get_type_name() in _ON_THE_WAY:
        node = node.input(0).get_source_output().get_node()
    return bool(node.get_type_name() == "Constant")


def _has_bias(readers: list[Any]) -> bool:
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return False
    added = readers[0].get_node().input(1 - readers[0].get_index()).get_source_output().get_node()
    return added.get_type_name() == "Constant" and bool(np.any(added.get_data()))
