"""Attention of any rank for the exporter, which takes four axes only (onnxscript 0.5: "only 4D query, key, and value are supported")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.overrides import TorchFunctionMode


class PlainAttention(TorchFunctionMode):
    """While active, PyTorch's fused attention of other than four axes is computed by products and a softmax."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else options["query"]
            if query.ndim != 4:
                return attention(*args, **options)
        return func(*args, **options)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · Q·Kᵀ + mask)·V over the last two axes, without dropout: the arguments of `F.scaled_dot_product_attention`."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else logits + attn_mask
    return logits.softmax(-1) @ value
