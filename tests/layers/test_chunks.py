"""Operators in chunks: the same answers and gradients as whole, within a bound on temporary memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import muntin
from model_helpers import LiveBytes
from muntin.layers import GlobalAttention, HybridAttention, LocalAttention, Perceptron, SerialBlock, chunked, partition
from muntin.layers.chunks import in_chunks, perceptrons_of, rows_within
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.layers.ops import DenseProduct

Case = tuple[nn.Module, tuple[Any, ...]]


def windows(size: int, channels: int) -> tuple[Any, ...]:
    """Random tokens `(S, T, channels)` of two maps in windows of 8, and their grid; the last windows are padded if 8 does not divide it."""
    t_STC, grid = partition(torch.randn(2, size, size + 8, channels).double(), 8)
    return t_STC.requires_grad_(), grid


def gated() -> nn.Module:
    perceptron = Perceptron(24, 96, gate=True)
    nn.init.uniform_(perceptron.gate.logit, 0.2, 0.8)  # type: ignore[arg-type]
    return perceptron


OPERATORS: dict[str, Callable[[], Case]] = {
    "perceptron": lambda: (gated(), (torch.randn(2, 30, 20, 24).double().requires_grad_(),)),
    "foreign": lambda: (
        nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 96), nn.GELU(), nn.Dropout(0.0), nn.Linear(96, 24)),
        (torch.randn(1201, 24).double().requires_grad_(),),
    ),
    "windows": lambda: (WindowMixer(24, 3), windows(56, 72)),
    "padded windows": lambda: (WindowMixer(24, 3), windows(50, 72)),
    "latents": lambda: (LatentMixer(24, 3, 16), windows(56, 24 + 2 * 3 * 16)),
    "padded latents": lambda: (LatentMixer(24, 3, 16), windows(50, 24 + 2 * 3 * 16)),
    "dense": lambda: (DenseProduct(), tuple(torch.randn(2, 3, 500, 8).double().requires_grad_() for _ in range(3))),
}


def computed(operator: nn.Module, inputs: tuple[Any, ...], gradient: bool) -> tuple[list[Tensor], int]:
    """The answer and all gradients, and the peak of memory beside them, bytes."""
    tensors = [value for value in (*inputs, *operator.parameters()) if isinstance(value, Tensor)]
    with torch.set_grad_enabled(gradient), sdpa_kernel(SDPBackend.MATH), LiveBytes() as live:
        answer = operator(*inputs)
        weights = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).reshape(answer.shape) if gradient else None
        results = [answer.detach(), *(torch.autograd.grad(answer, tensors, weights) if gradient else ())]
    outputs = [*results, *([] if weights is None else [weights])]
    return results, live.peak - sum(tensor.numel() * tensor.element_size() for tensor in outputs)


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
@pytest.mark.parametrize("share", [4, 16])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_within_memory(name: str, share: int, gradient: bool) -> None:
    operator, inputs = OPERATORS[name]()
    operator = operator.double()
    expected, whole = computed(operator, inputs, gradient)
    memory = whole // share
    with chunked(operator, memory=memory) as names:
        assert names == ("",)
        results, peak = computed(operator, inputs, gradient)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)
    # beside the bound: maximum, sum and value of each latent, in some copies; two answers of dense attention, which joins its chunks
    state = {"latents": 5 * 2 * 3 * 16 * (8 + 2) * 8, "dense": 2 * expected[0].nbytes}.get(name.removeprefix("padded "), 0)
    assert peak <= memory + state, (peak, memory, whole)


def test_rows_of_a_chunk() -> None:
    """Chunks of one size, at least one row."""
    assert [rows_within(1000, 10, rows) for rows in (0, 1, 100, 101, 150, 201)] == [0, 1, 100, 51, 75, 67]
    assert rows_within(9, 10, 3) == 1


def test_blocks_in_chunks() -> None:
    """A whole block, attention and perceptron, in training and in inference; afterwards it is as before."""
    for attention in (LocalAttention(24, heads=3, window=4), GlobalAttention(24, heads=3, latents=5)):
        block = SerialBlock(24, attention=attention).double()
        x = torch.randn(2, 17, 22, 24).double()
        expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
        with chunked(block, memory=20_000) as names:
            assert names == ("attention.mixer", "mlp")
            results = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
            with torch.inference_mode():
                inferred = block(x)
            copied = copy.deepcopy(block)
        torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(inferred, block(x))
        torch.testing.assert_close(copied(x), block(x))
        assert not any("forward" in module.__dict__ for module in block.modules())


def test_chunks_under_autocast() -> None:
    """Weights that are cast to BF16 get their gradients, also if the backward pass runs under autocast."""
    torch.manual_seed(1)
    layer = nn.Sequential(HybridAttention(32, heads=4, window=4, latents=8), Perceptron(32, 128, gate=False))
    x, gradients = torch.randn(2, 24, 24, 32), []
    for memory in (1 << 40, 30_000):
        with chunked(layer, memory=memory), torch.autocast("cpu", torch.bfloat16):
            answer = layer(x)
            assert answer.dtype is torch.bfloat16
            gradients.append(torch.autograd.grad(answer.float().square().sum(), list(layer.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(one.abs().max()))


def test_models_in_chunks() -> None:
    """Which perceptrons of other packages are taken; layers that mix tokens or draw numbers are left alone."""
    vit = muntin.create_model("timm:vit_tiny_patch16_224", task="classify", classes=3)
    assert {type(each).__name__ for each in perceptrons_of(vit).values()} == {"Mlp"} and len(perceptrons_of(vit)) == 12
    random = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    maps = nn.Sequential(nn.LayerNorm([4, 4]), nn.Linear(4, 8), nn.Linear(8, 4))
    assert perceptrons_of(nn.ModuleList([random, mixing, maps])) == {}
    with pytest.raises(ValueError, match="memory=0: give at least 1 byte"), chunked(vit, memory=0):
        pass


def test_frozen_weights() -> None:
    """Only what needs a gradient gets one, and inputs without one are allowed."""
    layer = Perceptron(8, 32, gate=False).double()
    layer.expand.requires_grad_(False)
    x = torch.randn(50, 8).double()
    layer(x).sum().backward()
    expected = layer.reduce.weight.grad
    layer.zero_grad()
    with chunked(layer, memory=5000):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.reduce.weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert layer.expand.weight.grad is None


def test_second_derivative_in_chunks() -> None:
    x = torch.randn(6, 2).double().requires_grad_()
    answer = in_chunks(torch.sin, [x], rows=2)
    (gradient,) = torch.autograd.grad(answer.square().sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, (2 * x).sin())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
