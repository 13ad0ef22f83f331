"""Elementary operations as modules, so that a pass can find, measure and replace them.

A quantiser has to see every product, softmax and residual sum of a network; a bare function call is invisible to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Product(nn.Module):
    """Matrix product of two activations, `(..., I, J) x (..., J, L) -> (..., I, L)`; I·J·L multiply-adds a matrix."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)


class Softmax(nn.Module):
    """Softmax over one dimension, with an optional additive bias (0 keeps an entry, a large negative number hides it)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, logits: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            logits = logits + bias
        return torch.softmax(logits, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Sum(nn.Module):
    """The sum of a residual stream and its branches, all of one shape."""

    def forward(self, stream: Tensor, *branches: Tensor) -> Tensor:
        for branch in branches:
            stream = stream + branch
        return stream
