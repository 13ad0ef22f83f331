"""One model in training: a training step, the averaged weights, and the state that a checkpoint holds.

    images -> gradient of the batch, in parts that fit into memory -> clip -> step -> averaged weights

`muntin fit` and every stage of `muntin compress` use it.

Axes: B images, C channels, H W map, S sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from muntin.errors import DependencyError, MuntinError
from muntin.runtime.host.memory import no_memory
from muntin.training.checkpoint import AVERAGE, MODEL, OPTIMIZER, Checkpoint
from muntin.training.config import ActivationBudget, TrainingConfig
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.gate_pruning import GateClosing
from muntin.training.gradients import BatchGradient, buffers_kept, restore_buffers
from muntin.training.loss import Loss
from muntin.training.memory.budget import BlockCost, block_costs, keep_to_budget
from muntin.training.memory.checkpointing import ActivationCheckpointing
from muntin.training.memory.memory_format import channels_last
from muntin.training.memory.norm_groups import group_norms
from muntin.training.memory.peak import watch_peak
from muntin.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from muntin.training.precision import TrainingPrecision
from muntin.training.recovery.out_of_memory import LEVELS, MemoryUse, memory_use
from muntin.training.weights import load_weights

T = TypeVar("T")
_NO_PRIMITIVE = "could not create a primitive"
"""oneDNN's message where an allocation fails, and where it lacks a kernel: taken for the former under a bound on memory."""
SKIPPED_STEPS = 20
"""Consecutive steps that FP16's loss scaler may skip for a gradient that is not finite. Each halves the scale, from 65536."""
STATISTICS = ("running_mean", "running_var")
"""Buffers that are averaged. Other buffers (masks, counters, vectors of a spectral norm) are copied."""


class DivergedError(MuntinError):
    """The loss or its gradient is no longer finite."""


class WeightAverage:
    """An exponential moving average of a model's parameters and of the statistics of its norms; other buffers are copied.

    The decay warms up as (1 + step) / (10 + step), so that the first steps count little. Source: Polyak & Juditsky (1992); the warm-up is
    that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the model after `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step)) if self.decay else 1.0
        pairs = [(average, new.detach()) for average, new in zip(self.model.parameters(), model.parameters(), strict=True)]
        averaged = [(average, new) for average, new in pairs if average.is_floating_point() or average.is_complex()]
        if averaged:
            torch._foreach_lerp_([average for average, _ in averaged], [new for _, new in averaged], share)
        for average, new in pairs:
            if not (average.is_floating_point() or average.is_complex()):  # indices have no mean
                average.copy_(new)
        buffers = dict(self.model.named_buffers())
        for name, new in model.named_buffers():
            owner, _, last = name.rpartition(".")
            if name not in buffers or buffers[name].shape != new.shape or buffers[name].is_inference():  # created or resized during a call
                temporary = last in model.get_submodule(owner)._non_persistent_buffers_set
                self.model.get_submodule(owner).register_buffer(last, new.clone(), persistent=not temporary)
            elif last in STATISTICS:
                buffers[name].lerp_(new, share)
            else:
                buffers[name].copy_(new)


class Trainer:
    """A model, its averaged copy and its optimiser. `teacher`: a model whose answers enter the loss with the weight `distillation`.

    `seed`: of random numbers that the model draws. `ranks`: the processes that train it, of which each gets some rows of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        task: str,
        precision: TrainingPrecision,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.precision, self.seed, self.ranks = config, precision, seed, ranks
        self.model = model.to(precision.device)
        channels_last(self.model)
        self.teacher = None if teacher is None or not distillation else teacher.to(precision.device).eval().requires_grad_(False)
        self.loss = Loss(task=task, overlap=config.overlap_loss, distillation=0.0 if self.teacher is None else distillation)
        self.average = WeightAverage(self.model, config.average)
        self.checkpointing = ActivationCheckpointing(self.model)
        if config.norm_group is not None:
            group_norms(self.model, config.norm_group)
        self._recipe_memory = memory_use(self.model, config, config.batch_size // ranks.count)
        self.use_memory(self._recipe_memory)
        self._in_budget = False
        self.notes: list[str] = []
        """What recovery changed, in words, since the list was emptied."""
        self.optimizer = make_optimizer(self.model, config, precision.dtype or torch.float32)
        self.scaler = precision.scaler()
        self.skipped = 0
        self.closing: GateClosing | None = None
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a checkpoint of the same model."""
        tensors = checkpoint.tensors
        load_weights(self.model, tensors[MODEL], checkpoint.path / MODEL)
        load_weights(self.average.model, tensors[AVERAGE], checkpoint.path / AVERAGE)
        load_optimizer(self.model, self.optimizer, self.scaler, tensors[OPTIMIZER])
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
        """The state for a checkpoint, by file."""
        return {
            MODEL: dict(self.model.state_dict()),
            AVERAGE: dict(self.average.model.state_dict()),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer, self.scaler),
        }

    def update(self, step: int, images: Tensor, target: Tensor, *, done: float) -> float:
        """Take one optimiser step and return the loss. `done`: share of the run that is done.

        Raises `DivergedError` if the loss or its gradient is not finite; the weights are then unchanged.
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
        value = self._gradient(step, images, target)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped > (SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            self.optimizer.zero_grad()
            before = f", as in the {SKIPPED_STEPS} steps before, which were skipped" if self.scaler.is_enabled() else ""
            raise DivergedError(f"the gradient is {float(norm)} at step {step + 1}, and the loss {value:g}{before}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update(self.model, step)
        if self.closing is not None:
            self.closing.update(done, self.optimizer)
        return value

    def _gradient(self, step: int, images: Tensor, target: Tensor) -> float:
        """Put the batch's gradient into the parameters, in smaller parts after a lack of memory. Returns the loss."""
        if self.memory.checkpointing == "budget" and not self._in_budget:
            self._keep_to_budget(step, images, target)
        while True:
            kept = {name: (buffer, buffer.clone()) for name, buffer in self.model.named_buffers()}
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
            value = float(self.loss.value(sums_S, totals))
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} at step {step + 1}")
        gradient_S = self.loss.gradient(totals.new_zeros(2) if sums_S is None else sums_S, totals)
        done, own_S = self._attempt(lambda: batch.backward(self.scaler.scale(gradient_S)))
        if not done or own_S is None:
            return None
        if sums_S is None:
            value = float(self.loss.value(self.ranks.sum(own_S), totals))
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                raise DivergedError(f"the loss is {value} at step {step + 1}")
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

    @property
    def shrunk(self) -> MemoryUse | None:
        """How a step uses memory, if less than the recipe allows."""
        return None if self.memory == self._recipe_memory else self.memory

    def use_memory(self, use: MemoryUse) -> None:
        """Change how a step uses memory. Checkpointing by a budget is applied at the next step."""
        self.memory = use
        self.loss = replace(self.loss, chunked=use.checkpointing != "none")
        if use.checkpointing != "budget":
            self.checkpointing.apply_all(use.checkpointing)

    def gradient_peak(self, step: int, images: Tensor, target: Tensor) -> int | None:
        """Compute a batch's gradient and drop it. Returns the peak of memory beyond what was held before, bytes, the largest of all
        processes; None if memory was short.

        Raises `DependencyError` if this system does not tell it.
        """
        self.model.train()
        with buffers_kept(self.model), watch_peak(self.precision.device) as watch:
            value = self._gradient_once(step, images, target)
        self.optimizer.zero_grad()
        if value is None:
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
            self.checkpointing.apply(dict.fromkeys(blocks, "full"), chunked=chunked)
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
