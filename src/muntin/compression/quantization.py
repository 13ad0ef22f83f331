"""Static INT8 quantisation by calibration: the pass that turns Linear and Conv2d into their quantised forms.

    model -> fold -> run calibration images twice (ranges, then histograms) -> choose grids -> measure each layer -> replace

Which layers stay in 16 bits is neither a list of names nor a matter of position: it is every layer whose own quantisation,
measured on calibration images, leaves less than `min_sqnr_db`, and every layer that has no integer form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.batch_norm import fold_batch_norms
from muntin.compression.change import Change
from muntin.compression.fold import fold
from muntin.compression.observer import Observer
from muntin.compression.quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from muntin.compression.rewrite import named, replace
from muntin.errors import MuntinError
from muntin.training.config import QuantizationConfig

Pass = Callable[[nn.Module], list[Change]]
"""A compression pass: rewrites the model it is given, returns what it changed and what it kept."""
HALF_DB = 60.0
"""FP16 leaves 73 dB of a weight that it can hold; one that is too large or too small for it stays in FP32."""


class _Calibration:
    """Runs a model over the calibration batches and watches the inputs of its layers."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model = model
        self.batches = batches
        self.layers = dict(named(model, nn.Linear, nn.Conv2d))

    def run(self, watch: Callable[[str, nn.Module, Tensor], None], batches: Sequence[Tensor]) -> None:
        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            return lambda layer, inputs, named_inputs: watch(name, layer, inputs[0] if inputs else named_inputs["input"])

        handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in self.layers.items()]
        try:
            with torch.inference_mode():
                for batch in batches:
                    self.model(batch.to(torch.float32))
        finally:
            for handle in handles:
                handle.remove()

    def observe(self) -> dict[str, Observer]:
        observers = {name: Observer() for name in self.layers}

        def ranges(name: str, layer: nn.Module, x: Tensor) -> None:
            try:
                observers[name].see_range(x)
            except ValueError as error:
                raise MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images") from error

        self.run(ranges, self.batches)
        self.run(lambda name, layer, x: observers[name].see_values(x), self.batches)
        return observers


def quantized_form(layer: nn.Module, observer: Observer) -> QuantizedLayer | str:
    """The quantised layer, or the reason why there is none."""
    if not observer.seen:
        return "no calibration image reached it"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"padding '{layer.padding if isinstance(layer.padding, str) else layer.padding_mode}' has no integer form here"
        return QuantizedConv2d(layer, observer.grid())
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(layer, observer.grid())
    return f"{type(layer).__name__} has no integer form here"


def _computes_as_usual(layer: nn.Module, x: Tensor, output: Tensor) -> bool:
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


def _measure(run: _Calibration, candidates: dict[str, QuantizedLayer]) -> dict[str, float | None]:
    """Signal over noise of each layer's output when it alone is quantised, on the first calibration batch that reaches it.

    None for a layer that does not compute what its kind does.
    """
    measured: dict[str, float | None] = {}

    def watch(name: str, layer: nn.Module, x: Tensor) -> None:
        if name in candidates and name not in measured:
            output = type(layer).forward(layer, x)
            measured[name] = sqnr_db(output, candidates[name](x)) if _computes_as_usual(layer, x, output) else None

    for batch in run.batches:
        if measured.keys() != candidates.keys():
            run.run(watch, [batch])
    return measured


def quantize(calibration: Iterable[Tensor], config: QuantizationConfig | None = None) -> Pass:
    """A pass that quantises Linear and Conv2d to static INT8 (W8A8) in place; see the head of this file.

    `calibration`: input batches `(B, C, H, W)` of raw pixels, any integer or float type; images of training, never of a test. Costs three
    forward passes over them. Weights of layers that stay are rounded to the FP16 they are stored in. The pass folds norms and
    gates first and raises `MuntinError` if there is no calibration batch, if NaN or infinity turns up, or if `keep` names no layer.
    """
    config = config or QuantizationConfig()

    def pass_(model: nn.Module) -> list[Change]:
        batches = list(calibration)
        if not batches:
            raise MuntinError("calibration: no batch came; give at least one batch of training images")
        run = _Calibration(model.eval(), batches)
        unknown = [name for name in config.keep if name not in run.layers]
        if unknown:
            raise MuntinError(f"keep names no Linear or Conv2d: {', '.join(unknown)}; the model has {', '.join(list(run.layers)[:6])}, ...")
        changes = fold(model) + fold_batch_norms(model, batches[0])
        _check_weights(run.layers)
        return changes + _replace_layers(model, run, config)

    return pass_


def _replace_layers(model: nn.Module, run: _Calibration, config: QuantizationConfig) -> list[Change]:
    forms = {name: quantized_form(run.layers[name], observer) for name, observer in run.observe().items()}
    sqnr = _measure(run, {name: form for name, form in forms.items() if not isinstance(form, str)})
    changes = []
    for name, form in forms.items():
        reason = _reason_to_keep(name, form, sqnr, config)
        if reason is None and not isinstance(form, str):
            replace(model, name, form)
            changes.append(Change(layer=name, pass_="quantize", done="W8A8", sqnr_db=sqnr[name]))
        else:
            _round_to_half(run.layers[name])
            changes.append(Change(layer=name, pass_="quantize", done="kept", reason=reason or "", sqnr_db=sqnr.get(name)))
    _call_every_layer(model)
    return changes


def _check_weights(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not torch.isfinite(weight).all():
            raise MuntinError(
                f"layer '{name}': the weight holds NaN or infinity; nothing can be quantised from it, train again or restore a checkpoint"
            )


def _call_every_layer(model: nn.Module) -> None:
    """PyTorch's encoder layer has a fused path that takes the weights of its Linears without calling them: not of integer ones."""
    for _, layer in named(model, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # read by nothing but the choice of that path


def _reason_to_keep(name: str, form: QuantizedLayer | str, sqnr: dict[str, float | None], config: QuantizationConfig) -> str | None:
    if isinstance(form, str):
        return form
    if name in config.keep:
        return "named in keep"
    measured = sqnr[name]
    if measured is None:
        return "it does not compute what its kind does: no integer form"
    if measured < config.min_sqnr_db:
        return f"INT8 leaves {measured:.1f} dB of signal over noise, less than {config.min_sqnr_db:g}: 16 bits"
    return None


@torch.no_grad()
def _round_to_half(layer: nn.Module) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rounded = weight.to(torch.float16).to(weight.dtype)
    if sqnr_db(weight, rounded) > HALF_DB:
        weight.copy_(rounded)
