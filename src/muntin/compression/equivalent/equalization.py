"""Cross-layer equalisation: channels between two layers are scaled so that both quantise with less error, and the answer stays the same.

    convolution -> ReLU -> convolution:   rows of the first weight / s, columns of the second one · s, for each channel s > 0

A run of the model finds the pairs: a layer whose output goes through ReLU, leaky ReLU, zero padding or nothing to one other layer. ReLU6 is
left out: channels that rest on calibration images may reach its limit on others.

Source: Nagel et al., 1906.04721, section 4.1. Deviation: a row of the first weight has a scale of its own, so the range of its outputs,
which share one grid, is balanced against the columns of the second weight (as in SmoothQuant, 2211.10438); for a depthwise second layer all
channels get one range.

Axes: C channels between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muntin.compression.equivalent.flow import RELUS, Flow, Use, called_once, record_flow
from muntin.compression.equivalent.scaling import MOST, Scaling, columns, scale
from muntin.compression.history import last_changes, remember
from muntin.compression.quantization.fake_quantization import along, quantize_weight
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, watch_inputs

_ATEN = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ScaledPair:
    """Two layers of which the second reads the first one's output."""

    first: str
    second: str


def equalize(
    model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, nn.Linear | nn.Conv2d], bits_of: Callable[[str], int]
) -> list[Change]:
    """Scale the channels between pairs of `layers`, in place, where the second one's rounding to its bits then costs less.

    Norms must be folded. A pair is kept as it was if the answer to the first batch changes by more than rounding, and a layer that was
    equalised before stays as it is. Costs two forward passes over the batches, and about 2·log2(pairs) of the first batch for each such
    pair.
    """
    done = last_changes(model, "equalize")
    pairs = [pair for pair in find_pairs(model, layers, batches[0]) if pair.second not in done]
    peaks, squares = _channel_ranges(model, {pair.second: layers[pair.second] for pair in pairs}, batches)
    factors: dict[ScaledPair, Tensor] = {}
    for pair in pairs:
        second, peak_C = layers[pair.second], peaks[pair.second]
        factor_C = _factors(second, peak_C)
        old = _rounding_error(second, torch.ones_like(peak_C), peak_C, squares[pair.second], bits_of(pair.second))
        new = _rounding_error(second, factor_C, peak_C, squares[pair.second], bits_of(pair.second))
        if new < 0.999 * old:
            factors[pair] = factor_C
    scalings = {pair: Scaling(layers[pair.first], (layers[pair.second],), factor_C) for pair, factor_C in factors.items()}
    refused = {id(one) for one in scale(model, list(scalings.values()), batches[0])}
    return remember(
        model,
        [
            Change(layer=pair.second, pass_="equalize", done=f"channels scaled with those of {pair.first}")
            for pair, scaling in scalings.items()
            if id(scaling) not in refused
        ],
    )


def find_pairs(model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], batch: ModelInputs) -> list[ScaledPair]:
    """The pairs of `layers` in one run. Layers that run more than once, or share a parameter, are in none."""
    flow = record_flow(model, layers, batch)
    alone = called_once(model, layers, flow)
    pairs = (_followed(flow, name, output) for name, output in flow.outputs.items() if name in alone)
    return [pair for pair in pairs if pair is not None and pair.second in alone and type(layers[pair.first]) is type(layers[pair.second])]


def _followed(flow: Flow, first: str, tensor: int) -> ScaledPair | None:
    position = 0
    while True:
        rest = flow.uses.get(tensor, [])[position:]
        if not rest:
            return None
        if rest[0].layer:
            return ScaledPair(first=first, second=rest[0].layer) if len(rest) == 1 else None
        in_place = rest[0].result == tensor
        if not _scalable(rest[0]) or (len(rest) != 1 and not in_place):
            return None
        tensor, position = (tensor, position + 1) if in_place else (rest[0].result, 0)


def _scalable(use: Use) -> bool:
    """Return True if an operation commutes with positive factors of channels."""
    if use.function is _ATEN.constant_pad_nd.default:
        sides, value = use.arguments[1], (*use.arguments, 0)[2]
        return value == 0 and len(sides) <= 4
    return use.function in RELUS


def _channel_ranges(
    model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], batches: Sequence[ModelInputs]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each layer: the largest magnitude and the mean square of each input channel."""
    peaks: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_CN = inputs[0].detach().float().movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1)
        peak_C, square_C = x_CN.abs().amax(1), x_CN.square().mean(1) / len(batches)
        peaks[name] = torch.maximum(peaks[name], peak_C) if name in peaks else peak_C
        squares[name] = squares[name] + square_C if name in squares else square_C

    watch_inputs(model, layers, batches, watch)
    return peaks, squares


def _factors(second: nn.Linear | nn.Conv2d, peak_C: Tensor) -> Tensor:
    """The factor of each channel: the first layer's outputs are divided by it."""
    weight = second.weight.detach().float().abs()
    groups = getattr(second, "groups", 1)
    depthwise = groups == len(peak_C)
    columns_C = weight.reshape(groups, -1, *weight.shape[1:]).movedim(2, 1).flatten(2).amax(2).flatten()
    used_C = (peak_C > 0) & (columns_C > 0)
    even_C = torch.where(used_C, peak_C if depthwise else (peak_C / columns_C).sqrt(), torch.ones_like(peak_C))
    after_C = torch.where(used_C, peak_C / even_C, torch.zeros_like(peak_C))
    factor_C = (even_C * after_C.amax() / peak_C.amax().clamp_min(torch.finfo(torch.float32).tiny)).clamp(1 / MOST, MOST)
    return torch.where(used_C, factor_C, torch.ones_like(factor_C))


def _rounding_error(second: nn.Linear | nn.Conv2d, factor_C: Tensor, peak_C: Tensor, square_C: Tensor, bits: int) -> float:
    """Expected squared error of the second layer's outputs by rounding its weight and its inputs, channels taken as independent."""
    weight = second.weight.detach().float() * columns(second, factor_C)
    q, scale_O = quantize_weight(weight, 0, bits)
    by_weight = ((q * along(scale_O, weight.ndim, 0) - weight).square() * columns(second, square_C / factor_C.square())).sum()
    step = (peak_C / factor_C).amax() / 255
    return float(by_weight + step.square() / 12 * weight.square().sum())
