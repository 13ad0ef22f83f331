"""Puts the grids of products that read the image on the levels of its pixels, so that rounding changes no pixel.

OpenVINO 2026.4 omits the rounding on a signed grid within about 1 % of the pixels' step, so values would be up to two levels from the
calibrated ones. Where no pixel level is 0, it omits the rounding within 0.4 %, and a slightly coarser scale is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from muntin.graph.float_run import FloatRun
from muntin.graph.grids import ByteGrid
from muntin.graph.insertion import Grids, ProductGrids
from muntin.graph.onnx_graph import Array, Graph
from muntin.graph.products import GraphProduct

NEAR, NEAR_OFF_GRID = 0.02, 0.0045
"""Maximum relative difference of a scale from the pixels' step, to be set to it: pixels on a grid with a 0, and beside one."""
_COARSER = 127.5 / 127
_LINEAR = ("Cast", "Transpose", "Mul", "Div", "Add", "Sub", "Identity", "Reshape", "Unsqueeze", "Squeeze")


def align_with_pixels(
    graph: Graph, by_product: Grids, products: Sequence[GraphProduct], images: Mapping[str, Array]
) -> dict[str, ProductGrids]:
    """Return the grids of these products with aligned scales. `images`: one row of each input; only uint8 images have pixels."""
    if any(image.dtype != np.uint8 for image in images.values()):
        return dict(by_product)
    operands = {product.name: product.activations for product in products}
    linear = _linear_tensors(graph)
    used = sorted({name for product in by_product for name in operands[product].values() if name in linear})
    if not used:
        return dict(by_product)
    run = FloatRun(graph.proto(used))
    black, one, white = (run({name: np.full_like(x, value) for name, x in images.items()}, used) for value in (0, 1, 255))
    aligned = dict(by_product)
    for name, grids in by_product.items():
        activations = dict(grids.activations)
        for index, tensor in operands[name].items():
            if tensor in used and index in activations:
                activations[index] = _aligned(activations[index], black[tensor], one[tensor], white[tensor])
        aligned[name] = replace(grids, activations=activations)
    return aligned


def _aligned(grid: ByteGrid, black: Array, one: Array, white: Array) -> ByteGrid:
    """Return the grid on the pixels' step if it is near. The step is the same for all channels of a grid, or there is none."""
    step = float((white - black).mean(dtype=np.float64)) / 255
    if grid.unsigned or step <= 0 or max(np.abs(one - black - step).max(), np.abs(white - black - 255 * step).max()) > 1e-3 * step:
        return grid
    offset = black / step
    on_grid = bool(np.abs(offset - np.round(offset)).max() <= 1e-3)
    if abs(grid.scale / step - 1) > (NEAR if on_grid else NEAR_OFF_GRID):
        return grid
    return replace(grid, scale=step if on_grid else step * _COARSER)


def _linear_tensors(graph: Graph) -> set[str]:
    """Return the tensors that only moves, constant factors and constant terms separate from an input."""
    linear = set(graph.inputs)
    for node in graph.nodes:
        varying = [name for name in node.input if name not in graph.constants]
        if node.op_type in _LINEAR and len(varying) == 1 and varying[0] in linear:
            linear.update(node.output)
    return linear - set(graph.inputs)
