"""Static quantisation by calibration, without labels: the pass that replaces Linear and Conv2d by their quantised forms.

    model -> fold -> equalise, smooth -> ranges and histograms of the inputs -> grids -> measure each layer -> round the weights -> replace

A layer gets 8 bits, then stays in 16, if its own nearest rounding, measured on calibration images, leaves less signal over noise than
`min_sqnr_db`, or if it has no integer form; its name or position does not matter. Weights are rounded to nearest, or by reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from muntin.compression.history import checked, last_changes, remember
from muntin.compression.quantization.embeddings import TableBits, check_tables, quantize_tables, tables
from muntin.compression.quantization.fake_quantization import Scales, round_to_half, sqnr_db, weight_scale
from muntin.compression.quantization.observer import ActivationGrid, Observer
from muntin.compression.quantization.pixel_grid import align_with_pixels
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
from muntin.models.eager import ModelInputs, batch_rows, check_eager, watch_inputs
from muntin.training.config import QuantizationConfig

Rounding = Literal["nearest", "reconstruction"]
BIAS_ROWS = 64
"""About the rows on which mean errors are measured: more cost more time, and means hardly change."""
PERCENTILE = 99.99
"""Percentile of the magnitudes at which activation grids end with `scales="percentile"`."""


def quantize(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    bits: Bits = 8,
    scales: Scales = "mse",
    rounding: Rounding | None = None,
    equalize: bool | None = None,
    smooth: bool = True,
    correct_bias: bool = True,
    steps: int = 0,
    min_sqnr_db: float = 15.0,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
    embedding_bits: TableBits | None = None,
) -> list[Change]:
    """Quantise Linear and Conv2d to integers, in place: weights of 2 to 8 bits, 8-bit inputs; see the head of this file.

    `calibration`: batches of training inputs: a tensor `(B, C, H, W)` of raw pixels, of any integer or float type, or several inputs as a
    tuple or dictionary. A DataLoader of (x, y) serves as well: labels are dropped where the model's forward has one parameter, and a
    forward with two required parameters gets both. Of a DataLoader the first 512 rows are read; of a list all. `only`, `keep`: names or
    patterns of the layers to quantise, and to leave in 16 bits.

    `bits`: of the weights; or their average, such as 4.3, for which layers get whole bits so that the answer changes least; or bits by name
    or pattern, of which the last that fits counts, and layers that none names get 8. `scales`: least squared error (at 8 bits weights go to
    their peak), "minmax", or "percentile". `rounding`, `equalize`: by default, a model whose layers all get 8 bits is rounded to nearest,
    and another one is equalised (`equalization`) and rounded by `reconstruct`. `correct_bias`: biases take over the mean error.
    `smooth`: the range of single channels moves from the outputs of norms into the Linears that read them, where that helps (`smoothing`).
    `steps`: of training of each block after reconstruction.
    `embedding_bits`: 2 to 8 for the tables of embeddings (`embeddings.quantize_tables`), or by name; None to leave them as they are.

    Costs three forward passes over the batches, and three of one row, and those of `reconstruct`. Closed channels are cut, norms and gates
    folded. Weights of layers that stay are rounded to the FP16 in which they are stored. A second run changes nothing: a layer keeps its
    form, and its measured signal over noise. Raises `MuntinError` like `prepare`, for a model in quantisation-aware training, and for
    quantised layers of other `bits`.
    """
    config = checked(QuantizationConfig, min_sqnr_db=min_sqnr_db)
    _check_choice("scales", scales, get_args(Scales))
    _check_choice("rounding", rounding, (None, *get_args(Rounding)))
    check_eager(model)
    check_frozen(model)
    before = quantized_operations(model)
    layers = {**keepable(model), **before}
    average, width_of = average_of(bits), requested_widths(bits, layers)
    if average is None:
        check_same(before, width_of, last_changes(model, "quantize"), only, keep)
    narrow = any(width_of(name) < 8 for name in layers)
    rounding = rounding or ("reconstruction" if narrow else "nearest")
    equalized = width_of if not before and (narrow if equalize is None else equalize) else None
    smoothed = width_of if smooth else None
    if embedding_bits is not None:
        check_tables(model, embedding_bits)
    named_too = before if embedding_bits is None else {**before, **tables(model)}
    ready = prepare(model, calibration, only=only, keep=keep, done=named_too, cut=True, equalized=equalized, smoothed=smoothed)
    free = {name: layer for name, layer in ready.operations.items() if name not in ready.reasons}
    grids = {name: _grid(layer, ready.observed[name][0], scales) for name, layer in free.items()}
    if average is not None:
        widths = chosen_widths(model, free, lambda name, width: _form(free[name], grids[name], width, scales), average, ready.batches)
        width_of = widths.__getitem__
    chosen, sqnr, reasons = _choose(model, free, grids, width_of, scales, ready.batches, config.min_sqnr_db, centred=correct_bias)
    changes = [*ready.changes, *already_quantized(before)]
    for name, layer in ready.operations.items():
        reason = ready.reasons.get(name, reasons.get(name, ""))
        if name not in chosen:
            round_to_half(layer)
        done = f"W{chosen[name].bits}A8" if name in chosen else "kept"
        changes.append(Change(layer=name, pass_="quantize", done=done, reason=reason, sqnr_db=sqnr.get(name)))
    for other in others(model).values():
        round_to_half(other)
    if embedding_bits is not None:
        changes += quantize_tables(model, ready.batches[0], embedding_bits, min_sqnr_db=config.min_sqnr_db, only=only, keep=keep)
    for name, form in chosen.items():
        replace(model, name, form)
    if chosen:
        align_with_pixels(model, ready.batches[0])
    if chosen and (rounding == "reconstruction" or correct_bias):
        columns = rounding == "reconstruction"
        weights = {name: free[name] for name in chosen}
        changes += _reconstruct(model, weights, chosen, ready.batches, columns=columns, correct_bias=correct_bias, steps=steps * columns)
    return remember(model, changes + out_of_reach(model, "quantize", "integer form"))


def _check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise MuntinError(f"{argument}={value!r}: give {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")


def _grid(layer: nn.Module, observer: Observer, scales: Scales) -> ActivationGrid:
    """The grid of a layer's inputs. A Linear has no padding with zeros, so it may have a zero point."""
    percentile = {"mse": None, "minmax": 100.0, "percentile": PERCENTILE}[scales]
    return observer.grid(percentile, asymmetric=isinstance(layer, nn.Linear))


def _choose(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    grids: Mapping[str, ActivationGrid],
    width_of: WidthOf,
    scales: Scales,
    batches: Sequence[ModelInputs],
    min_sqnr_db: float,
    *,
    centred: bool,
) -> tuple[dict[str, QuantizedLayer], dict[str, float], dict[str, str]]:
    """Integer forms, rounded to nearest, of layers that lose little enough in their bits or in 8; measurements; reasons for more bits."""
    earlier = last_changes(model, "quantize")
    measured = {name: change.sqnr_db for name in layers if (change := earlier.get(name)) is not None and change.sqnr_db is not None}
    forms: dict[str, QuantizedLayer] = {}
    sqnr: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for wide in (False, True):
        tried = {name: 8 if wide else width_of(name) for name in layers if name not in forms and (not wide or width_of(name) < 8)}
        made = {name: _form(layers[name], grids[name], width, scales) for name, width in tried.items()}
        sqnr |= _measure(model, {name: layers[name] for name in made if name not in measured}, made, batches, centred=centred)
        sqnr |= {name: measured[name] for name in made if name in measured}
        for name, form in made.items():
            if sqnr.get(name, float("inf")) >= min_sqnr_db:
                forms[name] = form
            else:
                lost = f"{tried[name]} bits leave {sqnr[name]:.1f} dB of signal over noise, less than {min_sqnr_db:g}"
                reasons[name] = f"{lost}: {'16 bits' if tried[name] == 8 else '8 bits'}"
    return forms, sqnr, reasons


def _form(layer: nn.Module, grid: ActivationGrid, bits: int, scales: Scales) -> QuantizedLayer:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return quantized_form(layer, grid, bits=bits, scale=weight_scale(layer.weight, 0, bits, scales))


def _reconstruct(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    forms: Mapping[str, QuantizedLayer],
    batches: Sequence[ModelInputs],
    *,
    columns: bool,
    correct_bias: bool,
    steps: int,
) -> list[Change]:
    """Replace integer forms that are rounded to nearest by those that reconstruction of the float layers gives.

    Without `columns`, on about `BIAS_ROWS` rows, in batches from the whole calibration.
    """
    if not columns:
        batches = batches[:: max(1, sum(map(batch_rows, batches)) // BIAS_ROWS)]
    training: dict[str, QATLinear | QATConv2d] = {}
    for name, form in forms.items():
        layer = layers[name]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        kind = QATConv2d if isinstance(layer, nn.Conv2d) else QATLinear
        training[name] = kind(layer, form.input.grid(), form.bits, form.weight_scale)
        replace(model, name, training[name])
    changes = reconstruct(model, training, batches, columns=columns, correct_bias=correct_bias, steps=steps)
    for name, one in training.items():
        replace(model, name, one.frozen())
    return [change for change in changes if columns or change.kept]


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Mapping[str, QuantizedLayer], batches: Sequence[ModelInputs], *, centred: bool
) -> dict[str, float]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it.

    `centred`: without the mean of each channel's error, which a bias will take over.
    """
    measured: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in measured:
            return
        exact, rounded = type(layer).forward(layer, inputs[0]), forms[name](inputs[0])
        if centred and forms[name].bias is not None:
            channels = exact.ndim - 1 if isinstance(layer, nn.Linear) else 1
            error = rounded - exact
            rounded = rounded - error.mean([axis for axis in range(exact.ndim) if axis != channels], keepdim=True)
        measured[name] = sqnr_db(exact, rounded)

    for batch in batches:
        if measured.keys() != layers.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured
