"""Static INT8 quantisation by calibration: the pass that replaces Linear and Conv2d by their quantised forms.

    model -> fold -> run calibration images twice (ranges, then histograms) -> choose grids -> measure each layer -> replace

A layer stays in 16 bits if its own quantisation, measured on calibration images, leaves less signal over noise than `min_sqnr_db`, or if
it has no integer form; its name or position does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from muntin.compression.history import checked, last_changes, remember
from muntin.compression.quantization.embeddings import check_tables, quantize_tables, tables
from muntin.compression.quantization.fake_quantization import round_to_half, sqnr_db
from muntin.compression.quantization.pixel_grid import align_with_pixels
from muntin.compression.quantization.preparation import prepare
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.quantization.quantized_layers import QuantizedLayer, already_quantized, quantized_form, quantized_operations
from muntin.compression.rewrite import EVERY, others, out_of_reach, replace
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, watch_inputs
from muntin.training.config import QuantizationConfig


def quantize(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    min_sqnr_db: float = 15.0,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
    embedding_bits: int | None = None,
) -> list[Change]:
    """Quantise Linear and Conv2d to static INT8 (W8A8), in place; see the head of this file.

    `calibration`: batches of training inputs: a tensor `(B, C, H, W)` of raw pixels, of any integer or float type, or several inputs as a
    tuple or dictionary. `only`, `keep`: names or patterns of the layers to quantise, and to leave in 16 bits. Costs three forward passes
    over the batches, and three of one row. Closed channels are cut, norms and gates folded. Weights of layers that stay are rounded to the
    FP16 in which they are stored. A second run changes nothing: a layer keeps its form, and its measured signal over noise. Raises
    `MuntinError` like `prepare`, and for a model in quantisation-aware training. `embedding_bits`: 2 to 8 for the tables of embeddings
    (`embeddings.quantize_tables`), None to leave them as they are.
    """
    config = checked(QuantizationConfig, min_sqnr_db=min_sqnr_db)
    check_eager(model)
    check_frozen(model)
    before = quantized_operations(model)
    if embedding_bits is not None:
        check_tables(model, embedding_bits)
    named_too = before if embedding_bits is None else {**before, **tables(model)}
    ready = prepare(model, calibration, only=only, keep=keep, done=named_too, cut=True)
    free = {name: layer for name, layer in ready.operations.items() if name not in ready.reasons}
    forms = {name: quantized_form(layer, ready.observed[name][0].grid()) for name, layer in free.items()}
    earlier = {
        name: change.sqnr_db for name, change in last_changes(model, "quantize").items() if name in free and change.sqnr_db is not None
    }
    sqnr = _measure(model, {name: layer for name, layer in free.items() if name not in earlier}, forms, ready.batches) | earlier
    changes = [*ready.changes, *already_quantized(before)]
    replaced = False
    for name, layer in ready.operations.items():
        reason = ready.reasons.get(name, "")
        if name in sqnr and sqnr[name] < config.min_sqnr_db:
            reason = f"INT8 leaves {sqnr[name]:.1f} dB of signal over noise, less than {config.min_sqnr_db:g}: 16 bits"
        if reason:
            round_to_half(layer)
        else:
            replace(model, name, forms[name])
            replaced = True
        changes.append(Change(layer=name, pass_="quantize", done="kept" if reason else "W8A8", reason=reason, sqnr_db=sqnr.get(name)))
    for other in others(model).values():
        round_to_half(other)
    if embedding_bits is not None:
        changes += quantize_tables(model, ready.batches[0], embedding_bits, min_sqnr_db=config.min_sqnr_db, only=only, keep=keep)
    if replaced:
        align_with_pixels(model, ready.batches[0])
    return remember(model, changes + out_of_reach(model, "quantize", "integer form"))


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], forms: Mapping[str, QuantizedLayer], batches: Sequence[ModelInputs]
) -> dict[str, float]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it."""
    measured: dict[str, float] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in measured:
            measured[name] = sqnr_db(type(layer).forward(layer, inputs[0]), forms[name](inputs[0]))

    for batch in batches:
        if measured.keys() != layers.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured
