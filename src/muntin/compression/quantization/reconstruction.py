"""Rounding of weights by reconstruction: calibration inputs, no labels.

    QAT layers -> reconstruct (weights move so that nearest rounding gives the float model's outputs) -> freeze (integers)

Units (blocks or layers) are taken in the order in which the model calls them, on the inputs that the rounded units before give. In a unit,
each layer is rounded column by column (`rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from muntin.compression.quantization.qat import QATConv2d, QATLinear, QATProduct, QATSoftmaxProduct
from muntin.compression.quantization.rounding import MAX_INPUTS, Layer, Moments, add_rows, inputs_of_an_output, round_layer
from muntin.compression.quantization.units import Arguments, Unit, arguments_of, following_arguments, input_of, run_unit, units_of
from muntin.compression.rewrite import named, replace
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, eager_copy

CACHE_BYTES = 2**30
"""Approximate maximum size of the inputs of one unit, over all batches: of more batches the first are taken."""


def reconstruct(model: nn.Module, layers: Mapping[str, Layer], batches: Sequence[ModelInputs]) -> list[Change]:
    """Round the weights of layers in quantisation-aware training by reconstruction, in place; the model must be in `eval` mode.

    `layers`: by name; the other layers of the model stay as they are. `batches`: some hundred images or some thousand tokens. Biases take
    over the mean error.

    Costs two to five forward passes over the batches (where units do not follow each other up to two for each unit); memory of (I·k²)²
    numbers for the largest layer, and twice a unit's inputs. Layers that are called more than once are rounded to nearest, with a reason.
    """
    done = _Reconstruction(model, float_form(model), layers, batches).run()
    missing = "it is not called exactly once: rounded to nearest"
    return [Change(layer=name, pass_="reconstruct", done=done.get(name, "kept"), reason="" if name in done else missing) for name in layers]


def float_form(model: nn.Module) -> nn.Module:
    """A copy of a model in quantisation-aware training that does not round."""
    copied = eager_copy(model)
    for name, layer in list(named(copied, QATLinear, QATConv2d)):
        replace(copied, name, layer.plain())
    for name, product in list(named(copied, QATProduct, QATSoftmaxProduct)):
        replace(copied, name, Product() if isinstance(product, QATProduct) else SoftmaxProduct())
    return copied.eval().requires_grad_(False)


class _Reconstruction:
    def __init__(self, model: nn.Module, reference: nn.Module, layers: Mapping[str, Layer], batches: Sequence[ModelInputs]) -> None:
        self.model, self.reference, self.layers, self.batches = model, reference, layers, batches
        self.units = units_of(model, layers, batches[0])

    def run(self) -> dict[str, str]:
        """Round all layers; return what was done, by layer."""
        done: dict[str, str] = {}
        batches = self._within_memory()
        rounded: list[Arguments] = []
        exact: list[Arguments] = []
        for index, unit in enumerate(self.units):
            if not rounded or not unit.follows:
                both = zip(*(arguments_of(form, unit, batches) for form in (self.model, self.reference)), strict=True)
                reached = [(one, other) for one, other in both if one is not None and other is not None]
                rounded, exact = [one for one, _ in reached], [other for _, other in reached]
            for name in unit.layers:
                done[name] = self._round(name, unit, rounded, exact)
            following = next((one for one in self.units[index + 1 : index + 2] if one.follows), None)
            if following is None:
                rounded, exact = [], []
                continue
            with torch.no_grad():
                rounded, exact = (
                    [following_arguments(following, run_unit(form.get_submodule(unit.name), given)) for given in arguments]
                    for form, arguments in ((self.model, rounded), (self.reference, exact))
                )
        return done

    def _within_memory(self) -> list[ModelInputs]:
        largest = max((unit.nbytes for unit in self.units), default=0)
        return list(self.batches[: max(1, CACHE_BYTES // largest)]) if largest else list(self.batches)

    def _round(self, name: str, unit: Unit, rounded: Sequence[Arguments], exact: Sequence[Arguments]) -> str:
        layer = self.layers[name]
        if inputs_of_an_output(layer) > MAX_INPUTS:
            return f"nearest: {inputs_of_an_output(layer)} inputs an output are more than {MAX_INPUTS}"
        own, float_unit = self.model.get_submodule(unit.name), self.reference.get_submodule(unit.name)
        float_layer = self.reference.get_submodule(name)
        moments: Moments | None = None
        with torch.no_grad():
            for given, float_given in zip(rounded, exact, strict=True):
                x, y = input_of(layer, own, given), input_of(float_layer, float_unit, float_given)
                if x is not None and y is not None:
                    moments = add_rows(moments, layer, x, y)
        assert moments is not None  # the first batch reaches the layer
        return f"error {round_layer(layer, moments):.0%} of nearest rounding's"
