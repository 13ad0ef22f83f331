"""Counts of a model in PyTorch: multiply-adds, parameters and stored bytes.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muntin.compression import QuantizedConv2d, QuantizedLinear
from muntin.graph.passes.storage import is_half


def image_macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of one image of the example's size, attention included (`torch.utils.flop_counter`, halved).

    They are counted by shapes alone where the model allows it, because attention over a picture takes much memory.
    """
    image = example[:1].to(torch.float32)
    if image.is_meta:
        return _total_macs(model, image)
    copied = copy.deepcopy(model)  # a model may cache tensors for a size
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            return _total_macs(copied, fake.from_tensor(image))
    except RuntimeError:  # its computation depends on values
        return _total_macs(model, image)


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


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights and biases, also of quantised layers, without scales and statistics of norms."""
    own = sum(parameter.numel() for parameter in model.parameters())
    return own + sum(layer.integers.numel() + _bias_count(layer) for layer in _quantized(model))


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's packed weights, scales and biases, without the graph and golden pairs of its artefact."""
    total = sum(
        parameter.numel() * (2 if is_half(parameter.detach().numpy()) else parameter.element_size()) for parameter in model.parameters()
    )
    for layer in _quantized(model):
        total += (layer.integers.numel() * layer.bits + 7) // 8 + 4 * (layer.weight_scale.numel() + _bias_count(layer))
    return total


def _quantized(model: nn.Module) -> list[QuantizedLinear | QuantizedConv2d]:
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLinear | QuantizedConv2d)]


def _bias_count(layer: QuantizedLinear | QuantizedConv2d) -> int:
    return 0 if layer.bias is None else layer.bias.numel()
