"""LocalAttention: attention inside windows, and the mixer that it shares with HybridAttention.

Axes: B images, H W map, C channels, S windows, T tokens in a window, E heads, D channels a head.
"""

from __future__ import annotations

from torch import Tensor, nn

from muntin.layers.attention import Attention, check_size
from muntin.layers.ops import Product, SoftmaxProduct
from muntin.layers.windows import Grid


class WindowMixer(nn.Module):
    """softmax(Q·Kᵀ / √D)·V inside each window, without parameters; the input holds Q, K and V."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim = dim
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.scores = Product()
        self.values = SoftmaxProduct()

    def forward(self, qkv_ST3C: Tensor, grid: Grid) -> Tensor:
        """`(S, T, 3·C) -> (S, T, C)`; 2·S·T²·C multiply-adds."""
        windows, tokens = qkv_ST3C.shape[:2]
        q, k, v = qkv_ST3C.reshape(windows, tokens, 3, self.heads, self.dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if grid.bias_S1T is None else grid.bias_S1T.unsqueeze(1)
        out_SETD: Tensor = self.values(self.scores(q * self.scale, k.transpose(-1, -2)), v, bias)
        return out_SETD.transpose(1, 2).reshape(windows, tokens, self.dim)


class LocalAttention(Attention):
    """out(mixer(project(x))): multi-head self-attention inside non-overlapping windows of `window` x `window` tokens.

    Input and output `(B, H, W, C)`, any H, W >= 1; if the window does not divide the size, the last windows are padded, and the padding
    is hidden from the softmax. Memory and time are O(H·W): 4·C² + 2·window²·C multiply-adds a token. Source: window attention of Swin
    (Liu et al., 2103.14030, section 3.2). Deviation: no shifts and no position tables; `PositionUnit` encodes positions, so the
    parameters do not depend on the window.
    """

    def __init__(self, dim: int, *, heads: int, window: int) -> None:
        super().__init__(dim, heads)
        self.window = check_size("window", window)
        self.project = nn.Linear(dim, 3 * dim)
        self.mixer = WindowMixer(dim, heads)
        self.out = nn.Linear(dim, dim)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        out: Tensor = self.out(self.mixer(self.project(t_STC), grid))
        return out
