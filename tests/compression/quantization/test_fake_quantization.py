"""The operators and the weights' grid against integer arithmetic. Axes: O output channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from muntin.compression.quantization.fake_quantization import (
    dequantize_weight,
    quantize_dequantize,
    quantize_weight,
    round_to_grid,
    sqnr_db,
)

SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=6)
WEIGHTS = SHAPES.flatmap(lambda shape: hnp.arrays("float32", shape, elements=st.floats(-100, 100, width=32))).map(torch.from_numpy)
KINDS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def test_grid_values() -> None:
    x = torch.tensor([-300.0, -0.2, 0.2, 0.25, 0.26, 1.0, 63.6, 63.75, 64.0, 1e9])
    scale = torch.tensor(0.25)
    unsigned = torch.tensor([0.0, 0.0, 0.25, 0.25, 0.25, 1.0, 63.5, 63.75, 63.75, 63.75])
    assert torch.equal(quantize_dequantize(x, scale, torch.tensor(0, dtype=torch.uint8)), unsigned)
    signed = torch.tensor([-32.0, -0.25, 0.25, 0.25, 0.25, 1.0, 31.75, 31.75, 31.75, 31.75])
    assert torch.equal(quantize_dequantize(x, scale, torch.tensor(0, dtype=torch.int8)), signed)


def test_ties_and_zero_point() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0])
    result = quantize_dequantize(x, torch.tensor(1.0), torch.tensor(100, dtype=torch.uint8))
    assert torch.equal(result, torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, 155.0, -100.0]))


@given(
    hnp.arrays("float32", st.integers(1, 50), elements=st.floats(-1e4, 1e4, width=32)).map(torch.from_numpy),
    st.floats(1e-3, 10),
    st.sampled_from([(kind, zero) for kind, (low, high) in KINDS.items() for zero in (low, 0, 7, high)]),
)
def test_idempotence(x: Tensor, scale: float, kind: tuple[torch.dtype, int]) -> None:
    zero_point = torch.tensor(kind[1], dtype=kind[0])
    once = quantize_dequantize(x, torch.tensor(scale), zero_point)
    torch.testing.assert_close(quantize_dequantize(once, torch.tensor(scale), zero_point), once, rtol=1e-6, atol=0)
    q = once.double() / float(torch.tensor(scale)) + kind[1]
    low, high = KINDS[kind[0]]
    assert bool(((q - q.round()).abs() < 1e-3).all()) and low <= q.min().round() and q.max().round() <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_input_unchanged(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3).to(dtype)
    before = x.clone()
    result = quantize_dequantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int8))
    assert result.dtype == dtype and result.shape == x.shape and torch.equal(x, before)


@given(WEIGHTS, st.integers(2, 8), st.data())
def test_weight_round_trip(weight: Tensor, bits: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, weight.ndim - 1))
    q, scale_O = quantize_weight(weight, axis, bits)
    limit = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and q.shape == weight.shape and int(q.abs().max()) <= limit
    assert scale_O.shape == (weight.shape[axis],) and bool((scale_O > 0).all())
    rows = weight.movedim(axis, 0).flatten(1)
    error = (dequantize_weight(q, scale_O, axis) - weight).movedim(axis, 0).flatten(1)
    inside = rows.abs() <= scale_O[:, None] * limit
    assert bool((error.abs() <= scale_O[:, None] / 2 * (1 + 1e-5) + 1e-7 * weight.abs().max())[inside].all())
    peak_O = rows.abs().amax(1) / limit
    unclipped, _ = quantize_weight(weight, axis, bits, torch.where(peak_O > 1e-30, peak_O, torch.ones_like(peak_O)))
    plain = (dequantize_weight(unclipped, torch.where(peak_O > 1e-30, peak_O, torch.ones_like(peak_O)), axis) - weight).movedim(axis, 0)
    assert bool((error.square().sum(1) <= plain.flatten(1).square().sum(1) * (1 + 1e-4) + 1e-9).all()), "clipping never loses"


def test_channel_scales() -> None:
    q, scale_O = quantize_weight(torch.tensor([[1e-6, -5e-7], [1e6, 3.0]]), 0)
    assert q.abs().amax(1).tolist() == [127, 127]
    torch.testing.assert_close(scale_O, torch.tensor([1e-6, 1e6]) / 127)


def test_zero_channel() -> None:
    q, scale_O = quantize_weight(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), 0)
    assert scale_O[0] == 1 and not q[0].any() and q[1].tolist() == [64, -127]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(torch.tensor([[1.0, bad]]), 0)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_weight_scales(groups: int) -> None:
    conv = nn.Conv2d(8, 16, 3, groups=groups)
    q, scale_O = quantize_weight(conv.weight, 0)
    assert q.shape == (16, 8 // groups, 3, 3)
    torch.testing.assert_close(scale_O, conv.weight.detach().abs().amax((1, 2, 3)) / 127)


def test_gradients_inside_and_outside() -> None:
    x = torch.tensor([-9.0, -0.6, 0.2, 0.9, 30.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rounded = round_to_grid(x, scale, -7, 7)
    assert rounded.tolist() == [-3.5, -0.5, 0.0, 1.0, 3.5]
    rounded.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    # LSQ, equation 3: the end of the grid outside, round(v) - v inside; divided by the root of the values times the largest level
    expected = -7 + (-1 + 1.2) + (0 - 0.4) + (2 - 1.8) + 7
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, torch.tensor(expected / (5 * 7) ** 0.5, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_gradients_of_channel_scales() -> None:
    weight = torch.randn(3, 4, 2, 2, requires_grad=True)
    scale = torch.full((3, 1, 1, 1), 0.1, requires_grad=True)
    round_to_grid(weight, scale, -7, 7)[1].sum().backward()
    assert scale.grad is not None and scale.grad.shape == (3, 1, 1, 1)
    assert scale.grad[1] != 0 and scale.grad[0] == 0 and scale.grad[2] == 0


def test_sqnr_value() -> None:
    signal = torch.tensor([3.0, 4.0])
    assert sqnr_db(signal, signal + torch.tensor([0.3, 0.4])) == pytest.approx(20)
    assert sqnr_db(signal, signal) == float("inf")
