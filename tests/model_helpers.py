"""Helpers of tests on models: pixels, answers, norms with statistics, changes by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from muntin.models import Change


def pixels(*shape: int) -> Tensor:
    """Random grey levels, float 0-255."""
    return torch.randint(0, 256, shape).float()


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer in `eval` mode."""
    with torch.inference_mode():
        scores: Tensor = model.eval()(x)
    return scores


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with updated statistics of its norms."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def names(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Dotted names of the modules of some kinds."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def by_layer(changes: Iterable[Change], pass_: str) -> dict[str, Change]:
    """The changes of a pass by layer, exactly one each."""
    by_name = [change for change in changes if change.pass_ == pass_]
    assert len({change.layer for change in by_name}) == len(by_name)
    return {change.layer: change for change in by_name}
