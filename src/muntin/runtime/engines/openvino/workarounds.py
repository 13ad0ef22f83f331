"""Workarounds for models that OpenVINO 2026.4 computes wrongly.

with_biases           8 bits, dynamic sizes: a product without a bias is wrong if its output has several readers, as in a residual
with_whole_masks      16 bits, static sizes: in softmax(scores + mask) a mask of one row is ignored, so padding gets attention
computes_with_sizes   16 bits, dynamic sizes: floats computed from the image's sizes, such as positions, are rounded (row 517 to 516)

docs/log.md has the errors that were measured.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from muntin.runtime.host.quiet_imports import openvino

TINY = np.float32(1e-30)
"""Value of an added bias: zeros are optimised away, and this is too small to change a float32 result."""
LARGEST_MASK = 1 << 22
"""Largest number of scores for which a mask is expanded; larger ones are not of a single window."""
_CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_WEIGHT_OPERATIONS = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "FakeQuantize")
"""Operations between a stored weight and the product."""
_MOVE = frozenset({
    "Broadcast", "Concat", "Convert", "Gather", "Pad", "Reshape", "Select", "Slice", "Split", "Squeeze", "StridedSlice", "Tile",
    "Transpose", "Unsqueeze", "VariadicSplit",
})  # fmt: skip
"""Operations that only move numbers or change their type."""


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


def with_whole_masks(model: Any) -> Any:
    """Expands masks of one row to the scores' shape, where that is static. Changes and returns the model."""
    for softmax in [op for op in model.get_ops() if op.get_type_name() == "Softmax"]:
        add = softmax.input(0).get_source_output().get_node()
        if add.get_type_name() != "Add":
            continue
        for index in (0, 1):
            mask, scores = (add.input(place).get_source_output() for place in (index, 1 - index))
            shape = _shape(scores)
            if shape is not None and _is_one_row(_shape(mask), shape) and prod(shape) <= LARGEST_MASK:
                whole = openvino.opset13.broadcast(mask, np.array(shape, np.int64))
                add.input(index).replace_source_output(whole.output(0))
    return model


def _shape(output: Any) -> tuple[int, ...] | None:
    shape = output.get_partial_shape()
    return tuple(int(side.get_length()) for side in shape) if shape.is_static else None


def _is_one_row(mask: tuple[int, ...] | None, scores: tuple[int, ...]) -> bool:
    return mask is not None and len(mask) > 0 and mask[-1] == scores[-1] > 1 and prod(mask[:-1]) == 1 < prod(scores[:-1])


def computes_with_sizes(model: Any) -> bool:
    """Returns True if floats are computed or compared that depend only on the image's sizes and constants. `model`: of free sizes."""
    from_sizes: set[str] = set()
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind == "ShapeOf":
            from_sizes.add(op.get_friendly_name())
        if kind in ("ShapeOf", "Constant", "Parameter", "Result"):
            continue
        sources = [value.get_source_output().get_node() for value in op.inputs()]
        varying = [source.get_friendly_name() for source in sources if source.get_type_name() != "Constant"]
        if varying and from_sizes.issuperset(varying):
            from_sizes.add(op.get_friendly_name())
            if kind not in _MOVE and any(value.get_element_type().is_real() for value in (*op.inputs(), *op.outputs())):
                return True
    return False
