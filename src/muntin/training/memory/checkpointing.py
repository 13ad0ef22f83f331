"""Activation checkpointing: blocks of a model whose activations are computed again for the gradient instead of kept.

Applied to a model from outside and taken away again; names, weights and answers stay as they are. Operators outside of selective blocks may
be computed in chunks (`layers.chunks`): of a recomputed perceptron's hidden channels, one chunk's are held at a time.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (1604.06174); the selective form: Korthikanti et al. (2205.05198,
section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from muntin.layers.attention import WindowedLayer
from muntin.layers.chunks import ModuleCall, ReplacedCalls, chunk_operators, operators_of
from muntin.training.config import Checkpointing
from muntin.training.gradients import buffers_kept

_aten = torch.ops.aten
LONG = 300
"""Multiply-adds for each number of its answer from which the selective form keeps a product's answer: little memory for much time."""
_ATTENTION = {
    getattr(_aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "flash_attention_for_cpu", "cudnn_attention")
}
_LENGTHS: dict[Any, Callable[..., int]] = {
    _aten.mm.default: lambda a, b: a.shape[-1],
    _aten.bmm.default: lambda a, b: a.shape[-1],
    _aten.addmm.default: lambda bias, a, b: a.shape[-1],
    _aten.baddbmm.default: lambda bias, a, b: a.shape[-1],
    _aten.convolution.default: lambda x, weight, *_: weight[0].numel(),
}
"""Multiply-adds for each number of the answer, by operator."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
OPERATOR_MEMORY = 16 << 20
"""Most temporary bytes of an operator where memory is short and the recipe gives no number."""


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by dotted name: entries of its lists that have layers inside; of nested lists, those of the inner ones.

    Beside inner lists, children that have layers inside are blocks, too. Of a model without lists, its children that have layers inside.
    """
    blocks: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str, listed: bool) -> None:
        container = type(module) in CONTAINERS
        if listed and _has_layers(module) and not container and not _has_lists(module):
            blocks[name] = module
            return
        for key, child in module.named_children():
            visit(child, f"{name}.{key}".lstrip("."), listed or container)

    visit(model, "", False)
    if not blocks:
        children = ((name, child) for name, child in model.named_children() if type(child) not in CONTAINERS[1:])
        blocks = {name: child for name, child in children if _has_layers(child)}
    return blocks


def _has_layers(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _has_lists(module: nn.Module) -> bool:
    """Return True if a list inside has at least two entries with layers inside."""
    lists = (child for child in module.modules() if type(child) in CONTAINERS)
    return any(sum(_has_layers(entry) for entry in child.children()) > 1 for child in lists)


class ActivationCheckpointing:
    """The blocks of a model, each recomputed or not, and its operators, whole or in chunks."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.blocks = model, blocks_of(model)
        self._calls = ReplacedCalls()

    def apply(self, levels: Mapping[str, Checkpointing], operator_memory: int | None = None) -> None:
        """Set the level of blocks by name; others become "none".

        `operator_memory`: most temporary bytes of an operator; None: all are computed whole. In selective blocks they stay whole, as
        products that are kept must not be computed again.
        """
        self.remove()
        if operator_memory is not None:
            whole = tuple(f"{name}." for name, level in levels.items() if level == "selective")
            operators = {name: operator for name, operator in operators_of(self.model).items() if not f"{name}.".startswith(whole)}
            chunk_operators(self._calls, operators, operator_memory)
        for name, level in levels.items():
            if level == "none":
                continue
            block = self.blocks[name]
            entry = entry_of(block)
            self._calls.replace(block, entry, partial(_recomputed, block, getattr(block, entry), level == "selective"))

    def apply_all(self, level: Checkpointing, operator_memory: int | None = None) -> None:
        """Set the level of every block; see `apply`."""
        self.apply(dict.fromkeys(self.blocks, level), operator_memory)

    def wrap(self, wrapper: Callable[[str, ModuleCall], ModuleCall]) -> None:
        """Replace the call of each block by what `wrapper` returns for its name and call, instead of recomputing; see `remove`."""
        self.remove()
        for name, block in self.blocks.items():
            self._calls.replace(block, entry_of(block), wrapper(name, getattr(block, entry_of(block))))

    def remove(self) -> None:
        """Take the checkpointing and the chunks away."""
        self._calls.restore()


def entry_of(block: nn.Module) -> str:
    """The method that a model calls: muntin's stages call their blocks on windows."""
    return "attend" if isinstance(block, WindowedLayer) else "forward"


def _recomputed(block: nn.Module, forward: ModuleCall, selective: bool, *arguments: Any, **options: Any) -> Any:
    """ModuleCall a block, and keep its inputs alone for the gradient, or with the answers of products."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=partial(_contexts, block, selective), **options)


def _contexts(block: nn.Module, selective: bool) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and of the second forward pass. The second one leaves the statistics of norms as they are."""
    if not selective:
        return nullcontext(), buffers_kept(block)
    first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, _both(buffers_kept(block), second)


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    long = operator in _LENGTHS and _LENGTHS[operator](*arguments) >= LONG
    return CheckpointPolicy.MUST_SAVE if long or operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
