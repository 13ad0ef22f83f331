"""`nn.MultiheadAttention` written with a layer for each product, so that heads can leave it, and other passes act on its layers.

Axes: B images, N queries, M keys, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.rewrite import named, replace
from muntin.errors import MuntinError

FIRST = "query"
"""The layer of a split attention that names its group of heads."""


class SplitAttention(nn.Module):
    """Attention with the arguments and the answer of `nn.MultiheadAttention`, of any number of heads."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        """Take the weights of `whole`: new parameters with its flags, but for the projection's, which are shared."""
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = whole.embed_dim, whole.num_heads, whole.head_dim
        self.batch_first, self.dropout = whole.batch_first, whole.dropout
        self.in_proj_bias, self._qkv_same_embed_dim = None, False  # PyTorch's encoder layers ask for these before their fused path
        weights = (
            (whole.q_proj_weight, whole.k_proj_weight, whole.v_proj_weight)
            if whole.in_proj_weight is None
            else whole.in_proj_weight.chunk(3)
        )
        biases = (None,) * 3 if whole.in_proj_bias is None else whole.in_proj_bias.chunk(3)
        flags = whole.q_proj_weight if whole.in_proj_weight is None else whole.in_proj_weight
        self.query, self.key, self.value = (
            _linear(weight, bias, flags.requires_grad) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = nn.Linear(1, 1, bias=False)
        self.out_proj.in_features, self.out_proj.out_features = whole.embed_dim, whole.embed_dim
        self.out_proj.weight, self.out_proj.bias = whole.out_proj.weight, whole.out_proj.bias
        self.train(whole.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`. `is_causal` is a hint there, and `attn_mask` is used here."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        alone, first = query.ndim == 2, self.batch_first
        if alone:
            query, key, value = query[None], key[None], value[None]
        elif not first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q_BHND, k_BHMD, v_BHMD = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (self.query(query), self.key(key), self.value(value))
        )
        bias = self._bias(attn_mask, key_padding_mask, q_BHND)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores_BHNM = q_BHND * self.head_dim**-0.5 @ k_BHMD.transpose(-1, -2)
            weights = F.dropout((scores_BHNM if bias is None else scores_BHNM + bias).softmax(-1), dropout)
            mixed_BHND = weights @ v_BHMD
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed_BHND = F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, bias, dropout)
        out: Tensor = self.out_proj(mixed_BHND.transpose(1, 2).flatten(2))
        if alone:
            return out[0], None if weights is None else weights[0]
        return out if first else out.transpose(0, 1), weights

    def _bias(self, attn_mask: Tensor | None, padding: Tensor | None, like_BHND: Tensor) -> Tensor | None:
        """Both masks as one sum to the scores."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, like_BHND)
            attn_mask = attn_mask.reshape(-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask
        if padding is None:
            return attn_mask
        padding = _added(padding, like_BHND)
        padding = padding[:, None, None] if padding.ndim == 2 else padding[None, None, None]
        return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
    return layer


def split_attentions(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.MultiheadAttention]:
    """Replace each `nn.MultiheadAttention`, or those of `names`, by a split one, in place; return the replaced ones by name.

    Those that append keys, and subclasses, are kept. Raises `MuntinError` for a name that is none.
    """
    usual = {
        name: whole
        for name, whole in named(model, nn.MultiheadAttention)
        if name and type(whole) is nn.MultiheadAttention and whole.bias_k is None and not whole.add_zero_attn
    }
    if names is not None and (unknown := [name for name in names if name not in usual]):
        raise MuntinError(f"attentions: '{unknown[0]}' is no MultiheadAttention of the model: build the model that was saved")
    chosen = usual if names is None else {name: usual[name] for name in names}
    for name, whole in chosen.items():
        replace(model, name, SplitAttention(whole))
    return chosen
