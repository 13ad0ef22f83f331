"""The grid of calibration: invariants for any values, and clipping of outliers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from muntin.compression.quantization.fake_quantization import quantize_dequantize
from muntin.compression.quantization.observer import BINS, SHRINKS, ActivationGrid, Observer

FINITE = st.floats(-1e6, 1e6, width=32)
VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=FINITE).map(torch.from_numpy)


def observe(*tensors: Tensor) -> Observer:
    observer = Observer()
    for tensor in tensors:
        observer.see_range(tensor)
    for tensor in tensors:
        observer.see_values(tensor)
    return observer


def rounded(x: Tensor, grid: ActivationGrid) -> Tensor:
    kind = torch.uint8 if grid.unsigned else torch.int8
    values: Tensor = quantize_dequantize(x, torch.tensor(grid.scale), torch.tensor(grid.zero_point, dtype=kind))
    return values


def rms(x: Tensor, scale: float, unsigned: bool) -> float:
    grid = ActivationGrid(scale=scale, unsigned=unsigned)
    return float((x.double() - rounded(x, grid).double()).square().mean().sqrt())


@given(VALUES)
def test_error_inside_the_grid(x: Tensor) -> None:
    observer = observe(x)
    grid = observer.grid()
    lowest, highest = (0, 255) if grid.unsigned else (-127, 127)
    inside = (x.double() >= lowest * grid.scale) & (x.double() <= highest * grid.scale)
    error = (x - rounded(x, grid)).double().abs()
    assert bool((error[inside] <= grid.scale / 2 * (1 + 1e-5) + 1e-6 * x.double().abs()[inside]).all())
    if inside.all():
        assert bool((error <= grid.scale * 1.01 + (observer.high - observer.low) / BINS).all())


@given(VALUES)
def test_grid_range(x: Tensor) -> None:
    grid = observe(x).grid()
    peak = float(x.abs().max())
    assume(peak > 1e-30)
    end = grid.scale * (255 if grid.unsigned else 127)
    assert peak * (1 - 0.8 * (SHRINKS - 1) / SHRINKS) * (1 - 1e-5) <= end <= peak * (1 + 1e-5)


@given(VALUES)
def test_scale_and_sign(x: Tensor) -> None:
    grid = observe(x).grid()
    assert grid.scale > 0 and np.isfinite(grid.scale) and float(np.float32(grid.scale)) == grid.scale
    assert grid.unsigned == bool((x >= 0).all())


@given(FINITE, st.integers(1, 50))
def test_constant_tensor(value: float, count: int) -> None:
    x = torch.full((count,), value)
    error = (x - rounded(x, observe(x).grid())).abs().max()
    assert error <= 2e-7 * abs(value) or abs(value) < 1e-35  # below, float32 has no scale that is small enough


@pytest.mark.parametrize("value", [1e-45, 1e-40, 3e38, -3e38])
def test_ends_of_float32(value: float) -> None:
    for x in (torch.tensor([value]), torch.tensor([value, 0.0])):
        grid = observe(x).grid()
        assert grid.scale >= torch.finfo(torch.float32).tiny
        assert torch.isfinite(rounded(x, grid)).all()


@given(VALUES)
def test_error_against_the_extremes_grid(x: Tensor) -> None:
    observer = observe(x)
    grid = observer.grid()
    extremes = float(x.abs().max()) / (255 if grid.unsigned else 127)
    assume(extremes > 1e-30)
    # The distance to a grid changes by no more than the value does, so the histogram is off by half a bin for each of the two.
    bin_width = (observer.high - observer.low) / BINS
    assert rms(x, grid.scale, grid.unsigned) <= rms(x, extremes, grid.unsigned) * (1 + 1e-4) + bin_width * (1 + 1e-4)


@pytest.mark.parametrize("unsigned", [True, False])
def test_outliers_are_clipped(unsigned: bool) -> None:
    x = torch.cat([torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)), torch.tensor([12.0])])
    x = x.relu() if unsigned else x
    grid = observe(x).grid()
    levels = 255 if unsigned else 127
    assert grid.unsigned == unsigned
    assert 0 < (x.abs() > grid.scale * (levels + 0.5)).double().mean() < 1e-3
    assert rms(x, grid.scale, unsigned) < 0.8 * rms(x, 12 / levels, unsigned)


@given(VALUES)
def test_zero_points(x: Tensor) -> None:
    observer = observe(x)
    grid, symmetric = observer.grid(asymmetric=True), observer.grid()
    assert grid.zero_point % 2 == 0 and 0 <= grid.zero_point <= 254
    assert grid.unsigned or x.min() == x.max() < 0
    assert bool((rounded(torch.zeros(1), grid) == 0).all())
    bin_width = (observer.high - observer.low) / BINS
    assert errors_of(x, grid) <= errors_of(x, symmetric) * (1 + 1e-4) + bin_width * (1 + 1e-4)


def errors_of(x: Tensor, grid: ActivationGrid) -> float:
    """The root mean square error."""
    return float((x.double() - rounded(x, grid).double()).square().mean().sqrt())


@pytest.mark.parametrize("percentile", [None, 100.0, 99.99])
def test_grid_of_uneven_sides(percentile: float | None) -> None:
    x = torch.nn.functional.gelu(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    observer = observe(x)
    grid, symmetric = observer.grid(percentile, asymmetric=True), observer.grid(percentile)
    assert grid.unsigned and 0 < grid.zero_point < 30 and not symmetric.unsigned
    assert errors_of(x, grid) < 0.7 * errors_of(x, symmetric)
    even = observe(torch.cat([torch.linspace(-1, 1, 101), torch.tensor([-128 / 127])]))
    assert even.grid(asymmetric=True).ends == even.grid().ends


def test_uniform_values_are_not_clipped() -> None:
    grid = observe(torch.linspace(-1, 1, 10_001)).grid()
    assert grid.scale == pytest.approx(1 / 127, rel=0.02)


@given(VALUES, st.lists(st.integers(0, 200), max_size=4))
def test_many_calls(x: Tensor, cuts: Sequence[int]) -> None:
    parts = torch.tensor_split(x, sorted(min(cut, len(x)) for cut in cuts))  # some are empty
    assert observe(*parts).grid() == observe(x).grid()


@given(VALUES)
def test_histogram_count(x: Tensor) -> None:
    observer = observe(x)
    assert observer.histogram.sum() == (len(x) if observer.high > observer.low else 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_not_finite(bad: float) -> None:
    observer = Observer()
    observer.see_range(torch.ones(3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        observer.see_range(torch.tensor([0.0, bad, 1.0]))
    assert (observer.low, observer.high) == (1, 1)


def test_unseen_tensor() -> None:
    assert not Observer().seen
    assert not observe(torch.empty(0, 4)).seen
    assert observe(torch.zeros(1)).seen


def test_scale_of_raw_bytes() -> None:
    grid = observe(torch.arange(256.0)).grid()
    assert grid.unsigned and grid.scale != 1
    assert torch.equal(rounded(torch.arange(256.0), grid).round(), torch.arange(256.0))


def test_half_precision() -> None:
    x = torch.linspace(-3, 3, 101).to(torch.bfloat16)
    assert observe(x).grid() == observe(x.float()).grid()
