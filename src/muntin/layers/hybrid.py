"""HybridAttention: windows and latents side by side; DenseAttention: the quadratic twin that it is measured against.

Axes: B images, H W map, C channels, S windows, T tokens a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.layers.attention import Attention, check_size
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.layers.windows import Grid


class HybridAttention(Attention):
    """Half of the heads look inside windows, the other half over the whole map through latents; one projection mixes them.

    Memory and time are O(H·W). With C_l channels in local heads and C_g, E_g in global ones:
    C·(3·C_l + C_g + 2·E_g·M) + C² multiply-adds a token for the three projections and 2·window²·C_l + 2·M·C_g for mixing.
    Input and output `(B, H, W, C)`, any H, W >= 1; `heads` >= 2 (an odd head goes to the windows). Splitting heads between a local
    and a global path follows HiLo (Pan et al., 2205.13213, section 3.2); its global path is quadratic, this one is not.
    """

    def __init__(self, dim: int, *, heads: int, window: int, latents: int) -> None:
        super().__init__(dim, heads)
        if heads < 2:
            raise ValueError(f"heads={heads}: a hybrid needs at least 2, one for its windows and one for its latents")
        self.window = check_size("window", window)
        global_heads = heads // 2
        global_dim = dim // heads * global_heads
        self.local = WindowMixer(dim - global_dim, heads - global_heads)
        self.latent = LatentMixer(global_dim, global_heads, check_size("latents", latents))
        # Two products and not one: engines copy what they split, which costs more than a second product (benchmarks/projections.py).
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
    """Multi-head self-attention over all tokens of the map by PyTorch's fused SDPA: the reference twin.

    Time is O((H·W)²): 4·C² + 2·H·W·C multiply-adds a token; memory is O(H·W) fused and O((H·W)²) unfused or exported.
    Input and output `(B, H, W, C)`, any H, W >= 1.
    """

    window = None

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__(dim, heads)
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    @property
    def entrances(self) -> tuple[nn.Module, ...]:
        return (self.project,)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        images, tokens = t_STC.shape[:2]
        qkv = self.project(t_STC).reshape(images, tokens, 3, self.heads, self.dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, self.dim)
        out: Tensor = self.out(mixed)
        return out
