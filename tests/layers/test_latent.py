"""GlobalAttention against the reference implementation. Axes as in the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muntin.layers import GlobalAttention, merge, partition


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13), (17, 9)])
@pytest.mark.parametrize(("heads", "latents"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_global_by_formula(
    size: tuple[int, int], heads: int, latents: int, batch: int, by_latent: Callable[[Tensor, int, int, int], Tensor]
) -> None:
    layer = GlobalAttention(12, heads=heads, latents=latents).double()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    expected = layer.out(by_latent(layer.project(x_BHWC), 12, heads, latents))
    torch.testing.assert_close(layer(x_BHWC), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [1, 4, 32])
def test_global_in_windowed_form(window: int) -> None:
    layer = GlobalAttention(12, heads=3, latents=5).double()
    x_BHWC = torch.randn(2, 5, 13, 12, dtype=torch.float64)
    t_STC, grid = partition(x_BHWC, window)
    torch.testing.assert_close(merge(layer.attend(t_STC, grid), grid), layer(x_BHWC), rtol=0, atol=1e-12)


def test_global_reach_of_one_token() -> None:
    layer = GlobalAttention(8, heads=2, latents=3).double()
    x_BHWC = torch.randn(2, 9, 9, 8, dtype=torch.float64)
    changed = x_BHWC.clone()
    changed[0, 5, 6] += 1
    differs_BHW = (layer(changed) - layer(x_BHWC)).abs().amax(-1) > 1e-12
    assert differs_BHW[0].all() and not differs_BHW[1].any()
