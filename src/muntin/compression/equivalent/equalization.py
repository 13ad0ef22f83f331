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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.compression.history import last_changes, remember
from muntin.compression.quantization.fake_quantization import along, quantize_weight
from muntin.compression.replaceability import all_same
from muntin.compression.rewrite import failing, parameter_users
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, call, tensors_of, watch_inputs

MOST = 32.0
"""Maximum factor of a channel, and its inverse the minimum."""
_ATEN = torch.ops.aten
_RELUS = {_ATEN.relu.default, _ATEN.relu_.default, _ATEN.leaky_relu.default, _ATEN.leaky_relu_.default}


@dataclass(frozen=True, kw_only=True)
class _Use:
    """One use of a tensor: by a layer, or by an operation with a result."""

    layer: str = ""
    function: Any = None
    arguments: tuple[Any, ...] = ()
    result: int = 0


@dataclass(frozen=True, kw_only=True)
class ScaledPair:
    """Two layers of which the second reads the first one's output."""

    first: str
    second: str


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Uses of each tensor in a run, by the tensor's identity, without the operations inside layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[int, list[_Use]] = {}
        self.alive: list[Any] = []
        """Keeps identities unique."""
        self.inside = 0

    def use(self, tensor: Tensor, one: _Use) -> None:
        self.alive.append(tensor)
        self.uses.setdefault(id(tensor), []).append(one)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            self.alive.append(result)
            for part in _pytree.tree_leaves((args, kwargs or {})):
                if isinstance(part, Tensor):
                    self.use(part, _Use(function=func, arguments=args, result=id(result)))
        return result


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
    with torch.no_grad():
        before = [part.clone() for part in tensors_of(call(model, batches[0]))]
    refused = failing(list(factors), lambda some: _scaled_if_same(model, some, layers, factors, batches[0], before))
    return remember(
        model,
        [
            Change(layer=pair.second, pass_="equalize", done=f"channels scaled with those of {pair.first}")
            for pair in factors
            if pair not in refused
        ],
    )


def find_pairs(model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], batch: ModelInputs) -> list[ScaledPair]:
    """The pairs of `layers` in one run. Layers that run more than once, or share a parameter, are in none."""
    flow, outputs, calls = _Flow(), {}, dict.fromkeys(layers, 0)

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
            flow.use((*inputs, *by_name.values())[0], _Use(layer=name))
            flow.inside += 1

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            flow.inside -= 1
            flow.alive.append(output)
            outputs[name] = id(output)
            calls[name] += 1

        return hook

    handles = []
    for name, layer in layers.items():
        handles += [layer.register_forward_pre_hook(before(name), with_kwargs=True), layer.register_forward_hook(after(name))]
    try:
        with torch.no_grad(), flow:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    users = parameter_users(model)
    alone = {
        name
        for name, layer in layers.items()
        if calls[name] == 1 and all(len(users[id(one)]) == 1 for one in layer.parameters(recurse=False))
    }
    pairs = (_followed(flow, name, outputs[name]) for name in outputs if name in alone)
    return [pair for pair in pairs if pair is not None and pair.second in alone and type(layers[pair.first]) is type(layers[pair.second])]


def _followed(flow: _Flow, first: str, tensor: int) -> ScaledPair | None:
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


def _scalable(use: _Use) -> bool:
    """Return True if an operation commutes with positive factors of channels."""
    if use.function is _ATEN.constant_pad_nd.default:
        sides, value = use.arguments[1], (*use.arguments, 0)[2]
        return value == 0 and len(sides) <= 4
    return use.function in _RELUS


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


def _columns(layer: nn.Linear | nn.Conv2d, factor_C: Tensor) -> Tensor:
    """The factors of input channels, in the shape of a weight: (O, I) and ones."""
    groups = getattr(layer, "groups", 1)
    outputs = layer.weight.shape[0]
    rows = factor_C.reshape(groups, 1, -1).expand(-1, outputs // groups, -1).reshape(outputs, -1)
    return rows.reshape(*rows.shape, *(1,) * (layer.weight.ndim - 2))


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
    weight = second.weight.detach().float() * _columns(second, factor_C)
    q, scale_O = quantize_weight(weight, 0, bits)
    by_weight = ((q * along(scale_O, weight.ndim, 0) - weight).square() * _columns(second, square_C / factor_C.square())).sum()
    step = (peak_C / factor_C).amax() / 255
    return float(by_weight + step.square() / 12 * weight.square().sum())


@torch.no_grad()
def _scaled_if_same(
    model: nn.Module,
    pairs: Sequence[ScaledPair],
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    factors: Mapping[ScaledPair, Tensor],
    batch: ModelInputs,
    before: Sequence[Tensor],
) -> bool:
    """Scale the pairs. Returns False, and restores the weights, if the answer changes."""
    held = {name: layers[name] for pair in pairs for name in (pair.first, pair.second)}
    kept = [(parameter, parameter.clone()) for layer in held.values() for parameter in layer.parameters(recurse=False)]
    same = False
    try:
        for pair in pairs:
            first, second = layers[pair.first], layers[pair.second]
            first.weight /= along(factors[pair], first.weight.ndim, 0).to(first.weight.dtype)
            if first.bias is not None:
                first.bias /= factors[pair].to(first.bias.dtype)
            second.weight *= _columns(second, factors[pair]).to(second.weight.dtype)
        same = all_same(before, tensors_of(call(model, batch)))
    finally:
        if not same:
            for parameter, value in kept:
                parameter.copy_(value)
    return same
