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


class SoftmaxProduct(nn.Module):
    """softmax(logits)·values, the softmax over the last dimension: `(..., I, J), (..., J, L) -> (..., I, L)`; I·J·L multiply-adds a matrix.

    One operation, not a softmax and a product, since its quantised form divides after the product: a normalised weight over J entries
    shrinks as 1/J, and over a large image it vanishes in 8 bits. `bias` is added to the logits: 0 keeps an entry, a large negative
    number hides it.
    """

    def forward(self, logits: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            logits = logits + bias
        return torch.matmul(torch.softmax(logits, -1), values)


class Gain(nn.Module):
    """A fixed factor. What it scales is learned so many times faster: an optimiser's steps are as long as the rate, whatever they move."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Sum(nn.Module):
    """The sum of a residual stream and its branches, all of one shape."""

    def forward(self, stream: Tensor, *branches: Tensor) -> Tensor:
        for branch in branches:
            stream = stream + branch
        return stream
