"""GlobalAttention: tokens exchange values through a few latents, and the mixer that it shares with HybridAttention.

Axes: B images, H W map, C channels, I channels of the projection, S windows, T tokens in a window, N tokens in an image, E heads,
D channels a head, M latents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muntin.layers.attention import Attention, check_size
from muntin.layers.ops import SoftmaxProduct
from muntin.layers.windows import Grid


class LatentMixer(nn.Module):
    """softmax_M(write)·(softmax_N(read)ᵀ·V) for each head, without parameters; `(S, T, I) -> (S, T, C)`, I = C + 2·E·M.

    The projection holds the values V, the read logits and the write logits. Read: each latent is the mean of the tokens' values, weighted
    by a softmax over the N tokens. Write: each token is the mean of the latents, weighted by a softmax over the M latents.
    """

    def __init__(self, dim: int, heads: int, latents: int) -> None:
        super().__init__()
        self.dim = dim
        self.heads = heads
        self.latents = latents
        self.read = SoftmaxProduct()
        self.write = SoftmaxProduct()

    @property
    def inputs(self) -> int:
        """Channels of the projection, I: values, read logits, write logits."""
        return self.dim + 2 * self.heads * self.latents

    def split(self, p_BNI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a projection: values `(B, E, N, D)`, read logits `(B, E, M, N)` and write logits `(B, E, N, M)`."""
        batch, heads, latents = p_BNI.shape[0], self.heads, self.latents
        v_BNC, read_BNL, write_BNL = torch.split(p_BNI, [self.dim, heads * latents, heads * latents], dim=-1)
        v_BEND = v_BNC.reshape(batch, -1, heads, self.dim // heads).transpose(1, 2)
        read_BEMN = read_BNL.reshape(batch, -1, heads, latents).permute(0, 2, 3, 1)
        return v_BEND, read_BEMN, write_BNL.reshape(batch, -1, heads, latents).transpose(1, 2)

    def forward(self, projected_STI: Tensor, grid: Grid) -> Tensor:
        """`(S, T, I) -> (S, T, C)`; 2·N·M·C multiply-adds an image."""
        windows, tokens = projected_STI.shape[:2]
        v_BEND, read_BEMN, write_BENM = self.split(projected_STI.reshape(grid.batch, -1, self.inputs))
        bias = None if grid.bias_B1N is None else grid.bias_B1N.unsqueeze(1)
        latents_BEMD = self.read(read_BEMN, v_BEND, bias)
        out_BEND: Tensor = self.write(write_BENM, latents_BEMD)
        return out_BEND.transpose(1, 2).reshape(windows, tokens, self.dim)


class GlobalAttention(Attention):
    """out(mixer(project(x))): attention over the whole map through `latents` latents a head, instead of all pairs of tokens.

    Input and output `(B, H, W, C)`, any H, W >= 1. Memory and time are O(H·W): 2·C² + 2·E·M·C + 2·M·C multiply-adds a token.
    Source: Agent Attention (Han et al., 2312.08874, section 3.2) and the induced set attention of Set Transformer (Lee et al.,
    1810.00825, section 3.1). Deviation: the latents' queries and keys are parameters, so both kinds of logits are one Linear of the token.
    """

    window = None

    def __init__(self, dim: int, *, heads: int, latents: int) -> None:
        super().__init__(dim, heads)
        self.mixer = LatentMixer(dim, heads, check_size("latents", latents))
        self.project = nn.Linear(dim, self.mixer.inputs)
        self.out = nn.Linear(dim, dim)

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        out: Tensor = self.out(self.mixer(self.project(t_STC), grid))
        return out
