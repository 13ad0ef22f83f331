"""Checkpointing by a budget: the choice of the blocks whose activations are computed again.

    each block alone: bytes kept for the gradient, seconds of its forward pass
    nothing recomputed -> measure the peak -> over the budget: recompute what frees the excess in the least time -> measure again -> ...

The measured peak decides, because it is not the sum of what blocks keep: temporaries and recomputed blocks come on top, and it may even
grow when more is recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ByteSize
from torch import Tensor, nn

from muntin.errors import MuntinError
from muntin.text import count
from muntin.training.memory.checkpointing import ActivationCheckpointing
from muntin.training.recovery.out_of_memory import MemoryUse

_PARTS = 256
"""Parts of the bytes to free in which the choice counts."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Bytes that recomputing a block frees, and seconds that it takes."""

    kept: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """The blocks to recompute. `peaks`: measured after each choice, bytes, None where memory was short; `fits`: of the last one.

    `chunked`: operators are computed in chunks, too.
    """

    recomputed: tuple[str, ...]
    chunked: bool
    peaks: tuple[int | None, ...]
    fits: bool


def block_costs(checkpointing: ActivationCheckpointing, model: nn.Module, forward: Callable[[], object]) -> dict[str, BlockCost]:
    """Measure the blocks of a model one by one in two calls of `forward`, of which the second counts. Takes the memory of one block.

    Bytes are those of the tensors that a block keeps for its gradient, without parameters, its inputs and its answer.
    """
    costs: dict[str, BlockCost] = {}
    weights = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def measured(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measure(*arguments: Any, **options: Any) -> Any:
            arguments = tuple(_with_gradient(argument) for argument in arguments)
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                kept[_place(tensor)] = tensor.untyped_storage().nbytes()
                return tensor.detach()  # the tensor itself would refer to the graph that holds it, and would never be freed

            _synchronize()
            started = time.perf_counter()
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                answer = call(*arguments, **options)
            _synchronize()
            seconds = time.perf_counter() - started
            other = weights | {_place(tensor) for tensor in _tensors((arguments, options, answer))}
            before = costs.get(name, BlockCost(kept=0, seconds=0.0))  # of an earlier call in this pass
            own = sum(size for place, size in kept.items() if place not in other)
            costs[name] = BlockCost(kept=before.kept + own, seconds=before.seconds + seconds)
            return _detached(answer)

        return measure

    checkpointing.wrap(measured)
    try:
        for _ in range(2):
            costs.clear()
            with torch.no_grad():
                forward()
    finally:
        checkpointing.remove()
    return costs


def cheapest(costs: Mapping[str, BlockCost], freed: int) -> tuple[str, ...]:
    """The blocks that free at least `freed` bytes in the least time, in the order of `costs`; all, if all free less.

    Exact up to a 256th of `freed` a block (dynamic programming over parts of `freed`, rounded against a block).
    """
    if sum(cost.kept for cost in costs.values()) <= freed:
        return tuple(costs)
    part = freed / _PARTS
    best: dict[int, tuple[float, tuple[str, ...]]] = {0: (0.0, ())}  # by parts freed, at most _PARTS: seconds, blocks
    for name, cost in costs.items():
        for parts, (seconds, names) in list(best.items()):
            total = min(_PARTS, parts + int(cost.kept / part))
            if total > parts and (total not in best or seconds + cost.seconds < best[total][0]):
                best[total] = (seconds + cost.seconds, (*names, name))
    return best[_PARTS][1] if _PARTS in best else tuple(costs)


def plan_budget(budget: int, costs: Mapping[str, BlockCost], peak_of: Callable[[tuple[str, ...], bool], int | None]) -> BudgetPlan:
    """Choose blocks until the measured peak is at most `budget` bytes, or all are recomputed in chunks.

    `peak_of(blocks, chunked)` measures a step with them recomputed; None: memory was short.
    """
    total = sum(cost.kept for cost in costs.values())
    recomputed: tuple[str, ...] = ()
    chunked, target, peaks = False, 0, []
    while True:
        peaks.append(peak_of(recomputed, chunked))
        fits = peaks[-1] is not None and peaks[-1] <= budget
        if fits or chunked:
            return BudgetPlan(recomputed=recomputed, chunked=chunked, peaks=tuple(peaks), fits=fits)
        chunked = len(recomputed) == len(costs)
        excess = max(total // 16, 0 if peaks[-1] is None else peaks[-1] - budget)
        target = max(target + excess, sum(costs[name].kept for name in recomputed) + 1)
        recomputed = cheapest(costs, target)


def keep_to_budget(
    budget: int,
    use: MemoryUse,
    costs_of: Callable[[MemoryUse], Mapping[str, BlockCost]],
    peak_of: Callable[[MemoryUse, tuple[str, ...], bool], int | None],
) -> tuple[MemoryUse, str]:
    """Choose blocks, and halve the micro-batch where all blocks are not enough. Returns the use of memory and a note.

    `costs_of`, `peak_of`: as for `plan_budget`, with the micro-batch. Raises `MuntinError` with figures if the least is over the budget.
    """
    while True:
        costs = costs_of(use)

        def peak(blocks: tuple[str, ...], chunked: bool, use: MemoryUse = use) -> int | None:
            return peak_of(use, blocks, chunked)

        plan = plan_budget(budget, costs, peak)
        if plan.fits:
            return use, _summary(budget, use, costs, plan)
        half = use.halved()
        if half is None:
            least = "was more than there is" if plan.peaks[-1] is None else f"is {size(plan.peaks[-1])}"
            together = f", and its norms take {use.unit} crops together (see training.norm_group)" if use.unit > 1 else ""
            raise MuntinError(
                f"training.checkpointing.budget {size(budget)}: with micro-batches of {use.micro_batch} and all blocks computed again the "
                f"peak {least}{together}: give more, or take a smaller data.crop or model"
            )
        use = half


def _summary(budget: int, use: MemoryUse, costs: Mapping[str, BlockCost], plan: BudgetPlan) -> str:
    """Return the plan and its measured figures in words."""
    whole = "more than there is" if plan.peaks[0] is None else size(plan.peaks[0])
    measured = f"measured peak {size(plan.peaks[-1] or 0)} with micro-batches of {use.micro_batch}"
    if not plan.recomputed:
        return f"checkpointing by a budget of {size(budget)}: nothing is computed again; {measured}"
    shown = ", ".join(plan.recomputed[:4]) + (", ..." if len(plan.recomputed) > 4 else "")
    share = sum(costs[name].seconds for name in plan.recomputed) / max(1e-9, sum(cost.seconds for cost in costs.values()))
    return (
        f"checkpointing by a budget of {size(budget)}: {len(plan.recomputed)} of {count(len(costs), 'block')} are computed again "
        f"({shown}), {share:.0%} of their time{', operators in chunks' if plan.chunked else ''}; {measured}, {whole} with none"
    )


def size(value: int) -> str:
    """Bytes as a number and a unit."""
    return ByteSize(value).human_readable(separator=" ")


def _with_gradient(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(entry) for key, entry in value.items()}
    return type(value)(map(_detached, value)) if type(value) in (tuple, list) else value


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
