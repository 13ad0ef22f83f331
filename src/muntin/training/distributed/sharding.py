"""Division of a model in training among processes, applied to the model from outside.

    none    parameters, gradients, optimiser state and average whole; gradients are added after the backward pass
    zero1   the same, with the optimiser state of each matrix in one process, which updates it and sends it to the others
    zero2   rows of all of these; a block's parameters are whole from its forward to its backward pass
    zero3   rows of all of these; a block's parameters are whole during each of the two passes

A process computes its part of the gradient of the whole batch (see `loss`), so gradients are added and never averaged. With none and zero1
no process waits for another inside a forward or backward pass, so all can try again after one of them lacked memory.

zero1 is not `torch.distributed.optim.ZeroRedundancyOptimizer`: that makes its optimiser from a list of parameters, hides the state in it,
and collects the state for a checkpoint whole. Here a process's optimiser has no gradients of the others' matrices, so it makes no state.
State of vectors is small and stays in every process. zero2 and zero3 are PyTorch's `fully_shard` (FSDP2). Source: Rajbhandari et al.,
"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (1910.02054).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import torch
from torch import Tensor, nn

from muntin.errors import MuntinError, RecipeError
from muntin.training.config import Sharding
from muntin.training.distributed.averaging import STATISTICS, ShardedAverage, WeightAverage
from muntin.training.distributed.matrices import MatrixExchange
from muntin.training.distributed.ranks import ProcessGroup, Ranks, is_sharded, local, spread
from muntin.training.memory.checkpointing import entry_of
from muntin.training.memory.memory_format import channels_last
from muntin.training.recovery.out_of_memory import inseparable_rows


class Placement:
    """`none`: a whole copy in every process."""

    communicates = False
    """True if processes wait for each other inside a forward or backward pass."""
    exchange: MatrixExchange | None = None

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def place(self, model: nn.Module, blocks: Iterable[nn.Module], decay: float) -> WeightAverage:
        """Give each process its part of the first process's model, and return its average. `blocks`: are made whole one at a time."""
        self._copy_first(model)
        channels_last(model)
        return WeightAverage(model, decay)

    def _copy_first(self, model: nn.Module) -> None:
        """Give every process the first one's weights. Raises `MuntinError` if they have made different models."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        number = crc32(repr([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]).encode())
        if self.ranks.any(number != self.ranks.of_first(number)):
            raise MuntinError("the processes made different models: run them on machines of one kind, with the same data and packages")
        self.ranks.send(list(tensors.values()), 0)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once, before the first step."""

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return True if this process holds optimiser state of the parameter."""
        return True

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes."""
        if self.ranks.count == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        used = self.ranks.sum(torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)).tolist()
        gradients = []
        for parameter, processes in zip(trained, used, strict=True):
            if processes:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        self.ranks.add(gradients)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Bound the norm of the gradient, and return what it was."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Update the parameters."""
        scaler.step(optimizer)

    def settle(self, *models: nn.Module) -> None:
        """Average the running statistics of norms over the processes: each has seen its own rows."""
        if self.ranks.count == 1:
            return
        buffers = [b for model in models for name, b in model.named_buffers() if name.rpartition(".")[2] in STATISTICS]
        self.ranks.add(buffers)
        for buffer in buffers:
            buffer.div_(self.ranks.count)


class ShardedOptimizer(Placement):
    """`zero1`: the optimiser state of each tensor with at least two axes is in one process; owners are spread by size."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._owned = [parameter for parameter in parameters if sum(side > 1 for side in parameter.shape) > 1]
        self._owners = spread([parameter.numel() for parameter in self._owned], self.ranks.count)
        self._foreign = {p for p, owner in zip(self._owned, self._owners, strict=True) if owner != self.ranks.index}

    def owns(self, parameter: nn.Parameter) -> bool:
        return parameter not in self._foreign

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        for parameter in self._foreign:
            parameter.grad = None
        scaler.step(optimizer)
        by_owner: dict[int, list[Tensor]] = defaultdict(list)
        for parameter, owner in zip(self._owned, self._owners, strict=True):
            by_owner[owner].append(parameter.detach())
        for owner, tensors in by_owner.items():
            self.ranks.send(tensors, owner)


class FullySharded(Placement):
    """`zero2` and `zero3`: rows of every tensor. Scalars, and tensors of another type than most, stay whole in every process."""

    communicates = True

    def __init__(self, ranks: ProcessGroup, *, reshard: bool) -> None:
        super().__init__(ranks)
        self.device, self.reshard = ranks.device, reshard
        self.exchange = MatrixExchange(ranks)

    def place(self, model: nn.Module, blocks: Iterable[nn.Module], decay: float) -> WeightAverage:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method  # importing it takes a second

        self._copy_first(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
        shell = copy.deepcopy(model)
        types = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
        common = max(set(types), key=types.count)
        whole = {parameter for parameter in model.parameters() if not parameter.ndim or parameter.dtype != common}
        mesh = init_device_mesh(self.device, (self.ranks.count,))
        for module in (*_separate(model, blocks), model):
            module.register_forward_hook(_without_views)
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard, ignored_params=whole)
            if (entry := entry_of(module)) != "forward":
                register_fsdp_forward_method(module, entry)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        return ShardedAverage(shell, decay, model)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        super().reduce(parameter for parameter in parameters if not is_sharded(parameter))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        used = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [local(parameter.grad) for parameter in used]
        squares = torch.stack([gradient.norm().double().square() for gradient in gradients])
        sharded = torch.tensor([is_sharded(parameter) for parameter in used], device=squares.device)
        norm = (self.ranks.sum(squares[sharded].sum()) + squares[~sharded].sum()).sqrt().float()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _without_views(module: nn.Module, inputs: object, output: object) -> object:
    """A hook that copies an output that is a view: `fully_shard` would lose its own hook if the caller changed the view in place."""
    if isinstance(output, tuple):
        return tuple(_without_views(module, inputs, entry) for entry in output)
    return output.clone() if isinstance(output, Tensor) and output._base is not None else output


def _separate(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks that share no parameter with the rest of the model: a shared one belongs to the root."""
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    blocks = list(blocks)
    inside = {module: block for block in blocks for module in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(inside.get(module, model))
    shared = {block for places in owners.values() if len(places) > 1 for block in places}
    return [block for block in blocks if block not in shared]


def placement(sharding: Sharding, ranks: Ranks) -> Placement:
    """The placement of a recipe's `training.sharding`. One process holds everything."""
    if not isinstance(ranks, ProcessGroup) or sharding == "none":
        return Placement(ranks)
    return ShardedOptimizer(ranks) if sharding == "zero1" else FullySharded(ranks, reshard=sharding == "zero3")


def rows_each(model: nn.Module, batch_size: int, ranks: Ranks, norm_group: int | None = None) -> int:
    """Rows of a batch in each process. Raises `RecipeError` for a batch that cannot be divided without changing the norms' statistics."""
    if ranks.count == 1:
        return batch_size
    rows, rest = divmod(batch_size, ranks.count)
    unit = inseparable_rows(model.train(), batch_size, norm_group)
    if not rest and rows % unit == 0:
        return rows
    if unit == batch_size:
        raise RecipeError(
            f"training.batch_size {batch_size} on {ranks.count} processes: the model's batch norms take the whole batch: set "
            "training.norm_group, or train in one process"
        )
    norms = f", {unit} for its norms in each" if unit > 1 else ""
    raise RecipeError(
        f"training.batch_size {batch_size} cannot be divided by {ranks.count} processes{norms}: give a multiple of {unit * ranks.count}"
    )
