"""Finding and replacing the layers of a model, whatever model it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from muntin.compression.change import Change

M = TypeVar("M", bound=nn.Module)


def named(model: nn.Module, *kinds: type[M]) -> Iterator[tuple[str, M]]:
    """Submodules that are of one of `kinds`, with their dotted names, each module once, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def computed_weight(layer: nn.Module) -> str | None:
    """Why a layer cannot be rewritten whose weight is made of other parameters at each call; None for one that owns its weight."""
    return None if "weight" in layer._parameters else "its weight is computed (weight norm, spectral norm): remove that first"


def number_paddings(model: nn.Module) -> list[Change]:
    """Write the paddings 'same' and 'valid' of convolutions as the numbers that they are, in place: only those have factored and integer
    forms. Where 'same' is an odd number of pixels, more on one side than on the other, it stays. Idempotent; computes nothing else."""
    changes = []
    for name, conv in named(model, nn.Conv2d):
        if type(conv) is not nn.Conv2d or not isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            continue
        both = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        if any(pixels % 2 for pixels in both):
            continue
        sides = tuple(pixels // 2 for pixels in both)
        changes.append(Change(layer=name, pass_="pad", done=f"padding '{conv.padding}' written as {' x '.join(map(str, sides))}"))
        conv.padding = sides
    return changes


WHOLE_MODEL = "it is the whole model: put it into an nn.Sequential"
"""Why a layer cannot be rewritten that is in no other module: there is nowhere to put the new one."""


OTHERS = (
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    nn.Bilinear,
)  # fmt: skip
"""What has weights to multiply by, and no form but this one. (Of an attention, its projection of queries, keys and values.)"""


def out_of_reach(model: nn.Module, pass_: str, form: str) -> list[Change]:
    """Layers with weights of kinds that no pass rewrites, each kept: so that nobody takes them for done. `form`: what they do not have."""
    found = named(model, *OTHERS)
    return [Change(layer=name, pass_=pass_, done="kept", reason=f"{type(layer).__name__}: no {form}") for name, layer in found]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is, in every place that holds the same module (shared layers stay shared)."""
    old = model.get_submodule(name)
    layer.train(old.training)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children() gives a module that has two names once
            if child is old:
                setattr(parent, key, layer)
