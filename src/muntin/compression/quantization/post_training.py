"""Static INT8 quantisation by calibration: the pass that replaces Linear and Conv2d by their quantised forms.

    model -> fold -> run calibration images twice (ranges, then histograms) -> choose grids -> measure each layer -> replace

A layer stays in 16 bits if its own quantisation, measured on calibration images, leaves less signal over noise than `min_sqnr_db`, or if
it has no integer form; its name or position does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from muntin.compression.quantization.fake_quantization import round_to_half, sqnr_db
from muntin.compression.quantization.pixel_grid import align_with_pixels
from muntin.compression.quantization.preparation import prepare
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.quantization.quantized_layers import QuantizedLayer, quantized_form
from muntin.compression.rewrite import Pass, others, out_of_reach, replace
from muntin.models.compression_record import Change
from muntin.models.eager import check_eager, watch_inputs
from muntin.training.config import QuantizationConfig


def quantize(calibration: Iterable[Tensor], config: QuantizationConfig | None = None) -> Pass:
    """A pass that quantises Linear and Conv2d to static INT8 (W8A8) in place; see the head of this file.

    `calibration`: input batches `(B, C, H, W)` of raw pixels, any integer or float type; images of training, never of a test. Costs three
    forward passes over them, and three of one image. Closed channels are cut, norms and gates folded. Weights of layers that stay are
    rounded to the FP16 in which they are stored. Raises `MuntinError` like `prepare`.
    """
    config = config or QuantizationConfig()

    def pass_(model: nn.Module) -> list[Change]:
        check_eager(model)
        check_frozen(model)
        ready = prepare(model, calibration, config.keep, cut=True)
        free = {name: layer for name, layer in ready.operations.items() if name not in ready.reasons}
        forms = {name: quantized_form(layer, ready.observed[name][0].grid()) for name, layer in free.items()}
        sqnr = _measure(model, free, forms, ready.batches)
        changes = ready.changes
        for name, layer in ready.operations.items():
            reason = ready.reasons.get(name, "")
            if name in sqnr and sqnr[name] < config.min_sqnr_db:
                reason = f"INT8 leaves {sqnr[name]:.1f} dB of signal over noise, less than {config.min_sqnr_db:g}: 16 bits"
            if reason:
                round_to_half(layer)
            else:
                replace(model, name, forms[name])
            changes.append(Change(layer=name, pass_="quantize", done="kept" if reason else "W8A8", reason=reason, sqnr_db=sqnr.get(name)))
        for other in others(model).values():
            round_to_half(other)
        align_with_pixels(model, ready.batches[0])
        return changes + out_of_reach(model, "quantize", "integer form")

    return pass_


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Mapping[str, QuantizedLayer], batches: Sequence[Tensor]
) -> dict[str, float]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it."""
    measured: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in measured:
            measured[name] = sqnr_db(type(layer).forward(layer, inputs[0]), forms[name](inputs[0]))

    for batch in batches:
        if measured.keys() != forms.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured
