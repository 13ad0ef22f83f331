"""Aligning the first layers' 8-bit grids with the levels of the image's pixels.

After normalisation an image has 256 levels at equal steps. A layer that reads it on a slightly different 8-bit grid loses accuracy by
rounding, and OpenVINO 2026.4 omits the rounding on a grid within about 1 % of the pixels' step, so values are up to two levels from
training. On the pixels' own grid nothing is rounded. Pixels of which no level is 0 (HybridNet's are half a step beside it) have no such
grid; there OpenVINO omits the rounding within 0.4 %, and a slightly coarser scale is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear
from muntin.compression.rewrite import named
from muntin.models.eager import ModelInputs, watch_inputs

NEAR = 0.02
"""Maximum relative difference of a layer's scale from the pixels' step, to be set to it."""
NEAR_OFF_GRID = 0.0045
"""The same for pixels beside the grid."""
_COARSER = 127.5 / 127
"""Factor by which the extreme ones of 256 levels around 0 are on the ends of a signed grid, as calibration finds it."""


@torch.no_grad()
def align_with_pixels(model: nn.Module, images: ModelInputs) -> list[str]:
    """Set the scale of each layer that reads the image to the pixels' step, if it is within `NEAR`; return the names of these layers.

    If the pixels are beside the grid, a scale within `NEAR_OFF_GRID` is set to a coarser one. `images`: raw pixels `(B, C, H, W)`, for
    their shape; inputs of another form are no pixels, and nothing is set. Three images of one value each, 0, 1 and 255, identify the
    layers by their inputs. Signed grids only: an unsigned one without offset is removed by OpenVINO, one with a zero point is not. Costs
    six forward passes; the first three compare means, so that few inputs have to be held.
    """
    if not isinstance(images, Tensor):
        return []
    layers: dict[str, nn.Module] = dict(named(model, QuantizedConv2d, QuantizedLinear))
    plain = [torch.full_like(images[:1], value, dtype=torch.float32) for value in (0.0, 1.0, 255.0)]
    means = [_inputs(model, layers, image, mean=True) for image in plain]
    layers = {name: layer for name, layer in layers.items() if all(name in inputs for inputs in means)}
    layers = {name: layer for name, layer in layers.items() if _step(*(inputs[name] for inputs in means))[0]}
    inputs = [_inputs(model, layers, image) for image in plain]
    aligned = []
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedConv2d | QuantizedLinear)
        if any(name not in of_image for of_image in inputs) or layer.input.zero_point.dtype != torch.int8:
            continue
        step, on_grid = _step(*(of_image[name] for of_image in inputs))
        if step and abs(float(layer.input.scale) / step - 1) <= (NEAR if on_grid else NEAR_OFF_GRID):
            layer.input.scale.fill_(step if on_grid else step * _COARSER)
            aligned.append(name)
    return aligned


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, *, mean: bool = False) -> dict[str, Tensor]:
    """The first input of each layer, or its mean."""
    inputs_of: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in inputs_of:
            inputs_of[name] = inputs[0].mean(dtype=torch.float64) if mean else inputs[0].double()

    watch_inputs(model, layers, [images], watch)
    return inputs_of


def _step(black: Tensor, one: Tensor, white: Tensor) -> tuple[float, bool]:
    """The pixels' step in a layer's input, 0 if the input is not linear in the image, and whether the pixels are on a grid with a 0."""
    if black.shape != white.shape:
        return 0.0, False
    varies = white != black
    if black[~varies].any():  # zeros around the image are on every grid
        return 0.0, False
    black, one, white = black[varies], one[varies], white[varies]
    step = float((white - black).mean()) / 255 if white.numel() else 0.0
    near = 1e-3 * step
    if step <= 0 or (one - black - step).abs().max() > near or (white - black - 255 * step).abs().max() > near:
        return 0.0, False
    offset = black / step
    return step, bool((offset - offset.round()).abs().max() <= 1e-3)
