"""HybridAttention: local and global heads in one layer. DenseAttention: the quadratic reference.

Axes: B images, H W map, C channels, S windows, T tokens in a window, M latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muntin.layers.attention import Attention, check_size
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.layers.ops import DenseProduct
from muntin.layers.windows import Grid


class HybridAttention(Attention):
    """out(concat(window_mixer(x), latent_mixer(x))): some heads attend inside windows, `latent_heads` to the whole map through latents.

    Input and output `(B, H, W, C)`, any H, W >= 1. `heads` >= 2; by default half of them, rounded down, have latents. Memory, time: O(H·W):
    with C_l channels in local heads and C_g channels in E_g global heads, C·(3·C_l + C_g + 2·E_g·M) + C² multiply-adds a token for the
    three projections and 2·window²·C_l + 2·M·C_g for mixing. Source: HiLo, which splits heads between a local and a global path (Pan et
    al., 2205.13213, section 3.2). Deviation: the global path is linear in the tokens, not quadratic (see `GlobalAttention`).
    """

    def __init__(self, dim: int, *, heads: int, window: int, latents: int, latent_heads: int | None = None) -> None:
        super().__init__(dim, heads)
        if heads < 2:
            raise ValueError(f"heads={heads}: a hybrid needs at least 2, one for windows and one for latents")
        self.window = check_size("window", window)
        global_heads = heads // 2 if latent_heads is None else latent_heads
        if not 0 < global_heads < heads:
            raise ValueError(f"latent_heads={latent_heads}: give 1 to {heads - 1} of {heads} heads, so that some have windows")
        global_dim = dim // heads * global_heads
        self.local = WindowMixer(dim - global_dim, heads - global_heads)
        self.latent = LatentMixer(global_dim, global_heads, check_size("latents", latents))
        # Two products: engines copy a tensor to split it, which costs more than a second product (benchmarks/projections.py).
        self.project_local = nn.Linear(dim, 3 * self.local.dim)
        self.project_latent = nn.Linear(dim, self.latent.inputs)
        self.out = nn.Linear(dim, dim)

    @property
    def entrances(self) -> tuple[nn.Module, ...]:
        return self.project_local, self.project_latent

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        local, latent = self.local(self.project_local(t_STC), grid), self.latent(self.project_latent(t_STC), grid)
        mixed_STC = torch.cat([local, latent], dim=-1)
        out: Tensor = self.out(mixed_STC)
        return out


class DenseAttention(Attention):
    """softmax(Q·Kᵀ / √D)·V over all tokens of the map, by PyTorch's fused SDPA; D channels a head.

    Input and output `(B, H, W, C)`, any H, W >= 1. Time is O((H·W)²): 4·C² + 2·H·W·C multiply-adds a token; memory is O(H·W) fused and
    O((H·W)²) unfused or exported. Source: multi-head attention (Vaswani et al., 1706.03762, section 3.2).
    """

    window = None

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__(dim, heads)
        self.project = nn.Linear(dim, 3 * dim)
        self.product = DenseProduct()
        self.out = nn.Linear(dim, dim)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        images, tokens = t_STC.shape[:2]
        qkv = self.project(t_STC).reshape(images, tokens, 3, self.heads, self.dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.product(q, k, v).transpose(1, 2).reshape(images, tokens, self.dim)
        out: Tensor = self.out(mixed)
        return out
