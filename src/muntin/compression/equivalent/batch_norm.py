"""Folding the batch norms of foreign models into the convolutions before them.

A run of the model finds the pairs: a norm that reads exactly the tensor of a convolution, both called once. A pair stays folded only if the
model's answer is the same afterwards.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.history import remember
from muntin.compression.replaceability import all_same
from muntin.compression.rewrite import computed_weight, failing, named, parameter_users, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, as_input, call, first_row, tensors_of

FOLDED = "batch norm folded into the convolution before it"
"""`Change.done` of a folded norm. `load_model` compares it with the records of checkpoints, so it must not change."""

Pair = tuple[str, nn.Conv2d, str, nn.BatchNorm2d]
"""A convolution and the norm after it, each with its name."""


def fold_batch_norms(model: nn.Module, batch: ModelInputs) -> list[Change]:
    """Fold every `BatchNorm2d` (timm's with an activation too) that directly follows a `Conv2d`, in place. Idempotent.

    `batch`: inputs, of images raw pixels. The model, in `eval` mode, runs on the first image twice, and about 2·log2(norms) times more for
    each norm whose folding would change the answer; such a norm is kept. An image of one value, to which a model may answer NaN, is
    replaced by noise.
    """
    if model.training:
        raise ValueError("folding needs the statistics of a trained model: call model.eval() first")
    image = varied(as_input(model, batch[:1])) if isinstance(batch, Tensor) else first_row(batch)
    candidates, before = _find_pairs(model, image)
    users = parameter_users(model)
    shared = [pair for pair in candidates if any(len(users[id(parameter)]) > 1 for parameter in pair[1].parameters())]
    pairs = [pair for pair in candidates if pair not in shared]
    if not before:
        kept, reason = pairs, "the model's answer holds no tensor: wrap it to return one"
    elif not any(torch.isfinite(part).any() for part in before):
        kept, reason = pairs, "the model's answer is NaN or infinite: check the weights and the images"
    else:
        kept = failing(pairs, lambda some: _fold_if_same(model, some, image, before))
        reason = "folding it changes the model's answer: the convolution's output is used elsewhere too"
        if any(conv.weight.element_size() < 4 for _, conv, _, _ in kept):
            reason += ", or rounding in 16 bits differs"
    reasons = {pair[2]: "its convolution shares its weights with another one: folding would separate them" for pair in shared}
    reasons |= {pair[2]: reason for pair in kept}
    changes = (
        Change(layer=name, pass_="fold", done="kept" if name in reasons else FOLDED, reason=reasons.get(name, ""))
        for _, _, name, _ in (*shared, *pairs)
    )
    return remember(model, changes)


def apply_folds(model: nn.Module, norms: Iterable[str], tensors: Container[str]) -> None:
    """Remove the folded `norms` of a checkpoint's model, in place; load the weights next.

    `tensors`: names of these weights: they show which convolutions got a bias. Raises `MuntinError` for a name that is no norm.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in norms:
        norm = modules.get(name)
        if not isinstance(norm, nn.BatchNorm2d):
            raise MuntinError(f"fold: '{name}' is no BatchNorm2d of the model: build the model that the checkpoint was made of")
        replace(model, name, _remainder(norm))
    for name, conv in named(model, nn.Conv2d):
        if conv.bias is None and f"{name}.bias" in tensors:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


def varied(image: Tensor) -> Tensor:
    """The image, or noise if all of its values are equal."""
    if not image.numel() or image.min() < image.max():
        return image
    return torch.randint(0, 256, image.shape, generator=torch.Generator().manual_seed(0)).to(image)


def _find_pairs(model: nn.Module, image: ModelInputs) -> tuple[list[Pair], list[Tensor]]:
    """The pairs, and the tensors of the model's answer."""
    outputs: dict[int, tuple[str, nn.Conv2d, int]] = {}  # by identity, with the version: a ReLU in place changes the same tensor
    alive: list[Tensor] = []  # keeps identities unique during the run
    calls: dict[str, int] = {}
    pairs: list[Pair] = []

    def conv_hook(name: str) -> Any:
        def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            alive.append(output)
            outputs[id(output)] = (name, layer, _version(output))

        return hook

    def norm_hook(name: str) -> Any:
        def hook(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], named_inputs: dict[str, Tensor]) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = (*inputs, *named_inputs.values())[0]
            conv_name, conv, version = outputs.get(id(x), ("", None, -1))
            if conv is not None and version == _version(x) and _foldable(layer):
                pairs.append((conv_name, conv, name, layer))

        return hook

    handles = [conv.register_forward_hook(conv_hook(name)) for name, conv in named(model, nn.Conv2d) if computed_weight(conv) is None]
    handles += [norm.register_forward_pre_hook(norm_hook(name), with_kwargs=True) for name, norm in named(model, nn.BatchNorm2d)]
    try:
        with torch.no_grad():  # tensors of inference mode have no versions
            answer = [part.clone() for part in tensors_of(call(model, image))]  # a model may write every answer into the same tensor
    finally:
        for handle in handles:
            handle.remove()
    return [p for p in pairs if calls[p[0]] == 1 and calls[p[2]] == 1], answer


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@torch.no_grad()
def _fold_if_same(model: nn.Module, pairs: Sequence[Pair], image: ModelInputs, before: Sequence[Tensor]) -> bool:
    """Fold the pairs. Returns False, and restores the model, if the answer changes."""
    weights = [(conv.weight, conv.bias) for _, conv, _, _ in pairs]
    unchanged = False
    try:
        for _, conv, name, norm in pairs:
            _fold(conv, norm)
            replace(model, name, _remainder(norm))
        unchanged = all_same(before, tensors_of(call(model, image)))
    finally:  # restore also if the model raises
        if not unchanged:
            for (weight, bias), (_, conv, name, norm) in zip(weights, pairs, strict=True):
                conv.weight, conv.bias = weight, bias
                if model.get_submodule(name) is not norm:
                    replace(model, name, norm)
    return unchanged


def _foldable(norm: nn.BatchNorm2d) -> bool:
    known = type(norm) is nn.BatchNorm2d or _has_activation(norm)
    return known and norm.running_mean is not None and norm.running_var is not None


def _has_activation(norm: nn.BatchNorm2d) -> bool:
    """Return True for timm's norm that ends in dropout and an activation."""
    return type(norm).__name__ == "BatchNormAct2d" and isinstance(getattr(norm, "drop", None), nn.Module) and hasattr(norm, "act")


def _remainder(norm: nn.BatchNorm2d) -> nn.Module:
    """The module that takes the place of a folded norm."""
    if _has_activation(norm):
        parts = [part for part in (norm.get_submodule("drop"), norm.get_submodule("act")) if not isinstance(part, nn.Identity)]
        return nn.Sequential(*parts) if len(parts) != 1 else parts[0]
    return nn.Identity()


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean_C, variance_C = norm.running_mean, norm.running_var
    assert mean_C is not None and variance_C is not None
    dtype = conv.weight.dtype  # in mixed precision the norm's type differs
    exact = torch.promote_types(torch.promote_types(dtype, variance_C.dtype), torch.float32)
    a_C = torch.rsqrt(variance_C.to(exact) + norm.eps)
    if norm.affine:
        a_C = a_C * norm.weight
    bias_C = (0 if conv.bias is None else conv.bias * a_C) - mean_C * a_C
    trained = conv.weight.requires_grad
    conv.weight = nn.Parameter((conv.weight * a_C.reshape(-1, 1, 1, 1)).to(dtype), requires_grad=trained)
    conv.bias = nn.Parameter((bias_C + norm.bias if norm.affine else bias_C).to(dtype), requires_grad=trained)
