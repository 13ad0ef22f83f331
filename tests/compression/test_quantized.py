"""Quantised layers against integer arithmetic in int64. Axes: B batch, O output and I input channels, H W map."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muntin.compression import QuantizedConv2d, QuantizedLinear
from muntin.compression.factored import full_ranks
from muntin.compression.low_rank import factorize
from muntin.compression.observer import ActivationGrid, Observer
from muntin.compression.qat import QATConv2d, QATLinear
from muntin.compression.quantized import GEOMETRY

SIDES = st.integers(1, 7)


def grid_of(x: Tensor) -> ActivationGrid:
    observer = Observer()
    observer.see_range(x)
    observer.see_values(x)
    return observer.grid()


def integers(x: Tensor, grid: ActivationGrid) -> np.ndarray:
    low, high = (0, 255) if grid.unsigned else (-128, 127)
    return np.clip(np.rint(x.numpy() / np.float32(grid.scale)), low, high).astype(np.int64)


def assert_equal_arithmetic(out: Tensor, sums: np.ndarray, scale: np.ndarray, bias: Tensor | None, magnitude: np.ndarray) -> None:
    """`out` is the integers' sums times their scale, up to float32's rounding of as many terms."""
    expected = sums * scale + (0 if bias is None else bias.detach().double().numpy().reshape(-1, *[1] * (sums.ndim - 2)))
    assert np.all(np.abs(out.detach().double().numpy() - expected) <= 1e-6 * (magnitude * scale + np.abs(expected)) + 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(SIDES, max_size=3), SIDES, SIDES, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_a_linear_is_its_integers(lead: list[int], inputs: int, outputs: int, bias: bool, unsigned: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*lead, inputs) * 3
    grid = grid_of(x.abs() if unsigned else x)
    quantized = QuantizedLinear(layer, grid)
    q_x, q_IO = integers(x, grid).reshape(-1, inputs), quantized.integers.numpy().astype(np.int64)
    assert quantized.integers.dtype == torch.int8 and q_IO.shape == (inputs, outputs)
    scale_O = quantized.weight_scale.double().numpy() * np.float32(grid.scale).astype(np.float64)
    out = quantized(x)
    assert out.shape == (*lead, outputs)
    flat = out.reshape(-1, outputs)
    sums, magnitude = q_x @ q_IO, np.abs(q_x) @ np.abs(q_IO)
    assert_equal_arithmetic(flat, sums, scale_O, layer.bias, magnitude)


def convolve(q_BIHW: np.ndarray, q_OIHW: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A convolution of int64 by plain loops over kernel positions and groups."""
    assert not isinstance(layer.padding, str)
    (top, left), (down, right), (dy, dx) = layer.padding, layer.stride, layer.dilation
    q_BIHW = np.pad(q_BIHW, ((0, 0), (0, 0), (int(top), int(top)), (int(left), int(left))))
    outputs, per_group, rows, columns = q_OIHW.shape
    height = (q_BIHW.shape[2] - dy * (rows - 1) - 1) // down + 1
    width = (q_BIHW.shape[3] - dx * (columns - 1) - 1) // right + 1
    sums = np.zeros((len(q_BIHW), outputs, height, width), np.int64)
    for o in range(outputs):
        first = o // (outputs // layer.groups) * per_group
        for y in range(rows):
            for x in range(columns):
                part = q_BIHW[:, first : first + per_group, y * dy :: down, x * dx :: right][:, :, :height, :width]
                sums[:, o] += np.tensordot(q_OIHW[o, :, y, x], part, axes=(0, 1))
    return sums


@settings(deadline=None, max_examples=60)
@given(
    groups=st.sampled_from([(1, 3, 5), (2, 4, 6), (4, 4, 4), (4, 4, 8)]),  # groups, input and output channels
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    padding=st.sampled_from([(0, 0), (1, 1), (2, 0)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    bias=st.booleans(),
    unsigned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_convolution_is_its_integers(
    groups: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    bias: bool,
    unsigned: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    count, inputs, outputs = groups
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, count, bias)
    x_BIHW = torch.randn(2, inputs, *size) * 3
    grid = grid_of(x_BIHW.abs() if unsigned else x_BIHW)
    quantized = QuantizedConv2d(layer, grid)
    q_x, q_OIHW = integers(x_BIHW, grid), quantized.integers.numpy().astype(np.int64)
    scale = (quantized.weight_scale.double() * float(np.float32(grid.scale))).numpy()[:, None, None]
    out = quantized(x_BIHW)
    assert out.shape == layer(x_BIHW).shape
    magnitude = convolve(np.abs(q_x), np.abs(q_OIHW), layer)
    assert_equal_arithmetic(out, convolve(q_x, q_OIHW, layer), scale, layer.bias, magnitude)


@pytest.mark.parametrize("bias", [True, False])
def test_it_stands_in_for_the_float_layer(bias: bool) -> None:
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


def test_half_precision_activations_stay_so() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert QuantizedLinear(layer, grid_of(x))(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_original_layer_is_not_touched() -> None:
    layer = nn.Linear(8, 4)
    before = layer.weight.detach().clone()
    quantized = QuantizedLinear(layer, grid_of(torch.randn(3, 8)))
    assert quantized.bias is not None
    quantized.bias.add_(1)
    assert torch.equal(layer.weight, before) and not torch.equal(layer.bias, quantized.bias)


def test_the_weight_is_a_float_of_the_layers_own_shape() -> None:
    """Some models ask a layer's weight for the type and the device of what they give it."""
    linear, conv = nn.Linear(8, 4), nn.Conv2d(8, 4, 3, groups=2)
    for layer, quantized in (
        (linear, QuantizedLinear(linear, grid_of(torch.randn(3, 8)))),
        (conv, QuantizedConv2d(conv, grid_of(torch.randn(1, 8, 5, 5)))),
    ):
        assert quantized.weight.dtype == torch.float32
        torch.testing.assert_close(quantized.weight, layer.weight.detach(), rtol=0, atol=0.01)


LAYERS = [nn.Linear(6, 4), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, (5, 7), (1, 2), (2, 3), 1)]


@pytest.mark.parametrize("layer", LAYERS)
def test_what_stands_for_a_layer_has_what_models_read_of_it(layer: nn.Linear | nn.Conv2d) -> None:
    grid = grid_of(torch.linspace(0, 1, 9))
    linear = isinstance(layer, nn.Linear)
    forms: list[Any] = [QuantizedLinear(layer, grid) if linear else QuantizedConv2d(layer, grid)]
    forms += [QATLinear(layer, grid, 4) if linear else QATConv2d(layer, grid, 4)]
    forms += [factorize(layer, tuple(1 for _ in full_ranks(layer)))]
    for form, name in itertools.product(forms, GEOMETRY):
        assert not hasattr(layer, name) or getattr(form, name) == getattr(layer, name), (type(form), name)
    assert all((form.bias is None) == (layer.bias is None) for form in forms)
