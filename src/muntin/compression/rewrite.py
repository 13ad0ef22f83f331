"""Finding and replacing the layers of a model, whatever model it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.nn.utils.parametrize import ParametrizationList

from muntin.compression.factored import PARTS
from muntin.errors import MuntinError
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change

M = TypeVar("M", bound=nn.Module)
Pass = Callable[[nn.Module], list[Change]]
"""A compression pass: rewrites the model it is given and returns what it changed and what it kept."""


def named(model: nn.Module, *kinds: type[M]) -> Iterator[tuple[str, M]]:
    """Submodules that are of one of `kinds`, with their dotted names, each module once, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def computed_weight(layer: nn.Module) -> str | None:
    """Why a layer cannot be rewritten whose weight or bias is made of other parameters at each call; None for one that owns them."""
    computed = next((name for name in ("weight", "bias") if name not in layer._parameters), None)
    return None if computed is None else f"its {computed} is computed (weight norm, spectral norm): remove that first"


def computes_as_usual(layer: nn.Module, x: Tensor) -> bool:
    """False for a subclass that pads, standardises or masks before its product: its weight and strides do not say what it computes.

    `x`: what it was given. A convolution is given parts of its first image, too, a row, a column and a stride smaller: it may pad some
    sizes only.
    """
    if type(layer) in (nn.Linear, nn.Conv2d):
        return True
    if isinstance(layer, nn.Linear):
        return _alike(type(layer).forward(layer, x), F.linear(x, layer.weight, layer.bias))
    assert isinstance(layer, nn.Conv2d)
    if not _convolves(layer, x):
        return False
    rows, columns = (sorted({0, 1, max(1, stride - 1)}) for stride in layer.stride)
    for fewer_rows, fewer_columns in itertools.product(rows, columns):
        part = x[:1, ..., : x.shape[-2] - fewer_rows, : x.shape[-1] - fewer_columns]
        with suppress(RuntimeError, ValueError, AssertionError):  # a size that it does not take, and is never given
            if not _convolves(layer, part):
                return False
    return True


def _convolves(layer: nn.Conv2d, x: Tensor) -> bool:
    due = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return _alike(type(layer).forward(layer, x), due)


def _alike(output: Tensor, due: Tensor) -> bool:
    return due.shape == output.shape and torch.allclose(due, output, rtol=1e-4, atol=1e-5 * float(output.abs().max()))


def check_kept(keep: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    """Raises `MuntinError` for a name in `keep` that no layer has."""
    unknown = [entry for entry in keep if not any(is_kept(name, (entry,)) for name in layers)]
    if unknown:
        raise MuntinError(f"keep names no layer: {', '.join(unknown)}; the model has {', '.join(list(layers)[:6])}, ...")


def keepable(model: nn.Module) -> dict[str, nn.Module]:
    """What `keep` may name, by dotted name: layers, and the products of muntin's attention."""
    return dict(named(model, nn.Linear, nn.Conv2d, Product, SoftmaxProduct))


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a layer is named in `keep`: itself, a module that it lies in, or a part that it would be factored into."""
    return any(f"{name}.".startswith(f"{entry}.") or (name and entry in (f"{name}.{part}" for part in PARTS)) for entry in keep)


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


_NO_WEIGHTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
"""What has matrices of its own, and multiplies none of them with what comes in."""


def others(model: nn.Module) -> dict[str, nn.Module]:
    """What holds weights and has no form but this one, by dotted name: the kinds of `OTHERS`, and modules of the model's own that multiply
    by parameters of theirs (an equalised or a conditional convolution; the parts that a computed weight is made of)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OTHERS) or _has_bare_weights(module)}


def _has_bare_weights(module: nn.Module) -> bool:
    """A token or a table of positions is none: it is (1, ...)."""
    known = (nn.Linear, nn.Conv2d, *_NO_WEIGHTS)
    if isinstance(module, known) or type(module).__module__.partition(".")[0] == "muntin":
        return False
    return any(parameter.ndim > 1 and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False))


def out_of_reach(model: nn.Module, pass_: str, form: str) -> list[Change]:
    """Layers with weights of kinds that no pass rewrites, each kept: so that nobody takes them for done. `form`: what they do not have."""
    found = {name: layer for name, layer in others(model).items() if not isinstance(layer, ParametrizationList)}  # whose layer is told
    return [Change(layer=name, pass_=pass_, done="kept", reason=f"{type(layer).__name__}: no {form}") for name, layer in found.items()]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is, in every place that holds the same module (shared layers stay shared), plain attributes, lists, tuples
    and dicts among them: a forward that goes through one of these calls what is in it. Hooks of the old one go on with the new one."""
    old = model.get_submodule(name)
    layer.train(old.training)
    for hooks in _HOOKS:
        vars(layer)[hooks].update(vars(old)[hooks])
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children() gives a module that has two names once
            if child is old:
                setattr(parent, key, layer)
        for key, value in list(vars(parent).items()):
            if key not in _OWN:
                vars(parent)[key] = _with(value, old, layer, set())


_OWN = frozenset(vars(nn.Module()))
"""The attributes that PyTorch keeps for itself."""
_HOOKS = tuple(name for name in sorted(_OWN) if name.startswith(("_forward_hooks", "_forward_pre_hooks")))
"""Those of them that say what is called around a forward pass, and how."""


def _with(value: Any, old: nn.Module, new: nn.Module, seen: set[int]) -> Any:
    """A value in which plain lists, tuples and dicts hold another module in the place of `old`; lists and dicts are changed in place.
    `seen`: the ids of those that were looked at."""
    if value is old:
        return new
    if not isinstance(value, list | tuple | dict) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        parts = [_with(part, old, new, seen) for part in value]
        if all(part is was for part, was in zip(parts, value, strict=True)):
            return value
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if (changed := _with(part, old, new, seen)) is not part:
            value[key] = changed
    return value


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by the parameter's identity."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def tied(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why what is inside of a unit cannot be rewritten for this unit alone, of those units where that is so, by name.

    A layer or a weight that is used elsewhere, too, would change there; a hook on a part would see other numbers. A unit that is used whole
    in several places is one, and an activation may be anybody's.
    """
    holders: dict[int, list[int]] = {}
    for module in model.modules():
        for held in (*module._modules.values(), *module._parameters.values()):
            if held is not None:
                holders.setdefault(id(held), []).append(id(module))
    found = {}
    for name, unit in units.items():
        _, *parts = unit.modules()
        inside = {id(unit), *map(id, parts)}
        own = [*(part for part in parts if any(True for _ in part.parameters())), *unit.parameters()]
        if any(len(by := holders[id(part)]) > 1 or not inside.issuperset(by) for part in own):
            found[name] = "parts of it are used in another place, too, and would change there"
        elif any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            found[name] = "a part of it has a hook, which would see other numbers"
    return found


def call_every_layer(model: nn.Module) -> None:
    """PyTorch's encoder layer has a fused path that takes the weights of its Linears without calling them: not of integer ones."""
    for _, layer in named(model, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # read by nothing but the choice of that path
