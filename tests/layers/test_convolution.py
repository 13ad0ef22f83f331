"""Convolutional units against their formulas, and their sizes. Axes as in the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers import ConvUnit, PositionUnit, ResidualPair


def convolve(x_CHW: Tensor, weight_OIkk: Tensor, stride: int, groups: int) -> Tensor:
    """A zero-padded convolution of one image, pixel by pixel."""
    outputs, inputs, kernel, _ = weight_OIkk.shape
    height, width = (-(-side // stride) for side in x_CHW.shape[1:])
    padded = F.pad(x_CHW, (kernel // 2,) * 4)
    result = torch.zeros(outputs, height, width, dtype=x_CHW.dtype)
    for channel in range(outputs):
        first = channel // (outputs // groups) * inputs
        for y in range(height):
            for x in range(width):
                patch = padded[first : first + inputs, y * stride : y * stride + kernel, x * stride : x * stride + kernel]
                result[channel, y, x] = (patch * weight_OIkk[channel]).sum()
    return result


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (5, 2, 4)])
@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 3)])
@pytest.mark.parametrize("activation", [True, False])
def test_conv_unit_by_formula(kernel: int, stride: int, groups: int, size: tuple[int, int], activation: bool) -> None:
    unit = ConvUnit(4, 8, kernel=kernel, stride=stride, groups=groups, activation=activation).double().eval()
    with torch.no_grad():
        for tensor in (unit.norm.weight, unit.norm.bias, unit.norm.running_mean, unit.norm.running_var):
            tensor.copy_(0.5 + torch.rand(8))
    x_BCHW = torch.randn(2, 4, *size, dtype=torch.float64)
    scale, shift = (t.reshape(8, 1, 1) for t in unit.norm.affine())
    expected = torch.stack([convolve(image, unit.conv.weight, stride, groups) for image in x_BCHW]) * scale + shift
    torch.testing.assert_close(unit(x_BCHW), expected.clamp(min=0) if activation else expected, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 20), width=st.integers(1, 20), kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3))
def test_conv_unit_output_size(height: int, width: int, kernel: int, stride: int) -> None:
    out = ConvUnit(1, 2, kernel=kernel, stride=stride).eval()(torch.zeros(1, 1, height, width))
    assert out.shape == (1, 2, -(-height // stride), -(-width // stride))


def test_residual_pair_by_formula() -> None:
    pair = ResidualPair(4).double().eval()
    x_BCHW = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(pair(x_BCHW), F.relu(x_BCHW + pair.second(pair.first(x_BCHW))), rtol=0, atol=1e-12)
    with torch.no_grad():
        pair.second.norm.weight.zero_()
    torch.testing.assert_close(pair(x_BCHW), F.relu(x_BCHW), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13)])
def test_position_unit_by_formula(size: tuple[int, int]) -> None:
    unit = PositionUnit(4).double()
    x_BCHW = torch.randn(2, 4, *size, dtype=torch.float64)
    convolved = torch.stack([convolve(image, unit.conv.weight, 1, 4) for image in x_BCHW]) + unit.conv.bias.reshape(4, 1, 1)
    torch.testing.assert_close(unit(x_BCHW), x_BCHW + convolved, rtol=0, atol=1e-11)


def test_position_unit_at_the_border() -> None:
    out = PositionUnit(3)(torch.ones(1, 3, 6, 7))[0]
    inside = out[:, 1:-1, 1:-1]
    torch.testing.assert_close(inside, inside[:, :1, :1].expand_as(inside))
    assert not torch.allclose(out[:, 0, 0], inside[:, 0, 0], atol=1e-4)
