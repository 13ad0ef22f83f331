"""Quantised layers in the place of float layers (`test_qat` has their arithmetic). Axes: B batch, I input channels, H W map."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin.compression import QuantizedConv2d, QuantizedLinear
from muntin.compression.low_rank.factored_layers import full_ranks
from muntin.compression.low_rank.factorization import factorize
from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.quantization.quantized_layers import GEOMETRY
from muntin.graph.grids import ByteGrid, RangeObserver


def grid_of(x: Tensor, *, symmetric: bool = False) -> ByteGrid:
    observer = RangeObserver()
    observer.see_range(float(x.min()), float(x.max()))
    observer.see_values(x.detach().numpy())
    return observer.grid(symmetric=symmetric)


@pytest.mark.parametrize("bias", [True, False])
def test_error_and_state(bias: bool) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 32, bias=bias), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=bias)
    x, x_BIHW = torch.randn(2, 9, 64), torch.randn(2, 16, 9, 9)
    for layer, quantized, inputs in (
        (linear, QuantizedLinear(linear, grid_of(x)), x),
        (conv, QuantizedConv2d(conv, grid_of(x_BIHW)), x_BIHW),
    ):
        expected = layer(inputs)
        error = (quantized(input=inputs) - expected).square().mean() / expected.square().mean()  # by keyword, as models may
        assert error < 1e-3
        assert not list(quantized.parameters())  # nothing left to train by accident
        assert quantized.state_dict().keys() == {"integers", "weight_scale", "input.scale", "input.zero_point"} | (
            {"bias"} if bias else set()
        )


def test_zero_point() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), nn.functional.gelu(torch.randn(50, 64))
    form = QuantizedLinear(layer, grid_of(x))
    zero, scale = form.input.zero_point, form.input.scale
    assert zero.dtype == torch.uint8 and zero > 0
    q = torch.round(x / scale).add(zero).clamp(0, 255).double()
    product = ((q - zero) @ form.integers.double()) * scale * form.weight_scale + layer.bias
    torch.testing.assert_close(form(x), product.float(), rtol=1e-5, atol=1e-6)
    symmetric = QuantizedLinear(layer, grid_of(x, symmetric=True))
    errors = [(one(x) - layer(x)).square().mean() for one in (form, symmetric)]
    assert errors[0] < 0.6 * errors[1]
    assert (form.input.ends()[0], form.input.ends()[1]) == (-int(zero) * float(scale), (255 - int(zero)) * float(scale))


def test_half_precision() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert QuantizedLinear(layer, grid_of(x))(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_original_layer_is_unchanged() -> None:
    layer = nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    quantized = QuantizedLinear(layer, grid_of(torch.randn(3, 8)))
    assert quantized.bias is not None
    quantized.bias.add_(1)
    assert torch.equal(layer.weight, before) and not torch.equal(layer.bias, quantized.bias)


def test_weight_attribute() -> None:
    """Some models read the type and device of a layer's weight."""
    linear, conv = nn.Linear(8, 4), nn.Conv2d(8, 4, 3, groups=2)
    for layer, quantized in (
        (linear, QuantizedLinear(linear, grid_of(torch.randn(3, 8)))),
        (conv, QuantizedConv2d(conv, grid_of(torch.randn(1, 8, 5, 5)))),
    ):
        assert quantized.weight.dtype == torch.float32
        torch.testing.assert_close(quantized.weight, layer.weight.detach(), rtol=0, atol=0.01)


LAYERS = [nn.Linear(6, 4), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, (5, 7), (1, 2), (2, 3), 1)]


@pytest.mark.parametrize("layer", LAYERS)
def test_geometry_attributes(layer: nn.Linear | nn.Conv2d) -> None:
    grid = grid_of(torch.linspace(0, 1, 9))
    linear = isinstance(layer, nn.Linear)
    forms: list[Any] = [QuantizedLinear(layer, grid) if linear else QuantizedConv2d(layer, grid)]
    forms += [QATLinear(layer, grid, 4) if linear else QATConv2d(layer, grid, 4)]
    forms += [factorize(layer, tuple(1 for _ in full_ranks(layer)))]
    for form, name in itertools.product(forms, GEOMETRY):
        assert not hasattr(layer, name) or getattr(form, name) == getattr(layer, name), (type(form), name)
    assert all((form.bias is None) == (layer.bias is None) for form in forms)
