"""Static INT8 quantisation by calibration: the pass that replaces Linear and Conv2d by their quantised forms.

    model -> fold -> run calibration images twice (ranges, then histograms) -> choose grids -> measure each layer -> replace

A layer stays in 16 bits if its own quantisation, measured on calibration images, leaves less signal over noise than `min_sqnr_db`, or if
it has no integer form; its name or position does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from muntin.compression.batch_norm import fold_batch_norms
from muntin.compression.calibration import calibration_list, check_weights, observe, watch_inputs
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.fold import fold
from muntin.compression.quantization.fake_quantization import round_to_half, sqnr_db
from muntin.compression.quantization.observer import Observer
from muntin.compression.quantization.pixel_grid import align_with_pixels
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, no_integer_form
from muntin.compression.replaceability import irreplaceable
from muntin.compression.rewrite import (
    UNUSUAL,
    WHOLE_MODEL,
    Pass,
    call_every_layer,
    check_kept,
    computes_as_usual,
    is_kept,
    keepable,
    named,
    number_paddings,
    others,
    out_of_reach,
    replace,
)
from muntin.models.compression_record import Change
from muntin.models.eager import check_eager
from muntin.training.config import QuantizationConfig


def quantized_form(layer: nn.Module, observer: Observer) -> QuantizedLayer | str:
    """The quantised layer, or the reason why there is none."""
    if (reason := no_integer_form(layer, observer)) is not None:
        return reason
    return QuantizedConv2d(layer, observer.grid()) if isinstance(layer, nn.Conv2d) else QuantizedLinear(layer, observer.grid())  # type: ignore[arg-type]


def _measure(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Tensor], candidates: dict[str, QuantizedLayer]
) -> dict[str, float | None]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it.

    None for a layer that does not compute what its kind does.
    """
    measured: dict[str, float | None] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in candidates and name not in measured:
            usual = computes_as_usual(layer, inputs[0])
            measured[name] = sqnr_db(type(layer).forward(layer, inputs[0]), candidates[name](inputs[0])) if usual else None

    for batch in batches:
        if measured.keys() != candidates.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured


def quantize(calibration: Iterable[Tensor], config: QuantizationConfig | None = None) -> Pass:
    """A pass that quantises Linear and Conv2d to static INT8 (W8A8) in place; see the head of this file.

    `calibration`: input batches `(B, C, H, W)` of raw pixels, any integer or float type; images of training, never of a test. Costs three
    forward passes over them, and three of one image. The pass first cuts closed channels and folds norms and gates. Weights of layers that
    stay are rounded to the FP16 in which they are stored. Raises `MuntinError` if there is no calibration batch, for NaN or
    infinity, or if `keep` names no layer.
    """
    config = config or QuantizationConfig()

    def pass_(model: nn.Module) -> list[Change]:
        check_eager(model)
        check_frozen(model)
        batches = calibration_list(calibration)
        check_kept(config.keep, keepable(model))
        check_weights(dict(named(model, nn.Linear, nn.Conv2d)))  # raises before the model is changed
        changes = remove_closed_channels(model.eval()) + number_paddings(model)
        layers: dict[str, nn.Module] = dict(named(model, nn.Linear, nn.Conv2d))
        changes += fold(model) + fold_batch_norms(model, batches[0])
        check_weights(layers)
        return changes + _replace_layers(model, layers, batches, config) + out_of_reach(model, "quantize", "integer form")

    return pass_


def _replace_layers(model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Tensor], config: QuantizationConfig) -> list[Change]:
    call_every_layer(model)
    fixed = irreplaceable(model, layers, batches[0][:1])
    observed = observe(model, {name: layer for name, layer in layers.items() if name not in fixed}, batches)
    forms = {name: fixed[name] if name in fixed else quantized_form(layer, observed[name][0]) for name, layer in layers.items()}
    sqnr = _measure(model, layers, batches, {name: form for name, form in forms.items() if not isinstance(form, str)})
    changes = []
    for name, form in forms.items():
        reason = _reason_to_keep(name, form, sqnr, config)
        if reason is None and not isinstance(form, str):
            replace(model, name, form)
            changes.append(Change(layer=name, pass_="quantize", done="W8A8", sqnr_db=sqnr[name]))
        else:
            round_to_half(layers[name])
            changes.append(Change(layer=name, pass_="quantize", done="kept", reason=reason or "", sqnr_db=sqnr.get(name)))
    for other in others(model).values():
        round_to_half(other)
    align_with_pixels(model, batches[0])
    return changes


def _reason_to_keep(name: str, form: QuantizedLayer | str, sqnr: dict[str, float | None], config: QuantizationConfig) -> str | None:
    if isinstance(form, str):
        return form
    if not name:
        return WHOLE_MODEL
    if is_kept(name, config.keep):
        return "named in keep"
    measured = sqnr[name]
    if measured is None:
        return UNUSUAL
    if measured < config.min_sqnr_db:
        return f"INT8 leaves {measured:.1f} dB of signal over noise, less than {config.min_sqnr_db:g}: 16 bits"
    return None
