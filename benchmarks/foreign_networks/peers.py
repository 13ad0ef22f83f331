"""How other tools make a network smaller: torch-pruning, and plain singular values.

Axes: O output and I input channels of a layer, R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

CLASSIFIERS = ("head", "fc", "_fc", "classifier")
"""Last parts of the names of classifiers, which torch-pruning is told to leave."""


def pruned_by_torch_pruning(model: nn.Module, batches: Sequence[Tensor], *, macs: float) -> nn.Module:
    """A copy pruned by torch-pruning to a share of the multiply-adds, as its examples for timm do it.

    Global, isomorphic pruning at the least ratio that meets the share; importance by Taylor, of the gradients of the cross-entropy with the
    network's own classes as labels.
    """
    whole = _macs(model, batches[0])
    low, high, small = 0.0, 0.95, None
    for _ in range(10):
        middle = (low + high) / 2
        attempt = _torch_pruned(model, batches, middle)
        if _macs(attempt, batches[0]) <= macs * whole:
            high, small = middle, attempt
        else:
            low = middle
    if small is None:
        raise SystemExit(f"torch-pruning does not leave {macs} of the multiply-adds at any ratio")
    return small.eval()


def _macs(model: nn.Module, batch: Tensor) -> float:
    import torch_pruning

    count, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(model), batch[:1])
    return float(count)


def _torch_pruned(model: nn.Module, batches: Sequence[Tensor], ratio: float) -> nn.Module:
    import torch_pruning

    small = copy.deepcopy(model).eval().requires_grad_(True)
    attentions = [part for part in small.modules() if isinstance(part, timm.layers.Attention)]
    ignored = [layer for name, layer in small.named_modules() if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in CLASSIFIERS]
    pruner = torch_pruning.pruner.BasePruner(
        small, batches[0][:1], importance=torch_pruning.importance.GroupTaylorImportance(), global_pruning=True, isomorphic=True,
        pruning_ratio=ratio, max_pruning_ratio=0.9, ignored_layers=ignored, num_heads={part.qkv: part.num_heads for part in attentions},
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio, round_to=8,
    )  # fmt: skip
    for batch in batches:
        scores = small(batch)
        nn.functional.cross_entropy(scores, scores.detach().argmax(1)).backward()
    pruner.step()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        part.head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.attn_dim = part.num_heads * part.head_dim
    small.zero_grad()
    return small


def low_rank_by_energy(model: nn.Module, *, parameters: float, keep: Sequence[str]) -> nn.Module:
    """A copy whose Linears and convolutions are products by a plain SVD of the weight, each with the same share of its σ².

    The share is the largest that leaves a share of the parameters. A layer whose product would be no smaller stays, and those in `keep`.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        fits = sum(parameter.numel() for parameter in _factored(model, middle, keep).parameters()) <= parameters * whole
        low, high = (middle, high) if fits else (low, middle)
    return _factored(model, low, keep).eval()


def _factored(model: nn.Module, energy: float, keep: Sequence[str]) -> nn.Module:
    small = copy.deepcopy(model)
    for name, layer in list(small.named_modules()):
        if name not in keep and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
            weight = layer.weight.detach().flatten(1)
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            share = sigma.square().cumsum(0) / sigma.square().sum()
            rank = int((share < energy).sum()) + 1
            if rank * sum(weight.shape) < math.prod(weight.shape):
                root = sigma[:rank].sqrt()
                small.set_submodule(name, _product(layer, left[:, :rank] * root, root[:, None] * right[:rank]))
    return small


def _product(layer: nn.Linear | nn.Conv2d, left_OR: Tensor, right_RI: Tensor) -> nn.Sequential:
    rank, bias = len(right_RI), layer.bias is not None
    if isinstance(layer, nn.Linear):
        reduce: nn.Linear | nn.Conv2d = nn.Linear(layer.in_features, rank, bias=False)
        expand: nn.Linear | nn.Conv2d = nn.Linear(rank, layer.out_features, bias=bias)
    else:
        form: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        reduce = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **form)  # type: ignore[arg-type]
        expand = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    with torch.no_grad():
        reduce.weight.copy_(right_RI.reshape(reduce.weight.shape))
        expand.weight.copy_(left_OR.reshape(expand.weight.shape))
        if layer.bias is not None and expand.bias is not None:
            expand.bias.copy_(layer.bias)
    return nn.Sequential(reduce, expand)
