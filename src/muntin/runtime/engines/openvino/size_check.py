"""Detects models that compute floats, such as positions, from their image's sizes: in 16 bits OpenVINO would round them.

BF16 has 8 significant bits: row 517 becomes 516 or 518. With static sizes these floats are computed in float32 during compilation; with
dynamic sizes they are part of the inference (up to 0.8 standard deviations of the scores; docs/log.md).
"""

from __future__ import annotations

from typing import Any

_MOVE = frozenset({
    "Broadcast", "Concat", "Convert", "Gather", "Pad", "Reshape", "Select", "Slice", "Split", "Squeeze", "StridedSlice", "Tile",
    "Transpose", "Unsqueeze", "VariadicSplit",
})  # fmt: skip
"""Operations that only move numbers or change their type."""


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
