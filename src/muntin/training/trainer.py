"""One model in training: a training step, the averaged weights, and the state that a checkpoint holds.

    images -> autocast forward -> loss (labels, and a teacher's answer if there is one) -> backward -> clip -> step -> averaged weights

`muntin fit` and every stage of `muntin compress` use it.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from muntin.errors import DependencyError, MuntinError
from muntin.training.checkpoint import AVERAGE, MODEL, OPTIMIZER, Checkpoint
from muntin.training.config import TrainingConfig
from muntin.training.gate_pruning import GateClosing
from muntin.training.loss import distillation_loss, task_loss
from muntin.training.memory_format import channels_last
from muntin.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from muntin.training.precision import TrainingPrecision
from muntin.training.weights import load_weights

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
    """A model, its averaged copy and its optimiser. `teacher`: a model whose answers enter the loss with the weight `distillation`."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        task: str,
        precision: TrainingPrecision,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
    ) -> None:
        self.config, self.task, self.precision, self.distillation = config, task, precision, distillation
        self.model = model.to(precision.device)
        channels_last(self.model)
        self.teacher = None if teacher is None or not distillation else teacher.to(precision.device).eval().requires_grad_(False)
        self.average = WeightAverage(self.model, config.average)
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
        images = images.to(self.precision.device, torch.float32, memory_format=torch.channels_last)
        if self.config.gate_budget < 1:  # before a step of a resumed run moves closed gates
            self.closing = self._gate_closing(images[:1])
        target = target.to(self.precision.device)
        with self.precision.autocast():
            scores = self.forward(images)
        loss = task_loss(self.task, scores, target, overlap=self.config.overlap_loss)
        if self.teacher is not None:
            with torch.no_grad(), self.precision.autocast():
                teacher_scores = self.teacher(images)
            loss = loss + self.distillation * distillation_loss(self.task, scores, teacher_scores, target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} at step {step + 1}")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
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

    def _gate_closing(self, image: Tensor) -> GateClosing:
        return self.closing or GateClosing(self.model, self.average.model, image, keep=self.config.gate_budget)

    def close_gates(self, image: Tensor) -> bool:
        """Close gates down to the final budget. Returns True if any gate was closed. `image`: `(1, C, H, W)`."""
        self.closing = self._gate_closing(image.to(self.precision.device, torch.float32, memory_format=torch.channels_last))
        return self.closing.update(1.0, self.optimizer)
