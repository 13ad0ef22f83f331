"""The grid that the pixels of an image lie on already.

Behind the normalisation of a model an image still has 256 levels, one step apart. A layer that reads it on an 8-bit grid which is almost as
fine loses by rounding what it need not lose; and OpenVINO takes a grid within about 1 % of the pixels' own to be the same, and leaves the
rounding out (seen with 2026.4): each value is then up to two levels from what was trained. On the very grid of the pixels nothing is
rounded, and leaving it out changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muntin.compression.calibration import watch_inputs
from muntin.compression.quantized import QuantizedConv2d, QuantizedLinear
from muntin.compression.rewrite import named

NEAR = 0.02
"""How far, as a share, a layer's scale may be from the pixels' step to be set to it."""


@torch.no_grad()
def align_with_pixels(model: nn.Module, images: Tensor) -> list[str]:
    """Sets the scale of every layer that reads the image, and is within `NEAR` of it, to the step of the pixels; the names of these layers.

    `images`: raw pixels `(B, C, H, W)`, for their shape. Found by asking: three images of one value each, 0, 1 and 255, must come to the
    layer as values that lie on one line, and 0 as a whole number of steps. Signed grids only: without an offset OpenVINO would take the
    quantiser out of the graph, and the layer would run in float. Costs three forward passes.
    """
    layers: dict[str, nn.Module] = dict(named(model, QuantizedConv2d, QuantizedLinear))
    seen = [_inputs(model, layers, torch.full_like(images[:1], value, dtype=torch.float32)) for value in (0.0, 1.0, 255.0)]
    aligned = []
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedConv2d | QuantizedLinear)
        if any(name not in inputs for inputs in seen) or layer.input.zero_point.dtype != torch.int8:
            continue
        step = _step(*(inputs[name] for inputs in seen))
        if step is not None and abs(float(layer.input.scale) / step - 1) <= NEAR:
            layer.input.scale.fill_(step)
            aligned.append(name)
    return aligned


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(name, inputs[0].double())

    watch_inputs(model, layers, [images], watch)
    return found


def _step(black: Tensor, one: Tensor, white: Tensor) -> float | None:
    """The step of the pixels in a layer's input, or None where that is no image: not a line, or not on a grid with 0."""
    if black.shape != white.shape:
        return None
    step = float((white - black).mean()) / 255
    if step <= 0:
        return None
    near = 1e-3 * step
    line = (one - black - step).abs().max() <= near and (white - black - 255 * step).abs().max() <= near
    offset = black / step
    return step if line and (offset - offset.round()).abs().max() <= 1e-3 else None
