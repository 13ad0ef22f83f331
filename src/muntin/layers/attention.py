"""The base classes of layers that work on windows of tokens.

Axes: B images, H W map, C channels, S windows, T tokens in a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from muntin.layers.windows import Grid, merge, partition


class WindowedLayer(nn.Module, ABC):
    """A layer with two forms: `forward` maps `(B, H, W, C)` to the same shape, `attend` does the same on windows `(S, T, C)`.

    Subclasses set `window`, the side of the windows in tokens, or None for one window an image.
    """

    window: int | None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`, any H, W >= 1."""
        t_STC, grid = partition(x_BHWC, self.window)
        return merge(self.attend(t_STC, grid), grid)

    @abstractmethod
    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        """`(S, T, C) -> (S, T, C)`. The output at padding tokens is undefined and never read."""


class Attention(WindowedLayer):
    """A layer that mixes tokens in `heads` heads of `dim / heads` channels. Raises ValueError if `heads` does not divide `dim`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim={dim} cannot be split into heads={heads}: heads must divide dim, both at least 1")
        self.dim = dim
        self.heads = heads

    @property
    def entrances(self) -> tuple[nn.Module, ...]:
        """The Linear layers that read the tokens: an affine map before the layer can be folded into all of them."""
        return (self.get_submodule("project"),)


def check_size(name: str, value: int) -> int:
    """Return `value`. Raises ValueError if it is less than 1."""
    if value < 1:
        raise ValueError(f"{name}={value}: it must be at least 1")
    return value
