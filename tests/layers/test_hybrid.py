"""HybridAttention and DenseAttention against the reference implementations. Axes as in the module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muntin.layers import DenseAttention, HybridAttention, LocalAttention

SIZES = [(1, 1), (1, 7), (5, 13), (17, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("heads", "local_heads"), [(2, 1), (3, 2), (4, 2)])  # of an odd number, the windows get one more
@pytest.mark.parametrize("batch", [1, 3])
def test_hybrid_by_formula(
    size: tuple[int, int],
    heads: int,
    local_heads: int,
    batch: int,
    by_window: Callable[[Tensor, int, int], Tensor],
    by_latent: Callable[[Tensor, int, int, int], Tensor],
) -> None:
    layer = HybridAttention(12, heads=heads, window=4, latents=5).double()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    local_dim = 12 // heads * local_heads
    local = by_window(layer.project_local(x_BHWC), local_heads, 4)
    latent = by_latent(layer.project_latent(x_BHWC), 12 - local_dim, heads - local_heads, 5)
    torch.testing.assert_close(layer(x_BHWC), layer.out(torch.cat([local, latent], -1)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_by_formula(size: tuple[int, int], heads: int, batch: int, by_window: Callable[[Tensor, int, int], Tensor]) -> None:
    layer = DenseAttention(12, heads=heads).double()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    expected = layer.out(by_window(layer.project(x_BHWC), heads, 17))
    torch.testing.assert_close(layer(x_BHWC), expected, rtol=0, atol=1e-11)


def test_local_with_one_window_equals_dense() -> None:
    dense = DenseAttention(12, heads=3).double()
    local = LocalAttention(12, heads=3, window=17).double()
    local.load_state_dict(dense.state_dict())
    x_BHWC = torch.randn(2, 17, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(local(x_BHWC), dense(x_BHWC), rtol=0, atol=1e-12)


def test_hybrid_with_one_head() -> None:
    with pytest.raises(ValueError, match="heads=1: a hybrid needs at least 2, one for windows and one for latents"):
        HybridAttention(8, heads=1, window=4, latents=4)
