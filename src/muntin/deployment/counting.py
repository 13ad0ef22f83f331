"""Counting multiply-adds: of a whole model by PyTorch's own counter, and layer by layer.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muntin.compression import QuantizedConv2d, QuantizedLinear, QuantizedProduct, QuantizedSoftmaxProduct
from muntin.compression.rewrite import named

WEIGHTED = (nn.Linear, nn.Conv2d, QuantizedLinear, QuantizedConv2d)
Count = TypeVar("Count")
PRODUCTS = (QuantizedProduct, QuantizedSoftmaxProduct)
UNPACKED = 64
"""Values of a tensor of floats up to which an artefact stores it as it is."""


def image_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one image of the example's size, attention products included (`torch.utils.flop_counter`, halved)."""
    return _of_shapes(_counted, model, example)


def _of_shapes(count: Callable[[nn.Module, Tensor], Count], model: nn.Module, example: Tensor) -> Count:
    """What is counted of one image, by shapes alone where the model allows it: attention over a picture takes much memory."""
    image = example[:1].to(torch.float32)
    if image.is_meta:
        return count(model, image)
    tried = copy.deepcopy(model)  # a model may keep what it makes of a size
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            return count(tried, fake.from_tensor(image))
    except RuntimeError:  # what it does depends on values
        return count(model, image)


def _counted(model: nn.Module, image: Tensor) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The counter sees neither fused attention, the CPU's and PyTorch's own layers', nor what operators do in inference mode.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def layer_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-adds of one image of the example's size in each layer with weights and each quantised product, by dotted name."""
    return _of_shapes(_layers_counted, model, example)


def _layers_counted(model: nn.Module, image: Tensor) -> dict[str, int]:
    macs: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            per_output = inputs[0].shape[-1] if isinstance(layer, PRODUCTS) else weight_count(layer) // output_channels(layer)
            macs[name] = macs.get(name, 0) + output.numel() * per_output

        return count

    handles = [layer.register_forward_hook(hook(name)) for name, layer in named(model, *WEIGHTED, *PRODUCTS)]
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return macs


def weight_count(layer: nn.Module) -> int:
    """Entries of a layer's weight."""
    return _stored(layer).numel()


def bias_count(layer: nn.Module) -> int:
    """Entries of a layer's bias, 0 without one."""
    bias = layer.bias
    return bias.numel() if isinstance(bias, Tensor) else 0


def output_channels(layer: nn.Module) -> int:
    """Channels that a layer with weights gives: the quantised Linear keeps its integers as (I, O), the others as (O, ...)."""
    return _stored(layer).shape[1 if isinstance(layer, QuantizedLinear) else 0]


def _stored(layer: nn.Module) -> Tensor:
    weight = layer.integers if isinstance(layer, QuantizedLinear | QuantizedConv2d) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parameter_count(model: nn.Module) -> int:
    """Weights and biases, those of quantised layers included; scales and statistics of norms are not parameters of the function."""
    own = sum(p.numel() for p in model.parameters())
    for _, layer in named(model, QuantizedLinear, QuantizedConv2d):
        own += weight_count(layer) + bias_count(layer)
    return own


def _is_half(parameter: Tensor) -> bool:
    """Whether an artefact stores it in FP16, as it does with more than `UNPACKED` values that lose nothing by it."""
    return parameter.numel() > UNPACKED and torch.equal(parameter.float(), parameter.half().float())


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights, scales and biases take when packed: an artefact of it is larger by its graph and its golden pairs."""
    integer = {id(module): module for _, module in named(model, QuantizedLinear, QuantizedConv2d)}
    total = sum(parameter.numel() * (2 if _is_half(parameter) else parameter.element_size()) for parameter in model.parameters())
    for layer in integer.values():
        assert isinstance(layer, QuantizedLinear | QuantizedConv2d)
        total += (weight_count(layer) * layer.bits + 7) // 8 + 4 * (output_channels(layer) + bias_count(layer))
    return total
