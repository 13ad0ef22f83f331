"""Bits and rounding of weights after training, without labels: the pass that replaces Linear and Conv2d by their integer forms.

    model -> fold -> bits of each layer -> measure each layer -> round weights of fewer than 8 bits -> replace

Export calibrates the inputs of the layers, and rounds the weights of 8 bits. A layer gets 8 bits if its own nearest rounding to fewer,
measured on calibration inputs, leaves less signal over noise than `min_sqnr_db`; its name or position does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from muntin.compression.history import ALREADY, checked, last_changes, remember, remember_calibration
from muntin.compression.quantization.embeddings import TableBits, check_tables, quantize_tables, tables
from muntin.compression.quantization.fake_quantization import Scales, round_to_half, sqnr_db, weight_scale
from muntin.compression.quantization.preparation import prepare
from muntin.compression.quantization.qat import QATConv2d, QATLinear, check_frozen
from muntin.compression.quantization.quantized_layers import (
    QuantizedLayer,
    already_quantized,
    quantized_form,
    quantized_operations,
)
from muntin.compression.quantization.reconstruction import reconstruct
from muntin.compression.quantization.widths import Bits, WidthOf, average_of, check_same, chosen_widths, requested_widths
from muntin.compression.rewrite import EVERY, keepable, others, out_of_reach, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, watch_inputs
from muntin.training.config import QuantizationConfig

Rounding = Literal["nearest", "reconstruction"]
WIDEST = 8
"""Bits of a weight that export rounds itself: it also corrects the biases for them."""


def quantize(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    bits: Bits = 8,
    scales: Scales = "mse",
    rounding: Rounding = "reconstruction",
    min_sqnr_db: float = 15.0,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
    embedding_bits: TableBits | None = None,
) -> list[Change]:
    """Choose the bits of the weights of Linear and Conv2d, and round those of 2 to 7 bits, in place; see the head of this file.

    `muntin.export` does the rest: it rounds weights of 8 bits, and the inputs of all these layers to 8 bits, on grids that it calibrates
    with its `calibration`, or with the batches given here, which the model and its copies keep until it is saved. Layers that are kept
    here stay in floats there. For 8 bits everywhere, `muntin.export` with the float model and `calibration` is enough.

    `calibration`: batches of training inputs: a tensor `(B, C, H, W)` of raw pixels, of any integer or float type, or several inputs as a
    tuple or dictionary. A DataLoader of (x, y) serves as well: labels are dropped where the model's forward has one parameter, and a
    forward with two required parameters gets both. Of a DataLoader the first 512 rows are read; of a list all. `only`, `keep`: names or
    patterns of the layers to quantise, and to leave in 16 bits.

    `bits`: of the weights; or their average, such as 4.3, for which layers get whole bits so that the answer changes least; or bits by name
    or pattern, of which the last that fits counts, and layers that none names get 8. `scales`: of rounded weights: least squared error,
    "minmax", or "percentile". `rounding`: of weights, to nearest or by `reconstruct`.
    `embedding_bits`: 2 to 8 for the tables of embeddings (`embeddings.quantize_tables`), or by name; None to leave them as they are.

    Costs three forward passes over the batches, and three of one row, and those of `reconstruct`. Closed channels are cut, norms and gates
    folded. Weights of layers that are kept are rounded to the FP16 in which they are stored. A second run changes nothing: a layer keeps
    its form, and its measured signal over noise. Raises `MuntinError` like `prepare`, for a model in quantisation-aware training, and for
    quantised layers of other `bits`.
    """
    config = checked(QuantizationConfig, min_sqnr_db=min_sqnr_db)
    _check_choice("scales", scales, get_args(Scales))
    _check_choice("rounding", rounding, get_args(Rounding))
    check_eager(model)
    check_frozen(model)
    before = quantized_operations(model)
    layers = {**keepable(model), **before}
    average, width_of = average_of(bits), requested_widths(bits, layers)
    earlier = last_changes(model, "quantize")
    if average is None:
        check_same(before, width_of, earlier, only, keep)
    if embedding_bits is not None:
        check_tables(model, embedding_bits)
    named_too = before if embedding_bits is None else {**before, **tables(model)}
    ready = prepare(model, calibration, only=only, keep=keep, done=named_too, cut=True)
    free = {name: layer for name, layer in ready.operations.items() if name not in ready.reasons}
    if average is not None:
        widths = chosen_widths(model, free, lambda name, width: _form(free[name], width, scales), average, ready.batches)
        width_of = widths.__getitem__
    chosen, sqnr, reasons = _choose(model, free, width_of, scales, ready.batches, config.min_sqnr_db)
    changes = [*ready.changes, *already_quantized(before)]
    for name, layer in ready.operations.items():
        reason = ready.reasons.get(name, reasons.get(name, ""))
        done = f"W{chosen[name].bits if name in chosen else WIDEST}A8"
        if name in ready.reasons:
            round_to_half(layer)
            done = "kept"
        elif name in earlier and earlier[name].done == done:
            done, reason = "kept", f"{ALREADY}{done}"
        changes.append(Change(layer=name, pass_="quantize", done=done, reason=reason, sqnr_db=sqnr.get(name)))
    for other in others(model).values():
        round_to_half(other)
    if embedding_bits is not None:
        changes += quantize_tables(model, ready.batches[0], embedding_bits, min_sqnr_db=config.min_sqnr_db, only=only, keep=keep)
    for name, form in chosen.items():
        replace(model, name, form)
    if chosen and rounding == "reconstruction":
        changes += _reconstruct(model, {name: free[name] for name in chosen}, chosen, ready.batches)
    remember_calibration(model, ready.batches)
    return remember(model, changes + out_of_reach(model, "quantize", "integer form"))


def _check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise MuntinError(f"{argument}={value!r}: give {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")


def _choose(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    width_of: WidthOf,
    scales: Scales,
    batches: Sequence[ModelInputs],
    min_sqnr_db: float,
) -> tuple[dict[str, QuantizedLayer], dict[str, float], dict[str, str]]:
    """Integer forms of fewer than 8 bits, rounded to nearest, of layers that lose little enough; measurements; reasons for 8 bits."""
    earlier = last_changes(model, "quantize")
    measured = {name: change.sqnr_db for name in layers if (change := earlier.get(name)) is not None and change.sqnr_db is not None}
    made = {name: _form(layer, width_of(name), scales) for name, layer in layers.items() if width_of(name) < WIDEST}
    sqnr = _measure(model, {name: layers[name] for name in made if name not in measured}, made, batches)
    sqnr |= {name: measured[name] for name in made if name in measured}
    noisy = {name for name in made if sqnr.get(name, float("inf")) < min_sqnr_db}
    reasons = {
        name: f"{made[name].bits} bits leave {sqnr[name]:.1f} dB of signal over noise, less than {min_sqnr_db:g}: {WIDEST} bits"
        for name in noisy
    }
    return {name: form for name, form in made.items() if name not in noisy}, sqnr, reasons


def _form(layer: nn.Module, bits: int, scales: Scales) -> QuantizedLayer:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return quantized_form(layer, bits=bits, scale=weight_scale(layer.weight, 0, bits, scales))


def _reconstruct(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Mapping[str, QuantizedLayer], batches: Sequence[ModelInputs]
) -> list[Change]:
    """Replace integer forms that are rounded to nearest by those that reconstruction of the float layers gives."""
    training: dict[str, QATLinear | QATConv2d] = {}
    for name, form in forms.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        kind = QATConv2d if isinstance(layer, nn.Conv2d) else QATLinear
        training[name] = kind(layer, None, form.bits, form.weight_scale)
        replace(model, name, training[name])
    changes = reconstruct(model, training, batches)
    for name, one in training.items():
        replace(model, name, one.frozen())
    return changes


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Mapping[str, QuantizedLayer], batches: Sequence[ModelInputs]
) -> dict[str, float]:
    """Signal over noise of each layer's output when its weight alone is rounded, on the first calibration batch that reaches it.

    Without the mean of each channel's error, which a bias takes over.
    """
    measured: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in measured:
            return
        exact, rounded = type(layer).forward(layer, inputs[0]), forms[name](inputs[0])
        if forms[name].bias is not None:
            channels = exact.ndim - 1 if isinstance(layer, nn.Linear) else 1
            error = rounded - exact
            rounded = rounded - error.mean([axis for axis in range(exact.ndim) if axis != channels], keepdim=True)
        measured[name] = sqnr_db(exact, rounded)

    for batch in batches:
        if measured.keys() != layers.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured
