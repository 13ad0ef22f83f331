"""Static INT8 quantisation by calibration: the pass that turns Linear and Conv2d into their quantised forms.

    model -> fold -> run calibration images twice (ranges, then histograms) -> choose grids -> measure each layer -> replace

Which layers stay in 16 bits is neither a list of names nor a matter of position: it is every layer whose own quantisation,
measured on calibration images, leaves less than `min_sqnr_db`, and every layer that has no integer form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.batch_norm import fold_batch_norms
from muntin.compression.calibration import calibration_list, check_weights, observe, watch_inputs
from muntin.compression.change import Change, Pass
from muntin.compression.factored import PARTS
from muntin.compression.fold import fold
from muntin.compression.observer import Observer
from muntin.compression.pixel_grid import align_with_pixels
from muntin.compression.quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from muntin.compression.rewrite import OTHERS, WHOLE_MODEL, computed_weight, named, number_paddings, out_of_reach, replace
from muntin.compression.slimming import remove_closed_channels
from muntin.errors import MuntinError
from muntin.training.config import QuantizationConfig

HALF_DB = 60.0
"""FP16 leaves 73 dB of a weight that it can hold; one that is too large or too small for it stays in FP32."""


def quantized_form(layer: nn.Module, observer: Observer) -> QuantizedLayer | str:
    """The quantised layer, or the reason why there is none."""
    reason = no_integer_form(layer, observer)
    if reason is not None:
        return reason
    return QuantizedConv2d(layer, observer.grid()) if isinstance(layer, nn.Conv2d) else QuantizedLinear(layer, observer.grid())  # type: ignore[arg-type]


def no_integer_form(layer: nn.Module, observer: Observer) -> str | None:
    """Why a Linear or Conv2d cannot be quantised; None where it can."""
    if not observer.seen:
        return "no calibration image reached it"
    if (reason := computed_weight(layer)) is not None:
        return reason
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding '{layer.padding if isinstance(layer.padding, str) else layer.padding_mode}' has no integer form here"
    return None


def computes_as_usual(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
    """False for a subclass that pads, standardises or masks before its product: its weight and strides do not say what it computes."""
    if type(layer) in (nn.Linear, nn.Conv2d):
        return True
    if isinstance(layer, nn.Conv2d):
        usual = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        assert isinstance(layer, nn.Linear)
        usual = F.linear(x, layer.weight, layer.bias)
    return usual.shape == output.shape and torch.allclose(usual, output, rtol=1e-4, atol=1e-5 * float(output.abs().max()))


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal over quantisation noise in decibels; infinite where nothing was lost."""
    noise = (reference - approximation).double().square().sum()
    signal = reference.double().square().sum()
    return float(10 * torch.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


def _measure(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Tensor], candidates: dict[str, QuantizedLayer]
) -> dict[str, float | None]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it.

    None for a layer that does not compute what its kind does.
    """
    measured: dict[str, float | None] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in candidates and name not in measured:
            output = type(layer).forward(layer, inputs[0])
            usual = computes_as_usual(layer, inputs[0], output)
            measured[name] = sqnr_db(output, candidates[name](inputs[0])) if usual else None

    for batch in batches:
        if measured.keys() != candidates.keys():
            watch_inputs(model, layers, [batch], watch)
    return measured


def quantize(calibration: Iterable[Tensor], config: QuantizationConfig | None = None) -> Pass:
    """A pass that quantises Linear and Conv2d to static INT8 (W8A8) in place; see the head of this file.

    `calibration`: input batches `(B, C, H, W)` of raw pixels, any integer or float type; images of training, never of a test. Costs three
    forward passes over them. Weights of layers that stay are rounded to the FP16 they are stored in. The pass cuts out channels that gates
    have closed and folds norms and gates first. It raises `MuntinError` if there is no calibration batch, if NaN or infinity turns up, or
    if `keep` names no layer.
    """
    config = config or QuantizationConfig()

    def pass_(model: nn.Module) -> list[Change]:
        batches = calibration_list(calibration)
        changes = remove_closed_channels(model.eval()) + number_paddings(model)
        layers: dict[str, nn.Module] = dict(named(model, nn.Linear, nn.Conv2d))
        check_kept(config.keep, layers)
        changes += fold(model) + fold_batch_norms(model, batches[0])
        check_weights(layers)
        return changes + _replace_layers(model, layers, batches, config) + out_of_reach(model, "quantize", "integer form")

    return pass_


def check_kept(keep: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    """Raises `MuntinError` for a name in `keep` that no layer has."""
    unknown = [entry for entry in keep if not any(is_kept(name, (entry,)) for name in layers)]
    if unknown:
        raise MuntinError(f"keep names no Linear or Conv2d: {', '.join(unknown)}; the model has {', '.join(list(layers)[:6])}, ...")


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a layer is named in `keep`: itself, a module that it lies in, or a part that it would be factored into."""
    return any(f"{name}.".startswith(f"{entry}.") or (name and entry in (f"{name}.{part}" for part in PARTS)) for entry in keep)


def _replace_layers(model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Tensor], config: QuantizationConfig) -> list[Change]:
    forms = {name: quantized_form(layers[name], first) for name, (first, _) in observe(model, layers, batches).items()}
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
    for _, other in named(model, *OTHERS):
        round_to_half(other)
    call_every_layer(model)
    align_with_pixels(model, batches[0])
    return changes


def call_every_layer(model: nn.Module) -> None:
    """PyTorch's encoder layer has a fused path that takes the weights of its Linears without calling them: not of integer ones."""
    for _, layer in named(model, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # read by nothing but the choice of that path


def _reason_to_keep(name: str, form: QuantizedLayer | str, sqnr: dict[str, float | None], config: QuantizationConfig) -> str | None:
    if isinstance(form, str):
        return form
    if not name:
        return WHOLE_MODEL
    if is_kept(name, config.keep):
        return "named in keep"
    measured = sqnr[name]
    if measured is None:
        return "it does not compute what its kind does: no integer form"
    if measured < config.min_sqnr_db:
        return f"INT8 leaves {measured:.1f} dB of signal over noise, less than {config.min_sqnr_db:g}: 16 bits"
    return None


@torch.no_grad()
def round_to_half(layer: nn.Module) -> None:
    """Round a layer's weights, in place, to the FP16 that they are stored in; one that FP16 cannot hold stays."""
    for weight in layer.parameters(recurse=False):
        rounded = weight.to(torch.float16).to(weight.dtype)
        if weight.ndim > 1 and sqnr_db(weight, rounded) > HALF_DB:
            weight.copy_(rounded)
