"""LocalAttention against the reference implementation. Axes as in the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muntin.layers import LocalAttention


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (4, 8), (5, 13), (17, 9)])
@pytest.mark.parametrize(("heads", "window"), [(1, 4), (3, 4), (2, 1), (2, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_local_by_formula(
    size: tuple[int, int], heads: int, window: int, batch: int, by_window: Callable[[Tensor, int, int], Tensor]
) -> None:
    layer = LocalAttention(12, heads=heads, window=window).double()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    expected = layer.out(by_window(layer.project(x_BHWC), heads, window))
    torch.testing.assert_close(layer(x_BHWC), expected, rtol=0, atol=1e-11)


def test_local_reach_of_one_token() -> None:
    layer = LocalAttention(8, heads=2, window=4).double()
    x_BHWC = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    changed = x_BHWC.clone()
    changed[0, 5, 6] += 1
    differs_HW = (layer(changed) - layer(x_BHWC)).abs().amax(-1)[0] > 1e-12
    assert differs_HW[4:8, 4:8].all() and differs_HW.sum() == 16


@pytest.mark.parametrize("scale", [255, 1e3, 1e5])
def test_local_with_large_logits(scale: float, by_window: Callable[[Tensor, int, int], Tensor]) -> None:
    layer = LocalAttention(8, heads=2, window=4).double()
    x_BHWC = scale * torch.randn(3, 5, 5, 8, dtype=torch.float64)
    expected = layer.out(by_window(layer.project(x_BHWC), 2, 4))
    torch.testing.assert_close(layer(x_BHWC), expected)
    assert layer.float()(x_BHWC.float()).isfinite().all()
