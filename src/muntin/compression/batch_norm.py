"""Folding the batch norms of models that are not ours into the convolutions before them.

Which convolution a batch norm follows is not read from names: the model is run once, and a norm that reads exactly the tensor that a
convolution gave, both once, is its pair. The pair is folded only if nothing else was done with that tensor, which the model's
own answer shows: it must be the same after folding.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.calibration import as_input
from muntin.compression.change import Change
from muntin.compression.rewrite import computed_weight, named, replace

TOLERANCE = 1e-3
"""Largest change of the model's answer, relative to its largest value, that rounding may explain."""


def fold_batch_norms(model: nn.Module, batch: Tensor) -> list[Change]:
    """Fold every `BatchNorm2d` that directly follows a `Conv2d` (timm's norm with an activation included), in place.

    `batch`: `(B, C, H, W)` raw pixels; the model is run on its first image twice. The model must be in `eval` mode. Where the answer
    would change, all of them are left as they are, and the changes say so. Behind a convolution whose weight is computed (weight norm) a
    norm stays: there is no weight of its own to fold it into. Idempotent.
    """
    if model.training:
        raise ValueError("folding needs the statistics of a trained model: call model.eval() first")
    image = as_input(model, batch[:1])
    pairs, before = _find_pairs(model, image)
    if not pairs:
        return []
    originals = [(conv, copy.deepcopy(conv), norm_name, norm) for _, conv, norm_name, norm in pairs]
    with torch.no_grad():
        for _, conv, norm_name, norm in pairs:
            _fold(conv, norm)
            replace(model, norm_name, _remainder(norm))
    with torch.inference_mode():
        after = model(image)
    if _same(before, after):
        return [Change(layer=name, pass_="fold", done="batch norm folded into the convolution before it") for _, _, name, _ in pairs]
    for conv, original, norm_name, norm in originals:
        conv.weight, conv.bias = original.weight, original.bias
        replace(model, norm_name, norm)
    reason = "folding the model's batch norms changes its answer: a convolution's output is used elsewhere too"
    return [Change(layer=name, pass_="fold", done="kept", reason=reason) for _, _, name, _ in pairs]


Pair = tuple[str, nn.Conv2d, str, nn.BatchNorm2d]


def _find_pairs(model: nn.Module, image: Tensor) -> tuple[list[Pair], Any]:
    made: dict[int, tuple[str, nn.Conv2d]] = {}
    kept: list[Tensor] = []  # keeps the tensors, and so their identities, for the length of the run
    calls: dict[str, int] = {}
    pairs: list[Pair] = []

    def conv_hook(name: str) -> Any:
        def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            kept.append(output)
            made[id(output)] = (name, layer)

        return hook

    def norm_hook(name: str) -> Any:
        def hook(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(inputs[0]) in made and _foldable(layer):
                conv_name, conv = made[id(inputs[0])]
                pairs.append((conv_name, conv, name, layer))

        return hook

    handles = [conv.register_forward_hook(conv_hook(name)) for name, conv in named(model, nn.Conv2d) if computed_weight(conv) is None]
    handles += [norm.register_forward_pre_hook(norm_hook(name)) for name, norm in named(model, nn.BatchNorm2d)]
    try:
        with torch.inference_mode():
            answer = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return [p for p in pairs if calls[p[0]] == 1 and calls[p[2]] == 1], answer


def _foldable(norm: nn.BatchNorm2d) -> bool:
    known = type(norm) is nn.BatchNorm2d or _acts(norm)
    return known and norm.running_mean is not None and norm.running_var is not None


def _acts(norm: nn.BatchNorm2d) -> bool:
    """Whether this is timm's norm that ends in dropout and an activation."""
    return type(norm).__name__ == "BatchNormAct2d" and isinstance(getattr(norm, "drop", None), nn.Module) and hasattr(norm, "act")


def _remainder(norm: nn.BatchNorm2d) -> nn.Module:
    if _acts(norm):
        parts = [part for part in (norm.get_submodule("drop"), norm.get_submodule("act")) if not isinstance(part, nn.Identity)]
        return nn.Sequential(*parts) if len(parts) != 1 else parts[0]
    return nn.Identity()


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean_C, variance_C = norm.running_mean, norm.running_var
    assert mean_C is not None and variance_C is not None  # `_foldable` saw to it
    a_C = torch.rsqrt(variance_C + norm.eps)
    if norm.affine:
        a_C = a_C * norm.weight
    bias_C = (0 if conv.bias is None else conv.bias * a_C) - mean_C * a_C
    trained = conv.weight.requires_grad
    conv.weight = nn.Parameter(conv.weight * a_C.reshape(-1, 1, 1, 1), requires_grad=trained)
    conv.bias = nn.Parameter(bias_C + norm.bias if norm.affine else bias_C, requires_grad=trained)


def _same(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
        return False
    return bool((before - after).abs().max() <= TOLERANCE * before.abs().max().clamp_min(1e-12))
