"""Folding the batch norms of models that are not ours into the convolutions before them.

Which convolution a batch norm follows is not read from names: the model is run once, and a norm that reads exactly the tensor that a
convolution gave, both once, is its pair. A pair is folded only if nothing else was done with that tensor, which the model's
own answer shows: it must be the same after folding.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.calibration import as_input
from muntin.compression.rewrite import computed_weight, named, parameter_users, replace
from muntin.compression.stand_in import same
from muntin.errors import MuntinError
from muntin.models.compression_record import Change

FOLDED = "batch norm folded into the convolution before it"
"""What a change says of a norm that was folded. The checkpoints of `compress` go by it: it stays as it is."""


def fold_batch_norms(model: nn.Module, batch: Tensor) -> list[Change]:
    """Fold every `BatchNorm2d` that directly follows a `Conv2d` (timm's norm with an activation included), in place.

    `batch`: `(B, C, H, W)` raw pixels; the model is run on its first image twice, and for each norm whose folding would change the answer
    about 2·log2(norms) times more: such a norm is left as it is, and its change says so. An image of one value is replaced by noise: to
    that, a model that divides by the image's deviation answers NaN. The model must be in `eval` mode. Behind a convolution
    whose weight is computed (weight norm) a norm stays: there is no weight of its own to fold it into. Idempotent.
    """
    if model.training:
        raise ValueError("folding needs the statistics of a trained model: call model.eval() first")
    image = _varied(as_input(model, batch[:1]))
    found, before = _find_pairs(model, image)
    users = parameter_users(model)
    tied = [pair for pair in found if any(len(users[id(parameter)]) > 1 for parameter in pair[1].parameters())]
    pairs = [pair for pair in found if pair not in tied]
    if not isinstance(before, Tensor):
        left, reason = pairs, f"the model answers with a {type(before).__name__}, which shows nothing: wrap it to return a tensor"
    elif not torch.isfinite(before).any():
        left, reason = pairs, "the model's answer is NaN or infinite, which shows nothing: check the weights and the images"
    else:
        left = _fold_where_the_answer_stays(model, pairs, lambda: same(before, model(image)))
        reason = "folding it changes the model's answer: the convolution's output is used elsewhere too"
        if any(conv.weight.element_size() < 4 for _, conv, _, _ in left):
            reason += ", or its 16 bits round otherwise"
    shared = "its convolution shares its weights with another one: folding would part them"
    return [Change(layer=pair[2], pass_="fold", done="kept", reason=shared) for pair in tied] + [
        Change(layer=pair[2], pass_="fold", done="kept", reason=reason)
        if pair in left
        else Change(layer=pair[2], pass_="fold", done=FOLDED)
        for pair in pairs
    ]


def apply_folds(model: nn.Module, norms: Iterable[str], tensors: Container[str]) -> None:
    """Make the structure that folding `norms` leaves, in place, without asking the model; load the weights of a checkpoint next.

    `tensors`: the names of these weights, which say what convolutions got a bias. Raises `MuntinError` for a name that is no norm.
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


Pair = tuple[str, nn.Conv2d, str, nn.BatchNorm2d]


def _varied(image: Tensor) -> Tensor:
    """The image, or noise in place of one of a single value."""
    if not image.numel() or image.min() < image.max():
        return image
    return torch.randint(0, 256, image.shape, generator=torch.Generator().manual_seed(0)).to(image)


def _find_pairs(model: nn.Module, image: Tensor) -> tuple[list[Pair], Any]:
    made: dict[int, tuple[str, nn.Conv2d, int]] = {}  # with its version: a ReLU in place gives the same tensor, changed
    kept: list[Tensor] = []  # keeps the tensors, and so their identities, for the length of the run
    calls: dict[str, int] = {}
    pairs: list[Pair] = []

    def conv_hook(name: str) -> Any:
        def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            kept.append(output)
            made[id(output)] = (name, layer, _version(output))

        return hook

    def norm_hook(name: str) -> Any:
        def hook(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], named_inputs: dict[str, Tensor]) -> None:
            calls[name] = calls.get(name, 0) + 1
            x = (*inputs, *named_inputs.values())[0]
            found = made.get(id(x))
            if found is not None and found[2] == _version(x) and _foldable(layer):
                pairs.append((found[0], found[1], name, layer))

        return hook

    handles = [conv.register_forward_hook(conv_hook(name)) for name, conv in named(model, nn.Conv2d) if computed_weight(conv) is None]
    handles += [norm.register_forward_pre_hook(norm_hook(name), with_kwargs=True) for name, norm in named(model, nn.BatchNorm2d)]
    try:
        with torch.no_grad():  # in inference mode tensors have no versions
            answer = model(image)
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(answer, Tensor):
        answer = answer.clone()  # a model may write each answer into one and the same
    return [p for p in pairs if calls[p[0]] == 1 and calls[p[2]] == 1], answer


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@torch.no_grad()
def _fold_where_the_answer_stays(model: nn.Module, pairs: list[Pair], same: Callable[[], bool]) -> list[Pair]:
    """Folds all pairs, or where the answer changes then, each half of them by itself, down to single ones. Those that stay."""
    if not pairs:
        return []
    before = [(conv.weight, conv.bias) for _, conv, _, _ in pairs]
    kept = False
    try:
        for _, conv, name, norm in pairs:
            _fold(conv, norm)
            replace(model, name, _remainder(norm))
        kept = same()
    finally:  # also where the model fails: it is given back as it was
        if not kept:
            for (weight, bias), (_, conv, name, norm) in zip(before, pairs, strict=True):
                conv.weight, conv.bias = weight, bias
                if model.get_submodule(name) is not norm:
                    replace(model, name, norm)
    if kept:
        return []
    if len(pairs) == 1:
        return pairs
    half = len(pairs) // 2
    return _fold_where_the_answer_stays(model, pairs[:half], same) + _fold_where_the_answer_stays(model, pairs[half:], same)


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
    own = conv.weight.dtype  # the norm's may be another one: in mixed precision it stays in FP32
    exact = torch.promote_types(torch.promote_types(own, variance_C.dtype), torch.float32)
    a_C = torch.rsqrt(variance_C.to(exact) + norm.eps)
    if norm.affine:
        a_C = a_C * norm.weight
    bias_C = (0 if conv.bias is None else conv.bias * a_C) - mean_C * a_C
    trained = conv.weight.requires_grad
    conv.weight = nn.Parameter((conv.weight * a_C.reshape(-1, 1, 1, 1)).to(own), requires_grad=trained)
    conv.bias = nn.Parameter((bias_C + norm.bias if norm.affine else bias_C).to(own), requires_grad=trained)
