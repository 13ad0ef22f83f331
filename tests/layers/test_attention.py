"""Properties of all four attention layers: shapes, independence of images, cost, errors. Axes as in the modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muntin.layers import Attention, DenseAttention, GlobalAttention, Grid, HybridAttention, LocalAttention, merge

SIZES = [(1, 1), (1, 7), (5, 13), (17, 9)]
DIM, HEADS, WINDOW, LATENTS = 24, 3, 4, 5


def macs_a_token(layer: Attention, side: int) -> float:
    """Multiply-adds a token on a side x side map, by PyTorch's counter, which does not count the CPU's fused attention."""
    x_BHWC = torch.zeros(1, side, side, layer.dim)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        layer(x_BHWC)
    return counter.get_total_flops() / 2 / side**2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_output_shape(layer: Attention, size: tuple[int, int], batch: int) -> None:
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    out_BHWC = layer(x_BHWC)
    assert out_BHWC.shape == x_BHWC.shape and out_BHWC.dtype == torch.float64 and out_BHWC.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_attention_of_one_image_and_of_a_batch(layer: Attention, size: tuple[int, int]) -> None:
    x_BHWC = torch.randn(3, *size, 12, dtype=torch.float64)
    alone = torch.cat([layer(image[None]) for image in x_BHWC])
    torch.testing.assert_close(layer(x_BHWC), alone, rtol=0, atol=1e-12)


def test_attention_of_non_contiguous_input(layer: Attention) -> None:
    x_BCHW = torch.randn(2, 12, 5, 13, dtype=torch.float64)
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x_BHWC), layer(x_BHWC.contiguous()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_attention_with_any_padding(
    windowed_layer: Attention, size: tuple[int, int], garbage: Callable[[Tensor, int | None], tuple[Tensor, Tensor, Grid]]
) -> None:
    x_BHWC = torch.randn(2, *size, 12, dtype=torch.float64)
    clean_STC, dirty_STC, grid = garbage(x_BHWC, windowed_layer.window)
    clean = merge(windowed_layer.attend(clean_STC, grid), grid)
    dirty = merge(windowed_layer.attend(dirty_STC, grid), grid)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=1e-12)
    torch.testing.assert_close(windowed_layer(x_BHWC), clean, rtol=0, atol=1e-12)


def test_attention_gradient_at_padding(
    windowed_layer: Attention, garbage: Callable[[Tensor, int | None], tuple[Tensor, Tensor, Grid]]
) -> None:
    _, dirty_STC, grid = garbage(torch.randn(2, 5, 13, 12, dtype=torch.float64), windowed_layer.window)
    dirty_STC.requires_grad_()
    merge(windowed_layer.attend(dirty_STC, grid), grid).square().sum().backward()
    assert dirty_STC.grad is not None and grid.bias_S1T is not None
    padding_ST = grid.bias_S1T.squeeze(1) != 0
    assert (dirty_STC.grad[padding_ST] == 0).all() and (dirty_STC.grad[~padding_ST] != 0).any()


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 11), width=st.integers(1, 11), extra=st.integers(0, 9))
def test_attention_with_windows_larger_than_the_map(height: int, width: int, extra: int) -> None:
    side = max(height, width)
    x_BHWC = torch.randn(2, height, width, 12, dtype=torch.float64)
    for make in (
        lambda window: LocalAttention(12, heads=2, window=window),
        lambda window: HybridAttention(12, heads=2, window=window, latents=3),
    ):
        exact, padded = make(side).double(), make(side + extra).double()
        padded.load_state_dict(exact.state_dict())
        torch.testing.assert_close(padded(x_BHWC), exact(x_BHWC), rtol=0, atol=1e-12)


def test_attention_gradient_by_finite_differences(layer: Attention) -> None:
    x_BHWC = torch.randn(1, 2, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x_BHWC,), fast_mode=True)


FORMULAS: dict[str, tuple[Callable[[], Attention], Callable[[int], float]]] = {  # layer, multiply-adds a token given H·W
    "local": (lambda: LocalAttention(DIM, heads=HEADS, window=WINDOW), lambda n: 4 * DIM**2 + 2 * WINDOW**2 * DIM),
    "global": (
        lambda: GlobalAttention(DIM, heads=HEADS, latents=LATENTS),
        lambda n: 2 * DIM**2 + 2 * HEADS * LATENTS * DIM + 2 * LATENTS * DIM,
    ),
    "hybrid": (  # 2 local heads of 8 channels, 1 global one
        lambda: HybridAttention(DIM, heads=HEADS, window=WINDOW, latents=LATENTS),
        lambda n: DIM * (3 * 16 + 8 + 2 * 1 * LATENTS) + DIM**2 + 2 * WINDOW**2 * 16 + 2 * LATENTS * 8,
    ),
    "dense": (lambda: DenseAttention(DIM, heads=HEADS), lambda n: 4 * DIM**2 + 2 * n * DIM),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_attention_cost_by_formula(name: str) -> None:
    make, formula = FORMULAS[name]
    for side in (8, 16):
        assert macs_a_token(make(), side) == formula(side**2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalAttention(10, heads=3, window=4),
        lambda: GlobalAttention(10, heads=3, latents=4),
        lambda: HybridAttention(10, heads=3, window=4, latents=4),
        lambda: DenseAttention(10, heads=3),
        lambda: DenseAttention(10, heads=0),
        lambda: DenseAttention(0, heads=1),
    ],
)
def test_attention_with_heads_that_do_not_divide(make: Callable[[], Attention]) -> None:
    with pytest.raises(ValueError, match=r"dim=\d+ cannot be split into heads=\d+: heads must divide dim"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalAttention(8, heads=2, window=0), "window=0: it must be at least 1"),
        (lambda: GlobalAttention(8, heads=2, latents=0), "latents=0: it must be at least 1"),
        (lambda: HybridAttention(8, heads=2, window=-1, latents=1), "window=-1: it must be at least 1"),
        (lambda: HybridAttention(8, heads=2, window=1, latents=0), "latents=0: it must be at least 1"),
    ],
)
def test_attention_with_sizes_below_one(make: Callable[[], Attention], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
