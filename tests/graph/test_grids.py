"""The 8-bit grid that a graph's activation gets."""

from __future__ import annotations

import numpy as np
import pytest

from muntin.graph.grids import RangeObserver


@pytest.mark.parametrize(("low", "unsigned", "levels"), [(0.0, True, 255), (-1.0, False, 127)])
def test_levels_of_a_range(low: float, unsigned: bool, levels: int) -> None:
    """The output of a ReLU gets all 256 levels, and zero stays exact."""
    values = np.linspace(low, 1.0, 5000, dtype=np.float32)
    observer = RangeObserver()
    observer.see_range(float(values.min()), float(values.max()))
    observer.see_values(values)
    grid = observer.grid()
    assert (grid.unsigned, grid.zero_point) == (unsigned, 0)
    assert grid.scale == pytest.approx(1 / levels, rel=0.02)


def test_range_of_a_constant() -> None:
    observer = RangeObserver()
    observer.see_range(0.0, 0.0)
    assert observer.grid().unsigned and observer.grid().scale == pytest.approx(1, abs=1e-6)


def test_range_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        RangeObserver().see_range(0.0, float("inf"))


def test_zero_point() -> None:
    """Of values like those after GELU; even ones keep a symmetric grid, and products of two activations do."""
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    for one, zero_point in ((np.maximum(values, -0.17), True), (values, False)):
        observer = RangeObserver()
        observer.see_range(float(one.min()), float(one.max()))
        observer.see_values(one)
        grid = observer.grid()
        assert (grid.zero_point > 0, grid.unsigned, grid.zero_point % 2) == (zero_point, zero_point, 0)
        assert observer.grid(symmetric=True).zero_point == 0
