"""One model in training: a training step, the averaged weights, and the state that a checkpoint holds.

    images -> gradient of the batch, in parts that fit into memory -> clip -> step -> averaged weights

`muntin fit` and every stage of `muntin compress` use it.

Axes: B images, C channels, H W map, S sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from muntin.artifact.answers import Task
from muntin.errors import DependencyError, MuntinError, RecipeError
from muntin.runtime.host.memory import no_memory
from muntin.training.checkpoint import Checkpoint
from muntin.training.config import ActivationBudget, TrainingConfig
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.distributed.sharding import placement, rows_each
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.gate_pruning import GateClosing
from muntin.training.gradients import BatchGradient, buffers_kept, kept_buffers, restore_buffers
from muntin.training.loss import Loss, loss_of
from muntin.training.memory.budget import BlockCost, block_costs, keep_to_budget
from muntin.training.memory.checkpointing import OPERATOR_MEMORY, ActivationCheckpointing
from muntin.training.memory.norm_groups import group_norms
from muntin.training.memory.peak import watch_peak
from muntin.training.optimizer import averaged_weights, load_optimizer, make_optimizer, optimizer_tensors, read_optimizer
from muntin.training.precision import TrainingPrecision
from muntin.training.recovery.instability import LossGuard
from muntin.training.recovery.out_of_memory import LEVELS, MemoryShortError, MemoryUse, memory_use
from muntin.training.weights import load_weights

T = TypeVar("T")
_NO_PRIMITIVE = "could not create a primitive"
"""oneDNN's message where an allocation fails, and where it lacks a kernel: taken for the former under a bound on memory."""
SKIPPED_STEPS = 20
"""Consecutive steps that FP16's loss scaler may skip for a gradient that is not finite. Each halves the scale, from 65536."""


class DivergedError(MuntinError):
    """The loss or its gradient is not finite, or far above its usual value. The weights are as before the step."""


class Trainer:
    """A model, its averaged copy and its optimiser. `teacher`: a model whose answers enter the loss with the weight `distillation`.

    `loss`: replaces the usual one, which `config`, `class_weights` (`loss.class_weights`) and `distillation` describe. `seed`: of random
    numbers that the model draws. `ranks`: the processes that train it, of which each gets some rows of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        task: Task,
        precision: TrainingPrecision,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
        loss: Loss | None = None,
        class_weights: tuple[float, ...] = (),
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.precision, self.seed, self.ranks = config, precision, seed, ranks
        self.model = model.to(precision.device)
        self.placement = placement(config.sharding, ranks)
        if config.optimizer == "schedule-free" and ranks.count > 1 and config.sharding == "zero1":
            raise RecipeError("training.sharding zero1 with optimizer schedule-free, whose averages need its whole state: take zero2")
        if self.placement.communicates and precision.dtype is torch.float16:
            raise RecipeError(f"training.sharding {config.sharding} in fp16: take sharding zero1, or precision bf16 or fp32")
        self.teacher = None if teacher is None or not distillation else teacher.to(precision.device).eval().requires_grad_(False)
        usual = loss_of(config, task=task, weights=class_weights, distillation=0.0 if self.teacher is None else distillation)
        self.loss = usual if loss is None else loss
        self.rows = rows_each(self.model, config.batch_size, ranks, config.norm_group)
        self.checkpointing = ActivationCheckpointing(self.model)
        decay = 0.0 if config.optimizer == "schedule-free" else config.average
        self.average = self.placement.place(self.model, self.checkpointing.blocks.values(), decay)
        if config.norm_group is not None:
            group_norms(self.model, config.norm_group)
        self._recipe_memory = memory_use(self.model, config, self.rows)
        self.use_memory(self._recipe_memory)
        self._in_budget = False
        self.guard = LossGuard(config.spike)
        self.notes: list[str] = []
        """Changes by recovery, in words, since the list was emptied."""
        if ranks.count == 1 and config.sharding != "none":
            self.notes.append(f"training.sharding {config.sharding}: one process holds everything; torchrun starts several")
        self.optimizer = make_optimizer(self.model, config, precision.dtype, self.placement.exchange)
        self.placement.prepare(self.optimizer)
        self.scaler = precision.scaler()
        self.skipped = 0
        self.closing: GateClosing | None = None
        # crops are of one size; symbolic sizes make torch 2.13's compiler fail (pytorch#188226)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model, dynamic=False) if config.compile else self.model

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint of the same model."""
        tensors = checkpoint.tensors
        if self.ranks.count > 1:
            tensors.read_into(MODEL, dict(self.model.state_dict()))
            tensors.read_into(AVERAGE, self.average.tensors())
            read_optimizer(self.model, self.optimizer, self.scaler, tensors, self.placement.owns)
        else:
            load_weights(self.model, tensors[MODEL], checkpoint.path / MODEL)
            load_weights(self.average.model, tensors[AVERAGE], checkpoint.path / AVERAGE)
            load_optimizer(self.model, self.optimizer, self.scaler, tensors[OPTIMIZER])
        self.guard = LossGuard(self.config.spike, checkpoint.state.guard)
        self.remember(checkpoint.state.memory)

    def remember(self, use: MemoryUse | None) -> None:
        """Begin with what an earlier part of the run had to shrink to, if it is less than the recipe's."""
        if use is not None and use.micro_batch % self.memory.unit == 0:
            micro_batch = min(use.micro_batch, self.memory.micro_batch)
            level = max(use.checkpointing, self.memory.checkpointing, key=LEVELS.index)
            if level == "budget":  # the recipe's alone: a budget that was taken out of it is not known any more
                level = self.memory.checkpointing
            self.use_memory(self.memory.model_copy(update={"micro_batch": micro_batch, "checkpointing": level}))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state for a checkpoint, by file, or this process's part of it."""
        self.placement.settle(self.model, self.average.model)
        return {
            MODEL: dict(self.model.state_dict()),
            AVERAGE: self.average.tensors(),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer, self.scaler),
        }

    def update(self, step: int, images: Tensor, target: Tensor, *, done: float) -> float:
        """Take one optimiser step and return the loss. `done`: share of the run that is done.

        Raises `DivergedError` if the loss or its gradient is not finite, or a spike; the model is then unchanged.
        """
        if not self.config.compile:
            return self._update(step, images, target, done)
        from torch._dynamo.exc import TorchDynamoException  # importing it takes seconds

        try:
            return self._update(step, images, target, done)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise DependencyError(
                f"training.compile: PyTorch {torch.__version__} cannot compile this model in {self.precision.name} ({reason}): "
                "set compile: false, or another precision"
            ) from error

    def _update(self, step: int, images: Tensor, target: Tensor, done: float) -> float:
        rate = self.config.rate_at(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        if self.config.gate_budget < 1:  # before a step of a resumed run moves closed gates
            self.closing = self._gate_closing(self._pixels(images[:1]))
        kept = kept_buffers(self.model)
        try:
            value = self._gradient(step, images, target, kept)
        except DivergedError:
            restore_buffers(self.model, kept)
            self.optimizer.zero_grad()
            raise
        self.placement.reduce(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        norm = self.placement.clip(self.model.parameters(), self.config.clip)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped > (SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            self.optimizer.zero_grad()
            restore_buffers(self.model, kept)
            before = f", as in the {SKIPPED_STEPS} steps before, which were skipped" if self.scaler.is_enabled() else ""
            raise DivergedError(f"the gradient is {float(norm)} at step {step + 1}, and the loss {value:g}{before}")
        self.placement.step(self.optimizer, self.scaler)
        self.scaler.update()
        self.optimizer.zero_grad()
        with averaged_weights(self.optimizer):
            self.average.update(self.model, step)
        if self.closing is not None:
            self.closing.update(done, self.optimizer)
        self.guard.accept(value)
        return value

    def _gradient(self, step: int, images: Tensor, target: Tensor, kept: dict[str, tuple[Tensor, Tensor]]) -> float:
        """Put the batch's gradient into the parameters, in smaller parts after a lack of memory. Returns the loss."""
        if self.memory.checkpointing == "budget" and not self._in_budget:
            self._keep_to_budget(step, images, target)
        while True:
            value = self._gradient_once(step, images, target)
            if value is not None:
                return value
            restore_buffers(self.model, kept)
            self.optimizer.zero_grad()
            self._shrink(f"out of memory at step {step + 1}")

    def _gradient_once(self, step: int, images: Tensor, target: Tensor) -> float | None:
        """The same, or None if memory was short in any process; gradients and buffers are then of no use."""
        batch = BatchGradient(
            self.model, self.forward, self.loss, self.precision, self.teacher,
            images=images, target=target, part=self.memory.micro_batch, seed=(self.seed, step), first_row=self.ranks.index * len(images),
        )  # fmt: skip
        done, sums_S = self._attempt(batch.forward)
        if not done:
            return None
        totals = self.ranks.sum(batch.totals(sums_S))
        if sums_S is not None:
            sums_S = self.ranks.sum(sums_S)
            value = self._judged(self.loss.value(sums_S, totals), step)
        gradient_S = self.loss.gradient(totals.new_zeros(2) if sums_S is None else sums_S, totals)
        done, own_S = self._attempt(lambda: batch.backward(self.scaler.scale(gradient_S)))
        if not done or own_S is None:
            return None
        if sums_S is None:
            value = self._judged(self.loss.value(self.ranks.sum(own_S), totals), step)
        return value

    def _judged(self, loss: Tensor, step: int) -> float:
        """The loss of the whole batch as a number. Raises `DivergedError` for one out of range."""
        value = float(loss)
        if fault := self.guard.fault(value):
            raise DivergedError(f"{fault} at step {step + 1}")
        return value

    def _attempt(self, work: Callable[[], T]) -> tuple[bool, T | None]:
        """Do some work. Returns (False, None) if memory was short in any process."""
        short, result = False, None
        try:
            result = work()
        except Exception as error:
            if not no_memory(error) and not (self.config.memory is not None and _NO_PRIMITIVE in str(error)):
                raise
            short = True  # the error holds the frames of the failed work: it is dropped before the next attempt
        if short and self.placement.communicates:
            self._end_smaller()
        short = self.ranks.any(short)
        return not short, None if short else result

    def after_kill(self, use: MemoryUse) -> None:
        """Use less memory than an earlier attempt, which the kernel killed."""
        self.remember(use)
        self._shrink("an earlier attempt was killed for lack of memory")

    def _shrink(self, event: str) -> None:
        """Use less memory from now on. Raises `MuntinError` if no less is possible."""
        smaller = self.memory.smaller()
        if smaller is None or (self.config.compile and smaller.checkpointing != "none"):  # see `TrainingConfig`
            raise MuntinError(
                f"{event} with {self.memory.text}: no smaller step leaves the mathematics as they are; take a smaller data.crop or model, "
                "or free memory"
            )
        if self.precision.device == "cuda":
            torch.cuda.empty_cache()
        self.notes.append(f"{event} with {self.memory.text}: goes on with {smaller.text}")
        self.use_memory(smaller)

    def _end_smaller(self) -> None:
        """End this process, whose error the others cannot learn: they wait for it inside the model."""
        smaller = self.memory.smaller()
        if smaller is None:
            raise MuntinError(f"out of memory with {self.memory.text}: take a smaller data.crop or model, or more processes")
        raise MemoryShortError(
            f"out of memory with {self.memory.text}: sharded processes cannot try again; started again, with --resume or by "
            f"`torchrun --max-restarts`, they go on with {smaller.text}",
            smaller,
        )

    @property
    def shrunk(self) -> MemoryUse | None:
        """How a step uses memory, if less than the recipe allows."""
        return None if self.memory == self._recipe_memory else self.memory

    def use_memory(self, use: MemoryUse) -> None:
        """Change how a step uses memory. Checkpointing by a budget is applied at the next step."""
        self.memory = use
        memory = self.config.operator_memory
        self.loss = replace(self.loss, memory=memory if use.checkpointing == "none" else memory or OPERATOR_MEMORY)
        if use.checkpointing != "budget":
            self.checkpointing.apply_all(use.checkpointing, memory or (OPERATOR_MEMORY if use.checkpointing == "full" else None))

    def drop_gradient(self, step: int, images: Tensor, target: Tensor) -> bool:
        """Compute a batch's gradient and drop it; buffers stay as they are. Returns False if memory was short."""
        self.model.train()
        with buffers_kept(self.model):
            value = self._gradient_once(step, images, target)
        self.optimizer.zero_grad()
        return value is not None

    def gradient_peak(self, step: int, images: Tensor, target: Tensor) -> int | None:
        """Compute a batch's gradient and drop it. Returns the peak of memory beyond what was held before, bytes, the largest of all
        processes; None if memory was short.

        Raises `DependencyError` if this system does not tell it.
        """
        with watch_peak(self.precision.device) as watch:
            done = self.drop_gradient(step, images, target)
        if not done:
            return None
        if watch.peak is None:
            raise DependencyError("this system does not tell a process's peak of memory (Linux and CUDA do), which a memory budget needs")
        peaks = torch.zeros(self.ranks.count, dtype=torch.float64, device=self.precision.device)
        peaks[self.ranks.index] = watch.peak
        return int(self.ranks.sum(peaks).max())

    def _keep_to_budget(self, step: int, images: Tensor, target: Tensor) -> None:
        """Choose the blocks to recompute by measurements on this batch."""
        assert isinstance(self.config.checkpointing, ActivationBudget)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

        def costs_of(use: MemoryUse) -> dict[str, BlockCost]:
            part = self._pixels(images[: use.micro_batch]).to(dtype)
            with buffers_kept(self.model), self.precision.autocast():
                costs = block_costs(self.checkpointing, self.model, lambda: self.model(part))
            own = torch.tensor([[cost.kept, cost.seconds] for cost in costs.values()], dtype=torch.float64, device=self.precision.device)
            rows = self.ranks.sum(own).tolist() if costs else []  # all processes choose the same blocks
            return {name: BlockCost(kept=int(kept), seconds=seconds) for name, (kept, seconds) in zip(costs, rows, strict=True)}

        def peak_of(use: MemoryUse, blocks: tuple[str, ...], chunked: bool) -> int | None:
            self.memory = use
            memory = self.config.operator_memory or (OPERATOR_MEMORY if chunked else None)
            self.checkpointing.apply(dict.fromkeys(blocks, "full"), memory)
            return self.gradient_peak(step, images, target)

        self.memory, note = keep_to_budget(self.config.checkpointing.budget, self.memory, costs_of, peak_of)
        self._in_budget = True
        self.notes.append(note)

    def _pixels(self, images: Tensor) -> Tensor:
        return images.to(self.precision.device, torch.float32, memory_format=torch.channels_last)

    def _gate_closing(self, image: Tensor) -> GateClosing:
        return self.closing or GateClosing(self.model, self.average.model, image, keep=self.config.gate_budget)

    def close_gates(self, image: Tensor) -> bool:
        """Close gates down to the final budget. Returns True if any gate was closed. `image`: `(1, C, H, W)`."""
        self.closing = self._gate_closing(self._pixels(image))
        return self.closing.update(1.0, self.optimizer)
