"""Smoothing: the range of single channels moves from the inputs of Linears into their weights, and the answer stays the same.

    norm or Linear -> moves of tokens, ReLU, attention -> Linears:   outputs / s, columns of the Linears' weights · s, s > 0 for a channel

One 8-bit grid covers all channels of an input, and after a norm a few channels may be many times larger than the others. A run of the model
finds the norms, and Linears, whose output goes to Linears only. A norm whose output others read too, as a residual sum after BERT's norms,
stays as it is, and its Linears get factors before them (`input_factors`), if much is gained.

Source: SmoothQuant (Xiao et al., 2211.10438, section 4), s_j = max|x_j|^a / max|w_j|^(1 - a). Deviation: a is chosen for each norm, by the
error of the quantised Linears' outputs, also "not at all".

Axes: N rows (tokens), C channels between the layers, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from muntin.compression.equivalent.flow import RELUS, Flow, Use, called_once, record_flow
from muntin.compression.equivalent.input_factors import factor_structure, insert_factors
from muntin.compression.equivalent.scaling import MOST, Scaling, columns, scale
from muntin.compression.history import last_changes, remember
from muntin.compression.quantization.fake_quantization import along, quantize_dequantize, quantize_weight
from muntin.compression.quantization.observer import Observer
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, watch_inputs

STRENGTHS = (0.25, 0.5, 0.75)
"""Candidates of the exponent a: 1 moves all of the range into the weights."""
WORTH = 0.8
"""Largest error of smoothed layers, as a share of that without smoothing, with which a norm is smoothed."""
ROWS = 1024
"""Approximate number of rows on which the error is measured."""
_ATEN = torch.ops.aten
_MOVES = {
    _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.permute.default, _ATEN.transpose.int, _ATEN.clone.default, _ATEN.alias.default,
    _ATEN.slice.Tensor, _ATEN.select.int, _ATEN.roll.default, _ATEN.expand.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim,
    _ATEN.squeeze.dims, _ATEN.squeeze.default, _ATEN.index.Tensor, _ATEN.index_select.default, _ATEN.mean.dim, _ATEN.detach.default,
    _ATEN.constant_pad_nd.default,
}  # fmt: skip
"""Operations that may keep the channels apart; whether they do is seen by the answer."""
_MIXING = {
    _ATEN.bmm.default: 1, _ATEN._scaled_dot_product_flash_attention_for_cpu.default: 2,
    _ATEN._scaled_dot_product_flash_attention.default: 2, _ATEN._scaled_dot_product_efficient_attention.default: 2,
}  # fmt: skip
"""Operations that mix the rows of one argument, and its index."""


@dataclass(frozen=True, kw_only=True)
class SmoothedGroup:
    """A norm or a Linear, and the Linears that read its output. `alone`: False if something else reads it too."""

    source: str
    readers: tuple[str, ...]
    alone: bool = True


@dataclass
class _Inputs:
    """`peaks` `(C,)`: the largest magnitude of each channel over all batches. `rows`: some rows of each."""

    peaks: Tensor
    rows: list[Tensor] = field(default_factory=list)


def smooth(
    model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, nn.Linear], bits_of: Callable[[str], int]
) -> list[Change]:
    """Smooth the inputs of `layers`, in place, where their quantised outputs are then closer to the float ones.

    `bits_of`: the bits of a layer's weight. Returns a change for each norm or Linear that was found. One that changed the answer to the
    first batch by more than rounding is restored, and one that was smoothed before stays as it is. Costs two forward passes over the
    batches, and for each strength the product of each layer with `ROWS` rows, and its weight's rounding.
    """
    done = {name for name, change in last_changes(model, "smooth").items() if not change.kept}
    sources = {**norms(model), **layers}
    earlier = {f"{name}.linear": name for name in factor_structure(model)}
    groups = [group for group in find_groups(model, layers, batches[0]) if earlier.get(group.source, group.source) not in done]
    inputs = _inputs(model, {group.readers[0]: layers[group.readers[0]] for group in groups}, batches)
    strengths: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    for group in groups:
        if group.readers[0] in inputs and bool(torch.isfinite(inputs[group.readers[0]].peaks).all()):
            readers = {name: layers[name] for name in group.readers}
            strength, factor_C = _chosen(inputs.pop(group.readers[0]), readers, bits_of)
            if strength:
                strengths[group.source], factors[group.source] = strength, factor_C
    chosen = [group for group in groups if group.source in factors]
    scalings = {
        group.source: Scaling(sources[group.source], tuple(layers[name] for name in group.readers), factors[group.source])
        for group in chosen
        if group.alone
    }
    undone = {id(one) for one in scale(model, list(scalings.values()), batches[0])}
    refused = {name for name, scaling in scalings.items() if id(scaling) in undone}
    inserted = {group.source: group.readers for group in chosen if not group.alone}
    refused |= set(insert_factors(model, inserted, {name: factors[name] for name in inserted}, batches[0]))
    changes = []
    for group in groups:
        to = ", ".join(group.readers)
        reason = "the answer would change" if group.source in refused else ""
        if group.source not in factors:
            reason = f"the error of the quantised outputs of {to} would not be much less"
        how = f"smoothed with a strength of {strengths.get(group.source, 0):g}, {'into' if group.alone else 'by factors before'} {to}"
        changes.append(Change(layer=group.source, pass_="smooth", done="kept" if reason else how, reason=reason))
    return remember(model, changes)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without submodules whose parameters are a weight for each channel and perhaps a bias, as those of layer and RMS norms."""
    found = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        by_channel = "weight" in own and own.keys() <= {"weight", "bias"} and all(value.ndim == 1 for value in own.values())
        if by_channel and not any(True for _ in module.children()):
            found[name] = module
    return found


def find_groups(model: nn.Module, layers: Mapping[str, nn.Linear], batch: ModelInputs) -> list[SmoothedGroup]:
    """The norms and Linears of one run whose output goes to `layers` only, and the norms that `layers` read beside others.

    Modules that run more than once are in no group.
    """
    by_channel = norms(model)
    modules = {**by_channel, **layers}
    flow = record_flow(model, modules, batch)
    alone = called_once(model, modules, flow)
    groups = []
    for name, output in flow.outputs.items():
        width = len(cast(Tensor, modules[name].weight))
        if name not in alone:
            continue
        fitting = {one for one in layers if one in alone and layers[one].in_features == width}
        readers = _readers(flow, output)
        if readers and fitting.issuperset(readers):
            groups.append(SmoothedGroup(source=name, readers=readers))
        elif name in by_channel:
            direct = tuple(use.layer for use in flow.uses.get(output, []) if use.layer in fitting)
            groups += [SmoothedGroup(source=name, readers=direct, alone=False)] if direct else []
    return groups


def _readers(flow: Flow, output: int) -> tuple[str, ...] | None:
    """The layers that read a tensor or what is moved from it. None if anything else reads it."""
    readers: dict[str, None] = {}
    waiting, seen = [output], {output}
    while waiting:
        tensor = waiting.pop()
        for use in flow.uses.get(tensor, []):
            if use.layer:
                readers[use.layer] = None
            elif not _keeps_channels(use, tensor):
                return None
            elif use.result not in seen:
                seen.add(use.result)
                waiting.append(use.result)
    return tuple(readers)


def _keeps_channels(use: Use, tensor: int) -> bool:
    if use.function in _MIXING:
        index = _MIXING[use.function]
        return [id(part) == tensor for part in use.arguments[:3]] == [place == index for place in range(len(use.arguments[:3]))]
    return use.function in _MOVES or use.function in RELUS


def _inputs(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[ModelInputs]) -> dict[str, _Inputs]:
    inputs: dict[str, _Inputs] = {}
    share = -(-ROWS // len(batches))

    def watch(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        x_NC = given[0].detach().float().reshape(-1, given[0].shape[-1])
        if not len(x_NC):
            return
        peak_C = x_NC.abs().amax(0)
        known = inputs.setdefault(name, _Inputs(peak_C))
        known.peaks = torch.maximum(known.peaks, peak_C)
        known.rows.append(x_NC[:: -(-len(x_NC) // share)].clone())

    watch_inputs(model, layers, batches, watch)
    return inputs


def _chosen(inputs: _Inputs, readers: Mapping[str, nn.Linear], bits_of: Callable[[str], int]) -> tuple[float, Tensor]:
    """The strength with the least error, 0 for none, and its factors."""
    x_NC = torch.cat(inputs.rows)
    weight_C = torch.stack([reader.weight.detach().float().abs().amax(0) for reader in readers.values()]).amax(0)
    none_C = torch.ones_like(weight_C)
    best, factor_C = 0.0, none_C
    least = WORTH * _error(x_NC, none_C, readers, bits_of)
    for strength in STRENGTHS:
        candidate_C = _factors(inputs.peaks, weight_C, strength)
        error = _error(x_NC, candidate_C, readers, bits_of)
        if error < least:
            best, factor_C, least = strength, candidate_C, error
    return best, factor_C


def _factors(peak_C: Tensor, weight_C: Tensor, strength: float) -> Tensor:
    used_C = (peak_C > 0) & (weight_C > 0)
    logs_C = torch.where(used_C, strength * peak_C.log() - (1 - strength) * weight_C.log(), 0.0)
    mean = logs_C.sum() / used_C.sum().clamp_min(1)
    return torch.where(used_C, (logs_C - mean).exp().clamp(1 / MOST, MOST), 1.0)


@torch.no_grad()
def _error(x_NC: Tensor, factor_C: Tensor, readers: Mapping[str, nn.Linear], bits_of: Callable[[str], int]) -> float:
    """The squared error of the quantised readers' outputs as a share of their squares, summed over the readers."""
    scaled_NC, observer = x_NC / factor_C, Observer()
    observer.see_range(scaled_NC)
    observer.see_values(scaled_NC)
    grid = observer.grid(asymmetric=True)
    zero_point = torch.tensor(grid.zero_point, dtype=torch.uint8 if grid.unsigned else torch.int8)
    rounded_NC = quantize_dequantize(scaled_NC, torch.tensor(grid.scale), zero_point)
    total = 0.0
    for name, reader in readers.items():
        weight_OC = reader.weight.detach().float()
        q_OC, scale_O = quantize_weight(weight_OC * columns(reader, factor_C), 0, bits_of(name))
        exact_NO = x_NC @ weight_OC.T
        error = (rounded_NC @ (q_OC * along(scale_O, 2, 0)).T - exact_NO).square().sum()
        total += float(error / exact_NO.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    return total
