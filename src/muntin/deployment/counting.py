"""Counts of a model: multiply-adds, whole and by layer, parameters and stored bytes.

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
Counted = TypeVar("Counted")
PRODUCTS = (QuantizedProduct, QuantizedSoftmaxProduct)
UNPACKED = 64
"""Maximum number of values of a float tensor that an artefact stores unpacked."""


def image_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of one image of the example's size, attention included (`torch.utils.flop_counter`, halved)."""
    return _of_shapes(_total_macs, model, example)


def _of_shapes(count: Callable[[nn.Module, Tensor], Counted], model: nn.Module, example: Tensor) -> Counted:
    """Count for one image, by shapes alone where the model allows it, because attention over a picture takes much memory."""
    image = example[:1].to(torch.float32)
    if image.is_meta:
        return count(model, image)
    copied = copy.deepcopy(model)  # a model may cache tensors for a size
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            return count(copied, fake.from_tensor(image))
    except RuntimeError:  # its computation depends on values
        return count(model, image)


def _total_macs(model: nn.Module, image: Tensor) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The counter misses fused attention and operators in inference mode.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def layer_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return the multiply-adds of one image of the example's size, by the name of each layer with weights and quantised product."""
    return _of_shapes(_macs_by_layer, model, example)


def _macs_by_layer(model: nn.Module, image: Tensor) -> dict[str, int]:
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
    """Return the number of entries of a layer's weight."""
    return _stored(layer).numel()


def bias_count(layer: nn.Module) -> int:
    """Return the number of entries of a layer's bias, 0 without one."""
    bias = layer.bias
    return bias.numel() if isinstance(bias, Tensor) else 0


def output_channels(layer: nn.Module) -> int:
    """Return the output channels of a layer: a quantised Linear has integers (I, O), other layers have weights (O, ...)."""
    return _stored(layer).shape[1 if isinstance(layer, QuantizedLinear) else 0]


def _stored(layer: nn.Module) -> Tensor:
    weight = layer.integers if isinstance(layer, QuantizedLinear | QuantizedConv2d) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights and biases, also of quantised layers, without scales and statistics of norms."""
    own = sum(p.numel() for p in model.parameters())
    for _, layer in named(model, QuantizedLinear, QuantizedConv2d):
        own += weight_count(layer) + bias_count(layer)
    return own


def is_half(parameter: object) -> bool:
    """Return True if an artefact stores the parameter in FP16: more than `UNPACKED` values, all exact in FP16."""
    assert isinstance(parameter, Tensor)
    return parameter.numel() > UNPACKED and torch.equal(parameter.float(), parameter.half().float())


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's packed weights, scales and biases, without the graph and golden pairs of its artefact."""
    total = sum(parameter.numel() * (2 if is_half(parameter) else parameter.element_size()) for parameter in model.parameters())
    for _, layer in named(model, QuantizedLinear, QuantizedConv2d):
        assert isinstance(layer, QuantizedLinear | QuantizedConv2d)
        total += (weight_count(layer) * layer.bits + 7) // 8 + 4 * (output_channels(layer) + bias_count(layer))
    return total
