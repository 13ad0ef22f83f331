"""Cut a map into windows of tokens, and merge the windows again.

Attention works on the windowed form `(S, T, C)`, in which a whole stage stays. If the window does not divide the size, the map is padded
with zeros once, and `Grid.bias_S1T` hides the padding from every softmax.

Axes: B images, H W rows and columns of a map, C channels, S windows (B · rows · columns), T tokens in a window (window²),
N tokens in an image, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a map of `height` x `width` was cut into `rows` x `columns` windows, and which tokens are padding."""

    batch: int
    height: int
    width: int
    window: int | None
    rows: int
    columns: int
    bias_S1T: Tensor | None  # noqa: N815 - axis letters
    """0 for a token of the image and `hidden` for padding; None if `window` is None, as one window an image needs no padding."""

    @property
    def bias_B1N(self) -> Tensor | None:  # noqa: N802 - axis letters
        """`bias_S1T` with the windows of an image concatenated."""
        return None if self.bias_S1T is None else self.bias_S1T.reshape(self.batch, 1, -1)


def hidden(dtype: torch.dtype) -> float:
    """The bias of a logit that must not count: half of the lowest finite number. In a narrower type it is -inf, 0 after the softmax."""
    return torch.finfo(dtype).min / 2


def partition(x_BHWC: Tensor, window: int | None) -> tuple[Tensor, Grid]:
    """Cut `(B, H, W, C)`, any H, W >= 1, into `(S, T, C)`; costs one copy of the map.

    `window`: side of the windows, tokens. None takes each image as one window of H·W tokens, without padding.
    """
    batch, height, width, _ = x_BHWC.shape
    if window is None:
        grid = Grid(batch=batch, height=height, width=width, window=None, rows=1, columns=1, bias_S1T=None)
        return cut(x_BHWC, grid), grid
    rows, columns = (height + window - 1) // window, (width + window - 1) // window
    y_inside = torch.arange(rows * window, device=x_BHWC.device).reshape(rows, 1, window, 1) < height
    x_inside = torch.arange(columns * window, device=x_BHWC.device).reshape(1, columns, 1, window) < width
    bias = x_BHWC.new_zeros(()).where(y_inside & x_inside, hidden(x_BHWC.dtype))
    bias_1RT = bias.reshape(1, rows * columns, window * window)
    bias_S1T = bias_1RT.expand(batch, rows * columns, window * window).reshape(batch * rows * columns, 1, window * window)
    grid = Grid(batch=batch, height=height, width=width, window=window, rows=rows, columns=columns, bias_S1T=bias_S1T)
    return cut(x_BHWC, grid), grid


def cut(x_BHWC: Tensor, grid: Grid) -> Tensor:
    """Cut another map of the same size into windows, `(S, T, C)`, zeros in the padding; `merge` undoes it."""
    channels, window = x_BHWC.shape[-1], grid.window
    if window is None:
        return x_BHWC.reshape(grid.batch, grid.height * grid.width, channels)
    x_BHWC = F.pad(x_BHWC, (0, 0, 0, grid.columns * window - grid.width, 0, grid.rows * window - grid.height))
    x = x_BHWC.reshape(grid.batch, grid.rows, window, grid.columns, window, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, channels)


def merge(t_STC: Tensor, grid: Grid) -> Tensor:
    """Undo `partition`: `(S, T, C) -> (B, H, W, C)`, without the padding."""
    channels = t_STC.shape[-1]
    if grid.window is None:
        return t_STC.reshape(grid.batch, grid.height, grid.width, channels)
    x = t_STC.reshape(grid.batch, grid.rows, grid.columns, grid.window, grid.window, channels).permute(0, 1, 3, 2, 4, 5)
    x_BHWC = x.reshape(grid.batch, grid.rows * grid.window, grid.columns * grid.window, channels)
    return x_BHWC[:, : grid.height, : grid.width]
