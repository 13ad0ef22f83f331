"""ParallelBlock and SerialBlock: attention and a two-layer perceptron, added to a residual stream.

Axes: B images, H W map, C channels, S windows, T tokens in a window.
"""

from __future__ import annotations

from torch import Tensor, nn

from muntin.layers.attention import Attention, WindowedLayer, check_size
from muntin.layers.gate import ChannelGate
from muntin.layers.norm import TokenNorm
from muntin.layers.ops import Sum
from muntin.layers.windows import Grid


class Perceptron(nn.Module):
    """reduce(gate(ReLU(expand(t)))) on each token, `(..., C) -> (..., C)`; 2·C·hidden multiply-adds a token.

    `expand` is a Linear from C to `hidden` channels, `reduce` a Linear back. ReLU instead of GELU: it fuses into the product before it and
    halves the range that 8 bits must cover.
    """

    def __init__(self, dim: int, hidden: int, *, gate: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.activation = nn.ReLU()
        self.gate = ChannelGate(hidden) if gate else nn.Identity()
        self.reduce = nn.Linear(hidden, dim)

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The layer that writes the gated channels and the layer that reads them."""
        return self.expand, self.reduce

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.reduce(self.gate(self.activation(self.expand(t))))
        return out


class _Block(WindowedLayer):
    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__()
        if attention.dim != dim:
            raise ValueError(f"attention works on {attention.dim} channels, the block on dim={dim}: make them equal")
        self.window = attention.window
        self.attention = attention
        self.mlp = Perceptron(dim, check_size("dim · mlp_ratio", round(dim * mlp_ratio)), gate=gate)
        self.sum = Sum()


class ParallelBlock(_Block):
    """x + attention(norm(x)) + mlp(norm(x)), `(B, H, W, C)` to the same shape.

    Both branches read the output of one norm, so neither waits for the other. It has the multiply-adds of `SerialBlock`, and one norm
    fewer. `mlp_ratio`: hidden channels of the perceptron over `dim`. Source: the parallel block of GPT-J and of ViT-22B (Dehghani et al.,
    2302.05442, section 2).
    """

    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__(dim, attention=attention, mlp_ratio=mlp_ratio, gate=gate)
        self.norm = TokenNorm(dim)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        normed_STC = self.norm(t_STC, grid)
        out: Tensor = self.sum(t_STC, self.attention.attend(normed_STC, grid), self.mlp(normed_STC))
        return out


class SerialBlock(_Block):
    """y = x + attention(norm(x)), then y + mlp(norm(y)), `(B, H, W, C)` to the same shape.

    Source: the pre-norm block (Xiong et al., 2002.04745, section 3).
    """

    def __init__(self, dim: int, *, attention: Attention, mlp_ratio: float = 2.0, gate: bool = True) -> None:
        super().__init__(dim, attention=attention, mlp_ratio=mlp_ratio, gate=gate)
        self.norm_attention = TokenNorm(dim)
        self.norm_mlp = TokenNorm(dim)
        self.sum_mlp = Sum()

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        y_STC = self.sum(t_STC, self.attention.attend(self.norm_attention(t_STC, grid), grid))
        out: Tensor = self.sum_mlp(y_STC, self.mlp(self.norm_mlp(y_STC, grid)))
        return out
