"""ParallelBlock and SerialBlock: their formulas, equal cost, padding, gates. Axes as in the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.utils.flop_counter import FlopCounterMode

from muntin.layers import ChannelGate, GlobalAttention, Grid, HybridAttention, LocalAttention, ParallelBlock, SerialBlock, merge, partition

Block = ParallelBlock | SerialBlock
BLOCKS = [ParallelBlock, SerialBlock]


def make(kind: type[Block], **options: Any) -> Block:
    """A block in float64 with random norms and gates."""
    block = kind(12, attention=HybridAttention(12, heads=3, window=4, latents=5), **options).double()
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if "norm" in name or "logit" in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return block


def affine(norm: Any, x: Tensor) -> Tensor:
    return (x - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias


def perceptron(block: Block, x: Tensor) -> Tensor:
    hidden = F.relu(x @ block.mlp.expand.weight.T + block.mlp.expand.bias) * block.mlp.gate.logit.clamp(0, 1)
    return hidden @ block.mlp.reduce.weight.T + block.mlp.reduce.bias


def macs(block: Block, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.zeros(1, side, side, 12, dtype=torch.float64))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13)])
@pytest.mark.parametrize("batch", [1, 3])
def test_parallel_block_by_formula(size: tuple[int, int], batch: int) -> None:
    block = make(ParallelBlock).eval()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    normed = affine(block.norm, x_BHWC)
    expected = x_BHWC + block.attention(normed) + perceptron(block, normed)
    torch.testing.assert_close(block(x_BHWC), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13)])
@pytest.mark.parametrize("batch", [1, 3])
def test_serial_block_by_formula(size: tuple[int, int], batch: int) -> None:
    block = make(SerialBlock).eval()
    x_BHWC = torch.randn(batch, *size, 12, dtype=torch.float64)
    y_BHWC = x_BHWC + block.attention(affine(block.norm_attention, x_BHWC))
    expected = y_BHWC + perceptron(block, affine(block.norm_mlp, y_BHWC))
    torch.testing.assert_close(block(x_BHWC), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_block_cost_by_formula(ratio: float) -> None:
    parallel, serial = make(ParallelBlock, mlp_ratio=ratio), make(SerialBlock, mlp_ratio=ratio)
    # 2 local heads of 4 channels and 1 global one, then 2·C·hidden for the perceptron
    token = 12 * (3 * 8 + 4 + 2 * 5) + 12**2 + 2 * 16 * 8 + 2 * 5 * 4 + 2 * 12 * int(12 * ratio)
    assert macs(parallel, 8) == macs(serial, 8) == token * 64


def test_block_parameter_count() -> None:
    count = [sum(p.numel() for p in make(kind).parameters()) for kind in BLOCKS]
    assert count[1] - count[0] == 2 * 12


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_block_with_any_padding(
    kind: type[Block], training: bool, garbage: Callable[[Tensor, int | None], tuple[Tensor, Tensor, Grid]]
) -> None:
    block = make(kind).train(training)
    clean_STC, dirty_STC, grid = garbage(torch.randn(3, 5, 13, 12, dtype=torch.float64), block.window)
    clean, dirty = (merge(block.attend(t_STC, grid), grid) for t_STC in (clean_STC, dirty_STC))
    torch.testing.assert_close(dirty, clean, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_block_stage_in_windowed_form(kind: type[Block], training: bool) -> None:
    # In windowed form the padding keeps the output of the block before; `partition` resets it to zero.
    blocks = [make(kind).train(training) for _ in range(3)]
    x_BHWC = torch.randn(2, 5, 13, 12, dtype=torch.float64)
    t_STC, grid = partition(x_BHWC, 4)
    for block in blocks:
        t_STC = block.attend(t_STC, grid)
        x_BHWC = block(x_BHWC)
    torch.testing.assert_close(merge(t_STC, grid), x_BHWC, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_gradient_of_16_and_of_8_images(kind: type[Block]) -> None:
    block = make(kind).train()
    x_BHWC = torch.randn(16, 5, 3, 12, dtype=torch.float64)
    whole = block(x_BHWC)
    whole.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    for part in x_BHWC.split(8):
        (block(part).square().mean() / 2).backward()
    for once, twice in zip(gradients, (parameter.grad for parameter in block.parameters()), strict=True):
        torch.testing.assert_close(twice, once, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_of_one_image_and_of_a_batch(kind: type[Block]) -> None:
    block = make(kind).eval()
    x_BHWC = torch.randn(3, 5, 13, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x_BHWC), torch.cat([block(x[None]) for x in x_BHWC]), rtol=0, atol=1e-11)


def test_block_with_closed_channels() -> None:
    block = make(ParallelBlock).eval()
    with torch.no_grad():
        block.mlp.gate.logit[::3] = torch.tensor(-0.1)
    keep = block.mlp.gate.open_channels()
    assert keep.sum() == 16
    x_BHWC = torch.randn(2, 5, 13, 12, dtype=torch.float64)
    before = block(x_BHWC)
    with torch.no_grad():
        block.mlp.expand.weight[~keep] = 1e9
        block.mlp.reduce.weight[:, ~keep] = 7.0
    torch.testing.assert_close(block(x_BHWC), before, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_without_a_gate(kind: type[Block]) -> None:
    assert not any(isinstance(module, ChannelGate) for module in make(kind, gate=False).modules())


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_window(kind: type[Block]) -> None:
    assert kind(8, attention=LocalAttention(8, heads=2, window=5)).window == 5
    assert kind(8, attention=GlobalAttention(8, heads=2, latents=5)).window is None


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_with_attention_of_another_width(kind: type[Block]) -> None:
    with pytest.raises(ValueError, match="attention works on 8 channels, the block on dim=12: make them equal"):
        kind(12, attention=GlobalAttention(8, heads=2, latents=5))


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_without_hidden_channels(kind: type[Block]) -> None:
    with pytest.raises(ValueError, match="dim · mlp_ratio=0: it must be at least 1"):
        kind(8, attention=GlobalAttention(8, heads=2, latents=5), mlp_ratio=0.01)
