"""The pass that gives weights a pattern of zeros along their inputs: 2:4, 4:8, another N:M, or blocks.

    model -> layers in the order of their calls -> saliency of each weight -> zeros, and other values for the weights that stay

Saliencies: w² ("magnitude"); w² times the second moment of the input channel ("activations": Wanda, Sun et al., 2306.11695, section 3; its
groups are compared within an output, as here); SparseGPT's, with an update of the weights that stay ("reconstruction", `columns`).

The weight of a layer changes in place, so every other pass finds the layer it knows. The layer remembers its pattern (`holding`).

Axes: O outputs, T taps of a kernel, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from muntin.compression.activation_moments import input_moments
from muntin.compression.calibration import calibration_list, check_weights, not_finite
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.equivalent.plain_convolutions import plain_convolutions
from muntin.compression.history import last_changes, remember
from muntin.compression.low_rank.factored_layers import factored_layers
from muntin.compression.quantization.dequantization import quantized_layers, through_floats
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.quantization.rounding import MAX_INPUTS
from muntin.compression.rewrite import (
    EVERY,
    call_every_layer,
    computed_weight,
    left_out,
    named,
    other_padding,
    out_of_reach,
    parameter_users,
)
from muntin.compression.sparsity.columns import InputMoments, sparsify_weight
from muntin.compression.sparsity.pattern import (
    Pattern,
    held_places,
    parse_pattern,
    pattern_of,
    set_pattern,
    sparse_layers,
    taps_first,
    taps_last,
)
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, first_row, watch_inputs

Scores = Literal["magnitude", "activations", "reconstruction"]
MOMENT_BYTES, TOGETHER = 2**29, 8
"""Bytes of moments, and number of layers, that are gathered in one pass over the batches: the layers of later passes see sparse ones."""
WeightLayer = nn.Linear | nn.Conv2d


def sparsify(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    pattern: str = "2:4",
    scores: Scores = "reconstruction",
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
) -> list[Change]:
    """Set weights of Linear and Conv2d to zero in a pattern along their inputs, in place; see the head of this file.

    `pattern`: "2:4", "4:8", "1:4", N:M with M of 2, 4, 8, 16 and N of at most M/2: of M neighbouring input channels, at each tap of a
    kernel, at most N weights are not zero. `calibration`: batches of training inputs, as in `quantize`; "reconstruction" wants some hundred
    images or some thousand tokens. `only`, `keep`: names or patterns of the layers to take, and to leave dense.

    Layers whose inputs are no multiple of M, grouped and depthwise convolutions, and layers that share their weights stay
    dense, with the reason. Closed channels are cut first. Quantised layers keep their bits. A second run with the same pattern changes
    nothing.

    Costs a forward pass for "activations"; for "reconstruction" one for every `TOGETHER` layers, moments of (I·k²)² numbers, and
    `sparsify_weight` of each layer. No CPU runtime computes faster with zeros. Raises `MuntinError` for another pattern,
    if there is no calibration batch, for NaN or infinity, if `only` or `keep` name no layer, and in quantisation-aware training.
    """
    form = parse_pattern(pattern)
    if scores not in get_args(Scores):
        raise MuntinError(f"scores={scores!r}: give {', '.join(map(repr, get_args(Scores)))}")
    check_eager(model)
    check_frozen(model)
    batches = calibration_list(calibration, model)
    if quantized_layers(model):
        return _of_integers(model, batches, form, scores, only, keep)
    layers: dict[str, WeightLayer] = dict(named(model, nn.Linear, nn.Conv2d))
    left_out(layers, only, keep)
    check_weights(layers, done="made sparse")  # raises before the model is changed
    before = [*remove_closed_channels(model.eval()), *plain_convolutions(model, first_row(batches[0]))]
    layers = dict(named(model, nn.Linear, nn.Conv2d))
    call_every_layer(model)
    reasons = _reasons(model, layers, form) | left_out(layers, only, keep)
    order, missing = _in_order(model, {name: layer for name, layer in layers.items() if name not in reasons}, batches)
    reasons |= dict.fromkeys(missing, "no calibration image reached it")
    done: dict[str, Change] = {}
    for name, change in _changed(model, {name: layers[name] for name in order}, batches, form, scores):
        done[name] = change
        set_pattern(layers[name], form)
    kept = {name: Change(layer=name, pass_="sparsify", done="kept", reason=reason) for name, reason in reasons.items()}
    changes = [(done | kept)[name] for name in layers]
    return remember(model, before + changes + out_of_reach(model, "sparsify", "sparse form here"))


def sparse_again(model: nn.Module, batches: Sequence[ModelInputs], pass_: Callable[[], list[Change]]) -> list[Change]:
    """Run a pass that cuts, refits or factors layers; layers of a sparse model that it changes, and their factors, are made sparse again.

    Costs nothing for a dense model; else `sparsify` of these layers. A layer whose sides do not fit its pattern any more becomes dense,
    with the reason.
    """
    before = {name: pattern_of(layer) for name, layer in sparse_layers(model).items()}
    changes = pass_()
    if not before:
        return changes
    lost = {name: pattern_of(layer) for name, layer in sparse_layers(model).items() if held_places(layer) is None}
    for name, factored in factored_layers(model).items():
        if name in before:
            lost |= {f"{name}.{part}": before[name] for part, _ in factored.named_children()}
    for pattern in sorted({one.text for one in lost.values() if one is not None}):
        names = [name for name, one in lost.items() if one is not None and one.text == pattern]
        again = [change for change in sparsify(model, batches, pattern=pattern, only=names) if change.layer in names]
        for change in again:
            if change.kept and held_places(layer := model.get_submodule(change.layer)) is None:
                set_pattern(layer, None)
        changes = changes + again
    return changes


def _of_integers(
    model: nn.Module, batches: Sequence[ModelInputs], form: Pattern, scores: Scores, only: Sequence[str], keep: Sequence[str]
) -> list[Change]:
    """The pass on a quantised model. Layers whose weights it leaves as they are keep their integers, and get the pattern here."""
    changes = through_floats(model, batches, lambda: sparsify(model, batches, pattern=form.text, scores=scores, only=only, keep=keep))
    layers = quantized_layers(model)
    for change in changes:
        if change.pass_ == "sparsify" and not change.kept and change.layer in layers:
            set_pattern(layers[change.layer], form)
    return changes


def _reasons(model: nn.Module, layers: Mapping[str, WeightLayer], form: Pattern) -> dict[str, str]:
    """Reasons to leave layers as they are."""
    users = parameter_users(model)
    reasons = {}
    for name, layer in layers.items():
        if pattern_of(layer) == form and held_places(layer) is not None:
            reasons[name] = f"already {form.text}"
        elif (reason := _no_form(layer, form)) is not None:
            reasons[name] = reason
        elif len(by := users[id(layer.weight)]) > 1:
            reasons[name] = f"its weight is shared by {' and '.join(by)}"
    return reasons


def _no_form(layer: WeightLayer, form: Pattern) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer).__name__} may compute something else than its kind: no sparse form"
    if (reason := computed_weight(layer)) is not None:
        return reason
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{'depthwise' if layer.groups == layer.in_channels else 'grouped'} convolution: no sparse form here"
    return other_padding(layer, "sparse form") or form.misfit(layer.weight)


def _in_order(model: nn.Module, layers: Mapping[str, WeightLayer], batches: Sequence[ModelInputs]) -> tuple[list[str], list[str]]:
    """The names of the layers in the order of their first calls, and of those that no batch reaches."""
    reached: dict[str, None] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():
            reached.setdefault(name)

    for batch in batches:
        if len(reached) < len(layers):
            watch_inputs(model, layers, [first_row(batch)], watch)
    return list(reached), [name for name in layers if name not in reached]


def _changed(
    model: nn.Module, layers: Mapping[str, WeightLayer], batches: Sequence[ModelInputs], form: Pattern, scores: Scores
) -> Iterator[tuple[str, Change]]:
    """Change the weights of layers; yield the change of each."""
    wide = {name for name, layer in layers.items() if scores == "reconstruction" and layer.weight[0].numel() > MAX_INPUTS}
    simple = layers if scores != "reconstruction" else {name: layers[name] for name in wide}
    squares: dict[str, Tensor] = {}
    if simple and scores != "magnitude":
        moments = input_moments(model, batches, simple)
        squares = {name: moment.matrix.diagonal() for name, moment in moments.items()}
    for name, layer in simple.items():
        saliency_OTI = taps_first(layer.weight.detach()).double().square()
        if name in squares:
            saliency_OTI *= squares[name].to(saliency_OTI.device)
        with torch.no_grad():
            layer.weight.masked_fill_(~taps_last(form.mask(saliency_OTI), layer.weight), 0)
        note = f"by activations: {layer.weight[0].numel()} inputs an output are more than {MAX_INPUTS}" if name in wide else ""
        yield name, Change(layer=name, pass_="sparsify", done=f"{form.text} by {'activations' if name in wide else scores}", note=note)
    if scores == "reconstruction":
        earlier = last_changes(model, "sparsify")
        for some in _together({name: layer for name, layer in layers.items() if name not in wide}):
            for name, moments_of in _gathered(model, some, batches).items():
                error, share = sparsify_weight(some[name], form, moments_of)
                measured = earlier[name].sqnr_db if name in earlier else None
                sqnr_db = -10 * math.log10(error) if error > 0 else measured
                done = f"{form.text} by reconstruction, error {share:.0%} of magnitude's"
                yield name, Change(layer=name, pass_="sparsify", done=done, sqnr_db=sqnr_db)


def _together(layers: Mapping[str, WeightLayer]) -> Iterator[dict[str, WeightLayer]]:
    """Layers in parts whose moments are gathered in one pass."""
    part: dict[str, WeightLayer] = {}
    size = 0
    for name, layer in layers.items():
        needed = 8 * layer.weight[0].numel() ** 2
        if part and (size + needed > MOMENT_BYTES or len(part) == TOGETHER):
            yield part
            part, size = {}, 0
        part[name] = layer
        size += needed
    if part:
        yield part


def _gathered(model: nn.Module, layers: Mapping[str, WeightLayer], batches: Sequence[ModelInputs]) -> dict[str, InputMoments]:
    moments = {name: InputMoments.empty(layer) for name, layer in layers.items()}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].numel():
            return
        moments[name].add(layers[name], inputs[0])
        if not torch.isfinite(moments[name].xx).all():
            raise not_finite(name, ValueError("the activation holds NaN or infinity"))

    watch_inputs(model, layers, batches, watch)
    return moments
