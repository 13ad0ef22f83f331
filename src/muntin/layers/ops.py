"""Elementary operations as modules, so that a compression pass can find, measure and replace them.

A quantiser must see every product, softmax and residual sum of a network; it cannot see a function call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name


class Product(nn.Module):
    """Matrix product of two activations, `(..., I, J) x (..., J, L) -> (..., I, L)`; I·J·L multiply-adds a matrix."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class SoftmaxProduct(nn.Module):
    """softmax(logits + bias)·values, the softmax over the last axis: `(..., I, J), (..., J, L) -> (..., I, L)`.

    I·J·L multiply-adds a matrix. A `bias` of 0 keeps an entry, a large negative bias hides it. It is one operation because its quantised
    form divides after the product: a normalised weight over J entries shrinks as 1/J, and for a large image it is 0 in 8 bits.
    """

    def forward(self, logits: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            logits = logits + bias
        return torch.matmul(torch.softmax(logits, -1), values)


class DenseProduct(nn.Module):
    """softmax(q·kᵀ / √D)·v by PyTorch's fused SDPA, `(B, E, N, D)` of three inputs to the same shape; 2·N²·D multiply-adds a head."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Gain(nn.Module):
    """Multiply by a fixed factor: in training with Adam the output changes `factor` times as fast."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Sum(nn.Module):
    """Add a residual stream and its branches, all of the same shape."""

    def forward(self, stream: Tensor, *branches: Tensor) -> Tensor:
        for branch in branches:
            stream = stream + branch
        return stream
