"""Finding and replacing the layers of any model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.nn.utils.parametrize import ParametrizationList

from muntin.errors import MuntinError
from muntin.layers import Product, SoftmaxProduct
from muntin.models.compression_record import Change

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
PARTS = ("reduce", "core", "expand")
"""Names of the layers inside a factored one."""
WHOLE_MODEL = "it is the whole model: put it into an nn.Sequential"
"""Reason to keep a layer that no other module holds."""
SPARSITY = "sparsity_pattern"
"""Attribute of a layer that was given a pattern of zeros (`sparsity.holding`)."""
UNUSUAL = "it does not compute what its kind does: no integer form"
"""Reason to keep a subclass that `computes_as_usual` refuses."""


def named(model: nn.Module, *kinds: type[M]) -> Iterator[tuple[str, M]]:
    """Submodules of one of `kinds` with their dotted names, each module once, in order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def computed_weight(layer: nn.Module) -> str | None:
    """Why a layer cannot be rewritten whose weight or bias is computed from other parameters at each call; None if it owns them."""
    computed = next((name for name in ("weight", "bias") if hasattr(layer, name) and name not in layer._parameters), None)
    return None if computed is None else f"its {computed} is computed (weight norm, spectral norm): remove that first"


def other_padding(layer: nn.Module, form: str) -> str | None:
    """Why a convolution that is not padded with a number of zeros has no `form`; None for other layers."""
    if not isinstance(layer, nn.Conv2d) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str)):
        return None
    return f"padding '{layer.padding if isinstance(layer.padding, str) else layer.padding_mode}' has no {form} here"


def computes_as_usual(layer: nn.Module, x: Tensor) -> bool:
    """Return False for a subclass that pads, standardises or masks, so that its weight and strides do not describe its result.

    `x`: an input. A convolution also gets smaller parts of its first image, as it may pad some sizes only.
    """
    if type(layer) in (nn.Linear, nn.Conv2d):
        return True
    if isinstance(layer, nn.Linear):
        return _close(type(layer).forward(layer, x), F.linear(x, layer.weight, layer.bias))
    assert isinstance(layer, nn.Conv2d)
    if not _convolves(layer, x):
        return False
    rows, columns = (sorted({0, 1, max(1, stride - 1)}) for stride in layer.stride)
    for fewer_rows, fewer_columns in itertools.product(rows, columns):
        part = x[:1, ..., : x.shape[-2] - fewer_rows, : x.shape[-1] - fewer_columns]
        with suppress(RuntimeError, ValueError, AssertionError):  # a size that the model never uses
            if not _convolves(layer, part):
                return False
    return True


def _convolves(layer: nn.Conv2d, x: Tensor) -> bool:
    expected = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return _close(type(layer).forward(layer, x), expected)


def _close(output: Tensor, expected: Tensor) -> bool:
    return expected.shape == output.shape and torch.allclose(expected, output, rtol=1e-4, atol=1e-5 * float(output.abs().max()))


EVERY = ("*",)
"""The names of all layers."""


def check_kept(keep: Sequence[str], layers: Mapping[str, nn.Module], *, argument: str = "keep") -> None:
    """Raise `MuntinError` for a name or pattern in `keep` that no layer has, or a string in the place of a sequence."""
    if isinstance(keep, str):
        raise MuntinError(f"{argument}={keep!r}: give a sequence of names, such as ({keep!r},)")
    unknown = [entry for entry in keep if not any(is_kept(name, (entry,)) for name in layers)]
    if unknown and (layers or tuple(keep) != EVERY):
        raise MuntinError(f"{argument} names no layer: {', '.join(unknown)}; the model has {', '.join(list(layers)[:6])}, ...")


def left_out(layers: Mapping[str, nn.Module], only: Sequence[str], keep: Sequence[str]) -> dict[str, str]:
    """Reasons to keep the layers that `keep` names or `only` does not, by name.

    Raises `MuntinError` for an entry that names no layer.
    """
    check_kept(only, layers, argument="only")
    check_kept(keep, layers)
    reasons = {name: "not named in only" for name in layers if not is_kept(name, only)}
    return reasons | {name: "named in keep" for name in layers if is_kept(name, keep)}


def keepable(model: nn.Module) -> dict[str, nn.Module]:
    """The operations that `keep` may name: layers, and the products of muntin's attention."""
    return dict(named(model, nn.Linear, nn.Conv2d, Product, SoftmaxProduct))


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Return True if `keep` names a layer, a module around it, or a part that it would be factored into.

    An entry is a dotted name or a pattern of `fnmatch`, in which `*` also matches dots: `blocks.*.mlp`.
    """
    around = list(itertools.accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}"))
    parts = [f"{name}.{part}" for part in PARTS] if name else []
    return any(entry in around or entry in parts or any(fnmatchcase(outer, entry) for outer in around) for entry in keep)


OTHERS = (
    nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
    nn.Bilinear,
)  # fmt: skip
"""Kinds that multiply by weights and have no other form. (Of an attention, its projection of queries, keys and values.)"""
_NO_PRODUCT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
"""Kinds that have matrices and do not multiply their input by them."""


def others(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with weights and no other form, by dotted name: the kinds of `OTHERS`, and the model's own modules with bare parameters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OTHERS) or _has_bare_weights(module)}


def _has_bare_weights(module: nn.Module) -> bool:
    known = (nn.Linear, nn.Conv2d, *_NO_PRODUCT)
    if isinstance(module, known) or type(module).__module__.partition(".")[0] == "muntin":
        return False
    return any(parameter.ndim > 1 and parameter.shape[0] > 1 for parameter in module.parameters(recurse=False))  # (1, ...): a table


def out_of_reach(model: nn.Module, pass_: str, form: str) -> list[Change]:
    """A kept `Change` for each module of `others`. `form`: what it does not have."""
    modules = {name: module for name, module in others(model).items() if not isinstance(module, ParametrizationList)}  # the layer has one
    return [Change(layer=name, pass_=pass_, done="kept", reason=f"{type(module).__name__}: no {form}") for name, module in modules.items()]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of `name`, everywhere the same module is held, also in plain attributes, lists, tuples and dicts. The hooks
    of the old module are kept."""
    old = model.get_submodule(name)
    layer.train(old.training)
    for hooks in _HOOKS:
        vars(layer)[hooks].update(vars(old)[hooks])
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children() omits second names
            if child is old:
                setattr(parent, key, layer)
        for key, value in list(vars(parent).items()):
            if key not in _OWN:
                vars(parent)[key] = _with(value, old, layer, set())


_OWN = frozenset(vars(nn.Module()))
"""Attributes of every nn.Module."""
_HOOKS = tuple(name for name in sorted(_OWN) if name.startswith(("_forward_hooks", "_forward_pre_hooks")))
"""Attributes with hooks of the forward pass and their options."""


def _with(value: Any, old: nn.Module, new: nn.Module, seen: set[int]) -> Any:
    """A value with `new` in the place of `old` in plain lists, tuples and dicts; lists and dicts are changed in place.
    `seen`: ids of the containers that were visited."""
    if value is old:
        return new
    if not isinstance(value, list | tuple | dict) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        parts = [_with(part, old, new, seen) for part in value]
        if all(part is before for part, before in zip(parts, value, strict=True)):
            return value
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if (changed := _with(part, old, new, seen)) is not part:
            value[key] = changed
    return value


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter, by the parameter's identity."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def tied(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, str]:
    """The units, by name, whose parts cannot be rewritten, with reasons: a layer or weight is used elsewhere, or a part has a hook."""
    holders: dict[int, list[int]] = {}
    for module in model.modules():
        for held in (*module._modules.values(), *module._parameters.values()):
            if held is not None:
                holders.setdefault(id(held), []).append(id(module))
    reasons = {}
    for name, unit in units.items():
        _, *parts = unit.modules()
        inside = {id(unit), *map(id, parts)}
        own = [*(part for part in parts if any(True for _ in part.parameters())), *unit.parameters()]
        if any(len(by := holders[id(part)]) > 1 or not inside.issuperset(by) for part in own):
            reasons[name] = "parts of it are also used elsewhere and would change there"
        elif any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            reasons[name] = "a part of it has a hook, which would see other values"
    return reasons


def failing(items: Sequence[T], works: Callable[[Sequence[T]], bool]) -> list[T]:
    """The items that do not work: tries all at once, then each half. `works` changes a model, or restores it and returns False."""
    if not items or works(items):
        return []
    half = len(items) // 2
    return failing(items[:half], works) + failing(items[half:], works) if half else list(items)


def call_every_layer(model: nn.Module) -> None:
    """Switch off the fused path of PyTorch's encoder layer, which uses the weights of its Linears without calling them."""
    for _, layer in named(model, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # used only to choose that path
