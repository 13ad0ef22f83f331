"""The bits of each layer's weight: as requested by name, or chosen under an average so that the answer changes least.

    layer x width -> error of its output when it alone is rounded, times the sensitivity of the answer to it -> allocation under a budget

Depthwise and first layers have few weights and much influence: an average of 4.3 bits gives them 8, and all others keep 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from muntin.compression.activation_moments import answer_sensitivity
from muntin.compression.allocation import Option, allocate
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, QuantizedOperation
from muntin.compression.rewrite import EVERY, check_kept, is_kept
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, watch_inputs

Bits = int | float | Mapping[str, int]
"""Bits of all layers, their average over the weights (a number with a fraction), or bits by name or pattern."""
WidthOf = Callable[[str], int]
"""From a layer's name to the bits of its weight."""
BATCHES = 2
"""Maximum number of batches on which the sensitivity is measured."""


def check_bits(bits: object) -> None:
    """Raise `MuntinError` for weight bits that no integer form has."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise MuntinError(f"bits={bits!r}: give a whole number from 2 to 8")


def average_of(bits: Bits) -> float | None:
    """The average that was requested, or None. Raises `MuntinError` for one out of range."""
    if not isinstance(bits, float) or bits.is_integer():
        return None
    if not 2 < bits < 8:
        raise MuntinError(f"bits={bits!r}: give a whole number from 2 to 8, or an average between")
    return bits


def requested_widths(bits: Bits, layers: Mapping[str, nn.Module]) -> WidthOf:
    """The requested bits by name; of an average, the whole number below. Layers that no pattern names get 8."""
    whole = math.floor(bits) if isinstance(bits, float) and math.isfinite(bits) else bits
    by_pattern: Mapping[str, Any] = whole if isinstance(whole, Mapping) else {EVERY[0]: whole}
    for width in by_pattern.values():
        check_bits(width)
    check_kept(tuple(by_pattern), layers, argument="bits")
    return lambda name: next((int(by_pattern[entry]) for entry in reversed(list(by_pattern)) if is_kept(name, (entry,))), 8)


def check_same(
    before: Mapping[str, QuantizedOperation], width_of: WidthOf, changes: Mapping[str, Change], only: Sequence[str], keep: Sequence[str]
) -> None:
    """Raise `MuntinError` for quantised layers of other bits than requested. A layer that was raised to 8 has a reason for it."""
    for name, form in before.items():
        if not isinstance(form, QuantizedLinear | QuantizedConv2d) or form.bits == width_of(name):
            continue
        raised = form.bits == 8 > width_of(name) and name in changes and changes[name].reason
        if not raised and is_kept(name, only) and not is_kept(name, keep):
            raise MuntinError(
                f"bits={width_of(name)}: '{name}' has {form.bits} bits already: begin with the float model, or leave the layer out (keep)"
            )


def chosen_widths(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    form_of: Callable[[str, int], QuantizedLayer],
    average: float,
    batches: Sequence[ModelInputs],
) -> dict[str, int]:
    """The bits of each layer, from the whole number below `average` up to 8, that harm the answer least at that average over the weights.

    `form_of`: the integer form of a layer, rounded to nearest, by name and bits. Costs two passes over two batches, one of them with its
    gradient, and for each layer and width a call of the layer on the first batch. A layer that no input reaches gets the least bits.
    """
    sensitivity = answer_sensitivity(model, batches[:BATCHES], layers)
    least = math.floor(average)
    menus: dict[str, list[Option]] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in menus:
            return
        exact, count = type(layer).forward(layer, inputs[0]), layer.get_parameter("weight").numel()
        menus[name] = []
        for width in range(least, 9):
            error = float((form_of(name, width)(inputs[0]) - exact).double().square().sum()) / len(exact)
            menus[name].append(Option(sensitivity[name] * error, (float(width * count),)))

    for batch in batches:
        if menus.keys() != layers.keys():
            watch_inputs(model, layers, [batch], watch)
    weights = sum(menu[0].uses[0] for menu in menus.values()) / least
    picked = allocate(menus, [average * weights]).picked
    return dict.fromkeys(layers, least) | {name: least + index for name, index in picked.items()}
