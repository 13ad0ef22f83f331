"""Plain PyTorch modules, which muntin can inspect, copy and rewrite: checks, copies, and the inputs of their layers."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.errors import MuntinError

ModelInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One batch of a model's inputs: pixels, or the arguments of its forward by position (a tuple or list) or by name (a mapping)."""
Watch = Callable[[str, nn.Module, tuple[Tensor, ...]], None]
"""Called with an operation's name, the operation and its inputs, before the operation runs."""


def check_module(model: object) -> None:
    """Raise `MuntinError` for a model that is no module, is on the meta device, or has TorchScript in it."""
    if not isinstance(model, nn.Module):
        raise MuntinError(
            f"the model is of type {type(model).__name__}: give a torch.nn.Module; weights alone go into one by its load_state_dict"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise MuntinError(
            "the model is on the meta device, without values: load its weights first (to_empty, or load_state_dict with assign=True)"
        )
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise MuntinError(f"{_title(name)} is TorchScript, which is neither rewritten nor traced: give the original module")


def check_eager(model: object) -> None:
    """Like `check_module`, and raise for compiled code, which ignores hooks and replaced layers."""
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, part in model.named_modules():
        if _is_wrapper(part) or getattr(part, "_compiled_call_impl", None) is not None:
            raise MuntinError(
                f"{_title(name)} is compiled by torch.compile: give the module that it was made of (its _orig_mod, or one whose compile() "
                "was not called), and compile the result"
            )


def eager_copy(model: nn.Module) -> nn.Module:
    """Copy a model without compiled code. Raises `MuntinError`, with advice, if it cannot be copied."""
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:  # computed tensors, tensors without values, objects that Python cannot copy
        reason = " ".join(str(error).split())[:200]
        raise MuntinError(
            f"cannot be copied: {reason}; its modules must hold objects that Python can copy: call prune.remove for layers with pruning "
            "masks, use the norms of torch.nn.utils.parametrizations, and keep no tensor that was computed with gradients"
        ) from error
    while _is_wrapper(copied):
        copied = copied._orig_mod  # type: ignore[assignment]
    for part in list(copied.modules()):
        for name, child in part._modules.items():  # second names too
            while child is not None and _is_wrapper(child):
                child = child._orig_mod  # type: ignore[assignment]
            part._modules[name] = child
    return copied


def as_input(model: nn.Module, batch: Tensor) -> Tensor:
    """The batch on the device and in the type of the model's weights, or of its buffers if all layers are quantised."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            return batch.to(tensor.device, tensor.dtype)
    return batch.to(torch.float32)


def call(model: nn.Module, batch: ModelInputs) -> Any:
    """The model's answer to a batch.

    A tensor alone is pixels, cast to the type of the model's weights. Of several inputs only floats are cast, so that token ids stay
    integers.
    """
    if isinstance(batch, Tensor):
        return model(as_input(model, batch))
    placed = _pytree.tree_map(lambda part: _placed(model, part), dict(batch) if isinstance(batch, Mapping) else tuple(batch))
    return model(**placed) if isinstance(placed, dict) else model(*placed)


def _placed(model: nn.Module, part: Any) -> Any:
    if not isinstance(part, Tensor):
        return part
    like = next((tensor for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_floating_point()), None)
    if like is None:
        return part
    return part.to(like.device, like.dtype) if part.is_floating_point() else part.to(like.device)


def inputs_of(model: nn.Module, batch: ModelInputs) -> ModelInputs:
    """Return a batch without labels, as of a DataLoader of (x, y): of a tuple or list, as many elements as the model's forward takes.

    A forward with one parameter gets x, and one with two required parameters both. A forward with `*args` gets all elements. A single
    image batch (4 dimensions), or one of floats, is returned as a tensor. Raises `MuntinError` where an element may be a label or the
    value of an optional parameter.
    """
    if not isinstance(batch, tuple | list) or not batch:
        return batch
    required, optional = _positional(model)
    count = max(required, 1)
    if len(batch) > count and optional:
        raise MuntinError(
            f"a batch holds {len(batch)} elements, and the model's forward requires {required} and may take {', '.join(optional)}: give "
            "inputs without labels, as [x for x, _ in loader], or by name in dictionaries"
        )
    inputs = tuple(batch) if optional is None else tuple(batch[:count])
    first = inputs[0]
    alone = len(inputs) == 1 and isinstance(first, Tensor) and (first.ndim == 4 or first.is_floating_point())
    return first if alone else inputs


def _positional(model: nn.Module) -> tuple[int, list[str] | None]:
    """Return how many positional parameters the model's forward requires, and the names of the optional ones; None for `*args`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    entries = inspect.signature(model.forward).parameters.values()
    if any(entry.kind is entry.VAR_POSITIONAL for entry in entries):
        return 0, None
    positional = [entry for entry in entries if entry.kind in kinds]
    optional = [entry.name for entry in positional if entry.default is not entry.empty]
    return len(positional) - len(optional), optional


def tensors_of(batch: ModelInputs) -> list[Tensor]:
    """The tensors of a batch or an answer of any structure."""
    if isinstance(batch, Mapping):  # also of a kind that PyTorch's trees do not know
        batch = dict(batch)
    return [part for part in _pytree.tree_leaves(batch) if isinstance(part, Tensor)]


def batch_rows(batch: ModelInputs) -> int:
    """The rows of a batch: the length of its first tensor that has one."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 0)


def first_row(batch: ModelInputs) -> ModelInputs:
    """The first row of a batch. Tensors of another length than the batch's are kept."""
    if isinstance(batch, Tensor):
        return batch[:1]
    rows = batch_rows(batch)
    parts = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
    cut: ModelInputs = _pytree.tree_map(
        lambda part: part[:1] if isinstance(part, Tensor) and part.ndim and len(part) == rows else part, parts
    )
    return cut


def watch_inputs(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[ModelInputs], watch: Watch) -> None:
    """Run the batches through the model without gradients; call `watch` before each operation."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda operation, inputs, by_name: watch(name, operation, (*inputs, *by_name.values()))

    handles = [operation.register_forward_pre_hook(hook(name), with_kwargs=True) for name, operation in operations.items()]
    run(model, batches, handles)


def run(model: nn.Module, batches: Sequence[ModelInputs], handles: Sequence[Any]) -> None:
    """Run the batches through the model without gradients, then remove the hooks `handles`."""
    try:
        with torch.no_grad():  # tensors of inference mode that the model keeps could not be trained
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _is_wrapper(part: nn.Module) -> bool:
    """Return True for the wrapper of `torch.compile`. Its class takes a second to import, and is loaded if a module was compiled."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(part, compiler.OptimizedModule)


def _title(name: str) -> str:
    return f"'{name}', a part of the model," if name else "the model"
