"""Biases for products without one, which OpenVINO needs to compute them correctly in 8 bits with free sizes.

With dynamic sizes OpenVINO 2026.4 computes a quantised product without a bias wrongly if its output has several readers, as of a residual
around a norm (up to one standard deviation of the scores; docs/log.md). A bias of zeros is optimised away; 1e-30 is not, and is too small
to change a float32 result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from muntin.runtime.host.quiet_imports import openvino

TINY = np.float32(1e-30)
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_WEIGHT_OPERATIONS = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "FakeQuantize")
"""Operations between a stored weight and the product."""


def with_biases(model: Any) -> Any:
    """Gives each product with a constant a bias that is not zero. Changes and returns the model."""
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
    while node.get_type_name() in _WEIGHT_OPERATIONS:
        node = node.input(0).get_source_output().get_node()
    return bool(node.get_type_name() == "Constant")


def _has_bias(readers: list[Any]) -> bool:
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return False
    added = readers[0].get_node().input(1 - readers[0].get_index()).get_source_output().get_node()
    return added.get_type_name() == "Constant" and bool(np.any(added.get_data()))
