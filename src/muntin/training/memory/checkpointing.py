"""Activation checkpointing: blocks of a model whose activations are computed again for the gradient instead of kept.

Applied to a model from outside and taken away again; names, weights and answers stay as they are. Source: Chen et al., "Training Deep Nets
with Sublinear Memory Cost" (1604.06174); the selective form: Korthikanti et al. (2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from muntin.training.config import Checkpointing
from muntin.training.gradients import buffers_kept

_aten = torch.ops.aten
KEPT = {
    getattr(_aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention",
    )
}  # fmt: skip
"""Operators whose answers the selective form keeps: products, which are most of the time and little of the memory."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by dotted name: entries of its lists that have layers inside, the outermost ones.

    Of a model without such lists, the children that have layers inside.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str, listed: bool) -> None:
        container = type(module) in CONTAINERS
        inside = any(True for _ in module.children()) and any(True for _ in module.parameters())
        if listed and inside and not container:
            found[name] = module
            return
        for key, child in module.named_children():
            visit(child, f"{name}.{key}".lstrip("."), container)

    visit(model, "", False)
    if not found:
        children = ((name, child) for name, child in model.named_children() if type(child) not in CONTAINERS[1:])
        found = {name: child for name, child in children if any(True for _ in child.children()) and any(True for _ in child.parameters())}
    return found


class ActivationCheckpointing:
    """The blocks of a model, each recomputed or not. `level`: of all blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks_of(model)
        self._before: dict[str, Callable[..., Any] | None] = {}

    def apply(self, levels: Mapping[str, Checkpointing]) -> None:
        """Set the level of blocks by name; others become "none"."""
        self.remove()
        for name, level in levels.items():
            if level == "none":
                continue
            block = self.blocks[name]
            self._before[name] = block.__dict__.get("forward")
            block.forward = partial(_recomputed, block, block.forward, level == "selective")

    def apply_all(self, level: Checkpointing) -> None:
        """Set the level of every block."""
        self.apply(dict.fromkeys(self.blocks, level))

    def remove(self) -> None:
        """Take the checkpointing away."""
        for name, forward in self._before.items():
            block = self.blocks[name]
            del block.forward
            if forward is not None:
                block.forward = forward
        self._before.clear()


def _recomputed(block: nn.Module, forward: Callable[..., Any], selective: bool, *arguments: Any, **options: Any) -> Any:
    """Call a block, and keep its inputs alone for the gradient, or with the answers of products."""
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
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
