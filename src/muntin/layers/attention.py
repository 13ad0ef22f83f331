"""What the four attention layers have in common: the public face `(B, H, W, C)` over the windowed form `(S, T, C)`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from muntin.layers.windows import Grid, merge, partition


class Attention(nn.Module, ABC):
    """A layer that mixes tokens. Subclasses say how their tokens are cut (`window`) and how they are mixed (`attend`)."""

    window: int | None

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} cannot be split into heads={heads}: heads must divide dim, both at least 1")
        self.dim = dim
        self.heads = heads

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`, any H, W >= 1."""
        t_STC, grid = partition(x_BHWC, self.window)
        return merge(self.attend(t_STC, grid), grid)

    @property
    @abstractmethod
    def entrances(self) -> tuple[nn.Module, ...]:
        """The layers that read the tokens: whatever is linear before them can be folded into all of them."""

    @abstractmethod
    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        """The same in windowed form, `(S, T, C) -> (S, T, C)`; what it writes into padding is never read."""


def check_size(name: str, value: int) -> int:
    """A window or a number of latents: a whole number of at least 1."""
    if value < 1:
        raise ValueError(f"{name}={value}: it must be at least 1")
    return value
