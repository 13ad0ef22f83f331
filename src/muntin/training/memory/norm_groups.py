"""Groups of samples that share the statistics of batch norms while training: set from outside of a model, whose names, weights and answers
after training stay as they are.

With fixed groups, any split of a batch between two groups, into micro-batches or over processes, gives the same numbers. Source: Ghost
Batch Normalization (Hoffer et al., 1705.08741, section 4).

Axes: B samples, C channels, H W map, R rows of a norm (samples, or tokens of samples in their order).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from muntin.errors import RecipeError
from muntin.layers.norm import MapNorm, TokenNorm

TOLERANCE = 1e-9
"""Largest difference between the answers to two groups together and alone, in float64, as a share of the largest score."""


class _Groups:
    """Splits the inputs of PyTorch's batch norms. `batch`: samples in the present call of the model."""

    def __init__(self, group: int) -> None:
        self.group, self.batch = group, 1

    def count(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Note the batch of a call: a hook before the model's forward."""
        self.batch = max(1, len(inputs[0]))

    def normalise(self, norm: nn.Module, forward: Callable[[Tensor], Tensor], x_R: Tensor) -> Tensor:
        """Call a norm on each group."""
        rows = self.group * max(1, len(x_R) // self.batch)
        if not norm.training or len(x_R) <= rows:
            return forward(x_R)
        return torch.cat([forward(part_R) for part_R in torch.split(x_R, rows)])


def group_norms(model: nn.Module, group: int) -> None:
    """Let the batch norms of a model, muntin's and PyTorch's (timm's, too), share statistics in groups of `group` samples in training.

    Costs a copy of each normalised map that has more than one group.
    """
    groups = _Groups(group)
    for norm in model.modules():
        if isinstance(norm, MapNorm | TokenNorm):
            norm.group = group
        elif isinstance(norm, _BatchNorm):
            norm.forward = partial(groups.normalise, norm, norm.forward)  # type: ignore[method-assign]
    model.register_forward_pre_hook(groups.count)


def check_norm_groups(model: nn.Module, group: int, shape: tuple[int, ...], name: str) -> None:
    """Raise `RecipeError` if a foreign model's answers to two groups depend on each other. `shape`: `(C, H, W)`.

    A reason may be a norm whose rows are not in the order of the samples. Works on a copy in float64, and costs four forward passes of a
    group.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise RecipeError(f"training.norm_group {group}: '{name}' has SyncBatchNorm, whose groups are processes: use BatchNorm2d")
    copied = copy.deepcopy(model).double().eval()
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.train()  # and no dropout
    group_norms(copied, group)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(2 * group, *shape, generator=generator, dtype=torch.float64) * 255
    with torch.no_grad():
        together, alone = copied(images_BCHW), torch.cat([copied(part) for part in torch.split(images_BCHW, group)])
    if float((together - alone).abs().max()) > TOLERANCE * float(together.abs().max()):
        raise RecipeError(
            f"training.norm_group {group}: '{name}' answers to {2 * group} crops otherwise than to {group} and {group}, so a batch cannot "
            "be split: a norm takes them in another order, or a layer mixes samples: leave it out"
        )
