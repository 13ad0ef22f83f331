"""The flow of tensors between layers in one run of a model: which layers and operations use a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.compression.rewrite import parameter_users
from muntin.models.eager import ModelInputs, call

_ATEN = torch.ops.aten
RELUS = {_ATEN.relu.default, _ATEN.relu_.default, _ATEN.leaky_relu.default, _ATEN.leaky_relu_.default}
"""Operations that commute with a positive factor of each channel."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a tensor: by a layer, or by an operation with a result (its first one, if it has several)."""

    layer: str = ""
    function: Any = None
    arguments: tuple[Any, ...] = ()
    result: int = 0


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Uses of each tensor in a run, by the tensor's identity, without the operations inside layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: dict[int, list[Use]] = {}
        self.outputs: dict[str, int] = {}
        """Identity of the last output of each layer."""
        self.calls: dict[str, int] = {}
        """Number of calls of each layer."""
        self._alive: list[Any] = []
        """Keeps identities unique."""
        self._inside = 0

    def use(self, tensor: Any, one: Use) -> None:
        self._alive.append(tensor)
        self.uses.setdefault(id(tensor), []).append(one)

    def enter(self, name: str, tensor: Any) -> None:
        """A layer begins to read a tensor."""
        self.use(tensor, Use(layer=name))
        self._inside += 1

    def leave(self, name: str, output: Any) -> None:
        """A layer has given its output."""
        self._inside -= 1
        self._alive.append(output)
        self.outputs[name] = id(output)
        self.calls[name] = self.calls.get(name, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._alive.append(result)
            first = result[0] if isinstance(result, tuple) and result else result
            for part in _pytree.tree_leaves((args, kwargs or {})):
                if isinstance(part, Tensor):
                    self.use(part, Use(function=func, arguments=args, result=id(first)))
        return result


def record_flow(model: nn.Module, layers: Mapping[str, nn.Module], batch: ModelInputs) -> Flow:
    """Run a batch and record which operations, and which of `layers`, use each tensor. The first input of a layer counts."""
    flow = Flow()

    def before(name: str) -> Callable[..., None]:
        return lambda _, inputs, by_name: flow.enter(name, next(iter((*inputs, *by_name.values())), None))

    def after(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: flow.leave(name, output)

    handles = []
    for name, layer in layers.items():
        handles += [layer.register_forward_pre_hook(before(name), with_kwargs=True), layer.register_forward_hook(after(name))]
    try:
        with torch.no_grad(), flow:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return flow


def called_once(model: nn.Module, layers: Mapping[str, nn.Module], flow: Flow) -> Collection[str]:
    """The layers that ran exactly once and share no parameter with another module."""
    users = parameter_users(model)
    return {
        name
        for name, layer in layers.items()
        if flow.calls.get(name) == 1 and all(len(users[id(one)]) == 1 for one in layer.parameters(recurse=False))
    }
