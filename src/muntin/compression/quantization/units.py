"""Units of a model: parts that run once, one after another, and the inputs that they get.

Rounding by reconstruction goes from unit to unit, so that a layer's inputs cost a run of its unit and not of the whole model. A unit is the
outermost module around a layer that is called once and has few layers: a residual block, an attention, a single layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.models.eager import ModelInputs, call

UNIT_LAYERS = 8
"""Maximum number of layers of a unit."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call, by position and by name."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a model, with the names of its layers in the order of their calls."""

    name: str
    layers: tuple[str, ...]
    follows: bool
    """True if its only tensor is the output of the unit before it."""
    template: Arguments
    """Its arguments in the first batch, with empty tensors."""
    nbytes: int
    """Size of its inputs."""


class _ReachedError(Exception):
    """Ends a forward pass at the module of interest."""


@dataclass
class _Calls:
    """One run of a model: calls, and the tensors between modules."""

    counts: dict[str, int]
    around: dict[str, tuple[str, ...]]
    """By layer: the modules that were running, from the outermost to the layer itself."""
    inputs: dict[str, tuple[Tensor, int] | None]
    """The only tensor that each module is called with, with its version; None for several."""
    templates: dict[str, Arguments]
    sizes: dict[str, int]
    """Bytes of the inputs of each module."""
    outputs: dict[str, tuple[Tensor, int] | None]


def units_of(model: nn.Module, layers: Mapping[str, nn.Module], batch: ModelInputs) -> list[Unit]:
    """The units of `layers` in the order in which the model calls them. Layers that are not called exactly once are in none."""
    calls = _record(model, layers, batch)
    below: dict[str, set[str]] = {}
    for layer, path in calls.around.items():
        for name in path:
            below.setdefault(name, set()).add(layer)
    members: dict[str, list[str]] = {}
    for layer, path in calls.around.items():
        if calls.counts[layer] == 1:
            suitable = (name for name in path if calls.counts[name] == 1 and len(below[name]) <= UNIT_LAYERS)
            members.setdefault(next(suitable), []).append(layer)
    units: list[Unit] = []
    for name, inside in members.items():
        given, before = calls.inputs[name], calls.outputs[units[-1].name] if units else None
        follows = given is not None and before is not None and given[0] is before[0] and given[1] == before[1]
        template, nbytes = calls.templates[name], calls.sizes[name]
        units.append(Unit(name=name, layers=tuple(inside), follows=follows, template=template, nbytes=nbytes))
    return units


def _record(model: nn.Module, layers: Mapping[str, nn.Module], batch: ModelInputs) -> _Calls:
    calls = _Calls(counts={}, around={}, inputs={}, templates={}, sizes={}, outputs={})
    running: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
            calls.counts[name] = calls.counts.get(name, 0) + 1
            running.append(name)
            given = [part for part in _pytree.tree_leaves((inputs, by_name)) if isinstance(part, Tensor)]
            calls.templates[name] = _with_tensor((inputs, by_name), torch.empty(0))
            calls.sizes[name] = sum(part.nbytes for part in given)
            calls.inputs[name] = (given[0], given[0]._version) if len(given) == 1 else None
            if name in layers:
                calls.around.setdefault(name, tuple(running))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            del running[running.index(name) :]
            calls.outputs[name] = (output, output._version) if isinstance(output, Tensor) else None

        return hook

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True), module.register_forward_hook(after(name))]
    with _removed(handles), torch.no_grad():
        call(model, batch)
    return calls


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove the hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arguments_of(model: nn.Module, unit: Unit, batches: Sequence[ModelInputs]) -> list[Arguments | None]:
    """The arguments of a unit on each batch, None where it is not called. Costs a run of the model up to the unit for each."""
    module = model.get_submodule(unit.name)
    return [_reached(module, partial(call, model, batch)) for batch in batches]


def following_arguments(unit: Unit, output: Tensor) -> Arguments:
    """The arguments of a unit that follows, made of the output of the unit before it."""
    return _with_tensor(unit.template, output)


def _with_tensor(arguments: Arguments, tensor: Tensor) -> Arguments:
    """The arguments with `tensor` in the place of each tensor."""
    changed: Arguments = _pytree.tree_map(lambda part: tensor if isinstance(part, Tensor) else part, arguments)
    return changed


def input_of(layer: nn.Module, unit: nn.Module, arguments: Arguments) -> Tensor | None:
    """The input of a layer in a unit, None if it is not called. Costs a run of the unit up to the layer."""
    reached = _reached(layer, lambda: run_unit(unit, arguments))
    return None if reached is None else next(iter((*reached[0], *reached[1].values())))


def run_unit(unit: nn.Module, arguments: Arguments) -> Any:
    """The output of a unit. It gets copies, since it may write into its input."""
    inputs, by_name = _pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, arguments)
    return unit(*inputs, **by_name)


def _reached(module: nn.Module, run: Callable[[], Any]) -> Arguments | None:
    """The arguments of a module in a run, which ends there; None if the run does not call it."""
    given: list[Arguments] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        given.append((inputs, by_name))
        raise _ReachedError

    with _removed([module.register_forward_pre_hook(hook, with_kwargs=True)]), torch.no_grad():
        try:
            run()
        except _ReachedError:
            return given[0]
    return None
