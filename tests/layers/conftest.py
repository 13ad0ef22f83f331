"""Reference implementations from the definitions, in float64 and plain loops, and fixtures for tests of layers.

Axes: B images, H W map, N tokens an image, C channels, I channels of a projection, E heads, D channels a head, M latents.
"""
# ruff: noqa: F722 - shapes in annotations are jaxtyping's, not Python

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from jaxtyping import Float64, jaxtyped
from torch import Tensor

from model_helpers import one_seed_one_thread
from muntin.layers import Attention, DenseAttention, GlobalAttention, Grid, HybridAttention, LocalAttention, partition

__all__ = ["one_seed_one_thread"]
LAYERS: dict[str, Callable[[], Attention]] = {
    "local": lambda: LocalAttention(12, heads=3, window=4),
    "global": lambda: GlobalAttention(12, heads=3, latents=5),
    "hybrid": lambda: HybridAttention(12, heads=3, window=4, latents=5),
    "dense": lambda: DenseAttention(12, heads=3),
}


@pytest.fixture(params=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> Attention:
    """Each of the four attention layers, in float64."""
    return LAYERS[request.param]().double()


@pytest.fixture(params=["local", "hybrid"])
def windowed_layer(request: pytest.FixtureRequest) -> Attention:
    """The attention layers that cut the map into windows and may pad it."""
    return LAYERS[request.param]().double()


def softmax(logits: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) along the last axis."""
    weights = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True)


@jaxtyped(typechecker=beartype)
def attend_reference(qkv_NI: Float64[Tensor, "N I"], heads: int) -> Float64[Tensor, "N C"]:
    """Multi-head attention among the N tokens. The projection holds Q, K and V, each of them by head."""
    tokens, channels = qkv_NI.shape[0], qkv_NI.shape[1] // 3
    size = channels // heads
    out_NC = torch.zeros(tokens, channels, dtype=torch.float64)
    for head in range(heads):
        q_ND, k_ND, v_ND = (qkv_NI[:, part * channels + head * size : part * channels + (head + 1) * size] for part in range(3))
        weights_NN = softmax(torch.einsum("qd,kd->qk", q_ND, k_ND) / size**0.5)
        out_NC[:, head * size : (head + 1) * size] = torch.einsum("qk,kd->qd", weights_NN, v_ND)
    return out_NC


@jaxtyped(typechecker=beartype)
def window_reference(qkv_BHWI: Float64[Tensor, "B H W I"], heads: int, window: int) -> Float64[Tensor, "B H W C"]:
    """Attention inside each window. Windows at the border are smaller, without padding."""
    batch, height, width, inputs = qkv_BHWI.shape
    out_BHWC = torch.zeros(batch, height, width, inputs // 3, dtype=torch.float64)
    for image in range(batch):
        for top in range(0, height, window):
            for left in range(0, width, window):
                index = (image, slice(top, top + window), slice(left, left + window))
                inside = qkv_BHWI[index]
                out_BHWC[index] = attend_reference(inside.reshape(-1, inputs), heads).reshape(*inside.shape[:2], -1)
    return out_BHWC


@jaxtyped(typechecker=beartype)
def latent_reference(p_BHWI: Float64[Tensor, "B H W I"], dim: int, heads: int, latents: int) -> Float64[Tensor, "B H W C"]:
    """Each latent of a head reads all tokens of its image; each token reads all latents of the head."""
    batch, height, width, _ = p_BHWI.shape
    size = dim // heads
    out_BNC = torch.zeros(batch, height * width, dim, dtype=torch.float64)
    for image, p_NI in enumerate(p_BHWI.reshape(batch, height * width, -1)):
        values_NC, read_NL, write_NL = p_NI[:, :dim], p_NI[:, dim : dim + heads * latents], p_NI[:, dim + heads * latents :]
        for head in range(heads):
            v_ND = values_NC[:, head * size : (head + 1) * size]
            head_latents = slice(head * latents, (head + 1) * latents)
            latent_MD = torch.stack([softmax(logits_N) @ v_ND for logits_N in read_NL[:, head_latents].T])
            for token in range(height * width):
                out_BNC[image, token, head * size : (head + 1) * size] = softmax(write_NL[token, head_latents]) @ latent_MD
    return out_BNC.reshape(batch, height, width, dim)


@pytest.fixture
def by_window() -> Callable[[Tensor, int, int], Tensor]:
    return window_reference


@pytest.fixture
def by_latent() -> Callable[[Tensor, int, int, int], Tensor]:
    return latent_reference


@pytest.fixture
def garbage() -> Callable[[Tensor, int | None], tuple[Tensor, Tensor, Grid]]:
    """A function that gives the windowed form of a map padded with zeros, and padded with large random numbers."""

    def pad(x_BHWC: Tensor, window: int | None) -> tuple[Tensor, Tensor, Grid]:
        t_STC, grid = partition(x_BHWC, window)
        assert grid.bias_S1T is not None
        padding_ST1 = (grid.bias_S1T != 0).transpose(1, 2)
        assert padding_ST1.any(), "this size needs no padding, so the test would pass without a check"
        return t_STC, torch.where(padding_ST1, 1e3 * torch.randn_like(t_STC), t_STC), grid

    return pad
