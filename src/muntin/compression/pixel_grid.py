"""The grid that the pixels of an image lie on already.

Behind the normalisation of a model an image still has 256 levels, one step apart. A layer that reads it on an 8-bit grid which is almost as
fine loses by rounding what it need not lose; and OpenVINO takes a grid within about 1 % of the pixels' own to be the same, and leaves the
rounding out (seen with 2026.4): each value is then up to two levels from what was trained. On the very grid of the pixels nothing is
rounded, and leaving it out changes nothing. Where the pixels lie on no grid that has a 0, half a step beside it as HybridNet's do, there is
no such grid; there it confuses what is within 0.2 %, and a slightly coarser one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from muntin.compression.calibration import watch_inputs
from muntin.compression.quantized import QuantizedConv2d, QuantizedLinear
from muntin.compression.rewrite import named

NEAR = 0.02
"""How far, as a share, a layer's scale may be from the pixels' step to be set to it."""
BESIDE = 0.0035
"""The same where the pixels lie beside the grid."""
_COARSER = 127.5 / 127
"""On such a grid the lightest and the darkest of 256 levels around 0 lie on its ends: what calibration finds for them."""


@torch.no_grad()
def align_with_pixels(model: nn.Module, images: Tensor) -> list[str]:
    """Sets the scale of every layer that reads the image, and is within `NEAR` of the pixels' step, to that step; where the pixels lie
    beside the grid, and the scale is within `BESIDE` of their step, to a coarser one. The names of these layers.

    `images`: raw pixels `(B, C, H, W)`, for their shape. Found by asking: three images of one value each, 0, 1 and 255, must come to the
    layer as values that lie on one line; they lie on the grid if 0 comes as a whole number of steps. Signed grids only: without an offset
    OpenVINO would take the quantiser out of the graph, and the layer would run in float. Costs six forward passes: the first three tell by
    the inputs' means which few layers it may be, so that the inputs of no others have to be held.
    """
    layers: dict[str, nn.Module] = dict(named(model, QuantizedConv2d, QuantizedLinear))
    plain = [torch.full_like(images[:1], value, dtype=torch.float32) for value in (0.0, 1.0, 255.0)]
    means = [_inputs(model, layers, image, mean=True) for image in plain]
    layers = {name: layer for name, layer in layers.items() if all(name in inputs for inputs in means) and _is_line(name, means)}
    seen = [_inputs(model, layers, image) for image in plain]
    aligned = []
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedConv2d | QuantizedLinear)
        if any(name not in inputs for inputs in seen) or layer.input.zero_point.dtype != torch.int8:
            continue
        step, on_grid = _step(*(inputs[name] for inputs in seen))
        if step and abs(float(layer.input.scale) / step - 1) <= (NEAR if on_grid else BESIDE):
            layer.input.scale.fill_(step if on_grid else step * _COARSER)
            aligned.append(name)
    return aligned


def _is_line(name: str, means: Sequence[Mapping[str, Tensor]]) -> bool:
    black, one, white = (float(inputs[name]) for inputs in means)
    step = (white - black) / 255
    return step > 0 and abs(one - black - step) <= 1e-3 * step


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, *, mean: bool = False) -> dict[str, Tensor]:
    """What comes to each layer the first time, or its mean."""
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in found:
            found[name] = inputs[0].mean(dtype=torch.float64) if mean else inputs[0].double()

    watch_inputs(model, layers, [images], watch)
    return found


def _step(black: Tensor, one: Tensor, white: Tensor) -> tuple[float, bool]:
    """The step of the pixels in a layer's input, and whether they lie on a grid that has a 0. Step 0 where that is no image: not a line."""
    if black.shape != white.shape:
        return 0.0, False
    step = float((white - black).mean()) / 255
    near = 1e-3 * step
    if step <= 0 or (one - black - step).abs().max() > near or (white - black - 255 * step).abs().max() > near:
        return 0.0, False
    offset = black / step
    return step, bool((offset - offset.round()).abs().max() <= 1e-3)
