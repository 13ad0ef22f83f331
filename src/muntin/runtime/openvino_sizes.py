"""Whether a model computes with its image's sizes in floats, as positions do: in 16 bits OpenVINO would round them.

BF16 has 8 bits of a number: of a row of 517 it knows that it is one of 516 or 518. With static sizes all that follows from them is computed
while the model is compiled, in float32; with dynamic sizes it is part of the inference (up to 0.8 standard deviations of the scores;
docs/log.md).
"""

from __future__ import annotations

from typing import Any

_MOVE = frozenset({
    "Broadcast", "Concat", "Convert", "Gather", "Pad", "Reshape", "Select", "Slice", "Split", "Squeeze", "StridedSlice", "Tile",
    "Transpose", "Unsqueeze", "VariadicSplit",
})  # fmt: skip
"""What hands numbers on, each rounded once at the most, as every number of a layer is."""


def computes_with_sizes(model: Any) -> bool:
    """True where floats are computed, or compared, that come from nothing but the sizes of the image and constants. `model`: of free
    sizes."""
    known: set[str] = set()
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind == "ShapeOf":
            known.add(op.get_friendly_name())
        if kind in ("ShapeOf", "Constant", "Parameter", "Result"):
            continue
        sources = [value.get_source_output().get_node() for value in op.inputs()]
        varying = [source.get_friendly_name() for source in sources if source.get_type_name() != "Constant"]
        if varying and known.issuperset(varying):
            known.add(op.get_friendly_name())
            if kind not in _MOVE and any(value.get_element_type().is_real() for value in (*op.inputs(), *op.outputs())):
                return True
    return False
