"""Rounding of weights by reconstruction: calibration inputs, no labels.

    prepare_qat (grids) -> reconstruct (weights move so that nearest rounding gives the float model's outputs) -> freeze (integers)

Units (blocks or layers) are taken in the order in which the model calls them, on the inputs that the rounded units before give. In a unit,
each layer is rounded column by column (`rounding`), then all of them are trained for some steps to give the float unit's output
(`unit_tuning`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from muntin.compression.quantization.qat import QATConv2d, QATLinear, QATProduct, QATSoftmaxProduct
from muntin.compression.quantization.rounding import MAX_INPUTS, Layer, MeanErrors, Moments, add_rows, inputs_of_an_output, round_layer
from muntin.compression.quantization.unit_tuning import first_tensor, output_weights, tune_unit
from muntin.compression.quantization.units import Arguments, Unit, arguments_of, following_arguments, input_of, run_unit, units_of
from muntin.compression.rewrite import named, replace
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, eager_copy

MEAN_ROWS = 4096
"""Rows of a layer's input from which the mean error of its outputs is computed, as far as there are so many batches."""
CACHE_BYTES = 2**30
"""Approximate maximum size of the inputs of one unit, over all batches: of more batches the first are taken."""


def reconstruct(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[ModelInputs],
    *,
    columns: bool = True,
    correct_bias: bool = True,
    steps: int = 0,
) -> list[Change]:
    """Round the weights of layers in quantisation-aware training by reconstruction, in place; the model must be in `eval` mode.

    `layers`: by name; the other layers of the model stay as they are. `batches`: some hundred images or some thousand tokens. `columns`:
    False leaves nearest rounding. `correct_bias`: biases take over the mean error (without `columns`,
    those of `MeanErrors`). `steps`: of training of each unit, on one batch each.

    Costs two to five forward passes over the batches (where units do not follow each other up to two for each unit), and `steps` forward
    and backward passes of one batch; memory of (I·k²)² numbers for the largest layer, and twice a unit's inputs. Without `columns` only
    as many batches are used as give `MEAN_ROWS`. Layers that are called more than once are rounded to nearest, with a reason.
    """
    done = _Reconstruction(model, float_form(model), layers, batches).run(columns=columns, correct_bias=correct_bias, steps=steps)
    missing = f"it is not called exactly once: {'rounded to nearest' if columns else 'its bias is not corrected'}"
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

    def run(self, *, columns: bool, correct_bias: bool, steps: int) -> dict[str, str]:
        """Round all layers; return what was done, by layer."""
        done: dict[str, str] = {}
        batches = self._within_memory()
        weights = output_weights(self.reference, self.units, batches) if steps else {}
        rounded: list[Arguments] = []
        exact: list[Arguments] = []
        numbers: list[int] = []  # of the batches that reach the unit
        taken = 0  # batches from which these are
        for index, unit in enumerate(self.units):
            used = batches if columns or steps else batches[: max(1, -(-MEAN_ROWS // max(1, unit.rows)))]
            if not rounded or not unit.follows or taken < len(used):
                both = zip(*(arguments_of(form, unit, used) for form in (self.model, self.reference)), strict=True)
                taken = len(used)
                reached = [(number, one, other) for number, (one, other) in enumerate(both) if one is not None and other is not None]
                numbers, rounded, exact = (
                    [number for number, _, _ in reached],
                    [one for _, one, _ in reached],
                    [one for _, _, one in reached],
                )
            for name in unit.layers:
                done[name] = self._round(name, unit, rounded, exact, columns=columns, correct_bias=correct_bias)
            following = next((one for one in self.units[index + 1 : index + 2] if one.follows), None)
            module = self.model.get_submodule(unit.name)
            if following is not None or steps:
                with torch.no_grad():
                    outputs = [run_unit(self.reference.get_submodule(unit.name), given) for given in exact]
            if steps:
                own = {name: self.layers[name] for name in unit.layers}
                targets, by_batch = [first_tensor(one) for one in outputs], weights[unit.name]
                before, after = tune_unit(module, own, rounded, targets, [by_batch[number] for number in numbers], steps=steps)
                for name in unit.layers:
                    done[name] += f", unit's error {after / before if before else 1:.0%} after training"
            if following is not None:
                with torch.no_grad():
                    rounded = [following_arguments(following, run_unit(module, given)) for given in rounded]
                exact = [following_arguments(following, one) for one in outputs]
            else:
                rounded, exact = [], []
        return done

    def _within_memory(self) -> list[ModelInputs]:
        largest = max((unit.nbytes for unit in self.units), default=0)
        return list(self.batches[: max(1, CACHE_BYTES // largest)]) if largest else list(self.batches)

    def _round(
        self,
        name: str,
        unit: Unit,
        rounded: Sequence[Arguments],
        exact: Sequence[Arguments],
        *,
        columns: bool,
        correct_bias: bool,
    ) -> str:
        layer = self.layers[name]
        if columns and inputs_of_an_output(layer) > MAX_INPUTS:
            return f"nearest: {inputs_of_an_output(layer)} inputs an output are more than {MAX_INPUTS}"
        own, float_unit = self.model.get_submodule(unit.name), self.reference.get_submodule(unit.name)
        float_layer = self.reference.get_submodule(name)
        moments: Moments | None = None
        errors = MeanErrors()
        with torch.no_grad():
            for given, float_given in zip(rounded, exact, strict=True):
                x, y = input_of(layer, own, given), input_of(float_layer, float_unit, float_given)
                if x is None or y is None:
                    continue
                if columns:
                    moments = add_rows(moments, layer, x, y)
                else:
                    errors.add(float_layer(y) - layer(x), channels=-3 if isinstance(layer, QATConv2d) else -1)
        if not columns:
            return errors.correct(layer) if correct_bias else "nearest"
        assert moments is not None  # the first batch reaches the layer
        return f"error {round_layer(layer, moments, correct_bias=correct_bias):.0%} of nearest rounding's"
