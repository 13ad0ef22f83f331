"""ParallelBlock and its serial twin: attention and a two-layer perceptron around one residual stream.

Axes: B images, H W map, C channels, S windows, T tokens a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from muntin.layers.attention import Attention, check_size
from muntin.layers.gate import ChannelGate
from muntin.layers.norm import TokenNorm
from muntin.layers.ops import Sum
from muntin.layers.windows import Grid, merge, partition


class Perceptron(nn.Module):
    """Linear, ReLU, gate, Linear on each token: `(..., C) -> (..., C)`; 2·C·hidden multiply-adds a token.

    ReLU and not GELU: it fuses into the product before it and halves the range that 8 bits must cover.
    """

    def __init__(self, dim: int, hidden: int, *, gate: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.activation = nn.ReLU()
        self.gate = ChannelGate(hidden) if gate else nn.Identity()
        self.reduce = nn.Linear(hidden, dim)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The layer that gives the channels of the gate, and the one that reads them."""
        return self.expand, self.reduce

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.reduce(self.gate(self.activation(self.expand(t))))
        return out


class _Block(nn.Module, ABC):
    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__()
        if attention.dim != dim:
            raise ValueError(f"attention works on {attention.dim} channels, the block on dim={dim}: make them equal")
        self.attention = attention
        self.mlp = Perceptron(dim, check_size("dim · mlp_ratio", round(dim * mlp_ratio)), gate=gate)
        self.sum = Sum()

    @property
    def window(self) -> int | None:
        """The window its tokens must be cut by."""
        return self.attention.window

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`, any H, W >= 1."""
        t_STC, grid = partition(x_BHWC, self.window)
        return merge(self.attend(t_STC, grid), grid)

    @abstractmethod
    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        """The same in windowed form, `(S, T, C) -> (S, T, C)`."""


class ParallelBlock(_Block):
    """x + attention(norm(x)) + mlp(norm(x)): one norm, both branches read it at once.

    The same parameters (but for one norm) and multiply-adds as `SerialBlock`; the two branches do not wait for each other.
    Source: the parallel block of GPT-J and of ViT-22B (Dehghani et al., 2302.05442, section 2).
    """

    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__(dim, attention=attention, mlp_ratio=mlp_ratio, gate=gate)
        self.norm = TokenNorm(dim)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        normed_STC = self.norm(t_STC, grid)
        out: Tensor = self.sum(t_STC, self.attention.attend(normed_STC, grid), self.mlp(normed_STC))
        return out


class SerialBlock(_Block):
    """y = x + attention(norm(x)); y + mlp(norm(y)): the usual pre-norm block (Xiong et al., 2002.04745)."""

    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__(dim, attention=attention, mlp_ratio=mlp_ratio, gate=gate)
        self.norm_attention = TokenNorm(dim)
        self.norm_mlp = TokenNorm(dim)
        self.sum_mlp = Sum()

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        y_STC = self.sum(t_STC, self.attention.attend(self.norm_attention(t_STC, grid), grid))
        out: Tensor = self.sum_mlp(y_STC, self.mlp(self.norm_mlp(y_STC, grid)))
        return out
