"""One model in training: what a step does to it, and the state that a checkpoint has to hold.

    images -> autocast forward -> loss (labels, and a teacher's answer where there is one) -> backward -> clip -> step -> averaged weights

The loop of `muntin fit` and every stage of `muntin compress` train with this and nothing else.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from muntin.errors import CheckpointError, DependencyError, MuntinError, RecipeError
from muntin.training.average import WeightAverage
from muntin.training.checkpoint import AVERAGE, MODEL, OPTIMIZER, Checkpoint, load_optimizer, load_weights, optimizer_tensors
from muntin.training.closing import GateClosing
from muntin.training.config import TrainingConfig
from muntin.training.layout import channels_last
from muntin.training.loss import distillation_loss, task_loss
from muntin.training.optimizer import make_optimizer
from muntin.training.precision import Precision
from muntin.training.schedule import learning_rate

LEFT_OUT = 20
"""Steps in a row that FP16's loss scale leaves out for a gradient that is not finite. Each halves the scale, from 65536: after so many it
is not the scale that is at fault."""


class DivergedError(MuntinError):
    """Training has left the numbers; what to do is for who chose how it trains."""


class Trainer:
    """A model, its averaged copy and its optimiser. `teacher`: a model whose answers are learned too, weighted by `distillation`; with a
    weight of 0 it is not asked."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        task: str,
        precision: Precision,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
    ) -> None:
        self.config, self.task, self.precision, self.distillation = config, task, precision, distillation
        self.model = channels_last(model.to(precision.device))
        self.teacher = None if teacher is None or not distillation else teacher.to(precision.device).eval().requires_grad_(False)
        self.average = WeightAverage(self.model, config.average)
        self.optimizer = make_optimizer(self.model, config, precision.dtype or torch.float32)
        self.scaler = precision.scaler()
        self.left_out = 0
        self.closing: GateClosing | None = None
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if config.compile else self.model

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state that a checkpoint of the same model holds."""
        tensors = checkpoint.tensors
        load_weights(self.model, tensors[MODEL], checkpoint.path / MODEL)
        load_weights(self.average.model, tensors[AVERAGE], checkpoint.path / AVERAGE)
        load_optimizer(self.model, self.optimizer, self.scaler, tensors[OPTIMIZER])
        if not self.optimizer.suits():
            raise CheckpointError(f"{checkpoint.path}: an earlier version wrote it, which trained with another optimiser: train anew")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The state that a checkpoint holds, by file."""
        return {
            MODEL: dict(self.model.state_dict()),
            AVERAGE: dict(self.average.model.state_dict()),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer, self.scaler),
        }

    def update(self, step: int, images: Tensor, target: Tensor, *, done: float) -> float:
        """One optimiser step; `done`: share of the run that is behind. Raises `DivergedError` when the loss or its gradient is no longer
        finite; weights are then as they were."""
        if not self.config.compile:
            return self._update(step, images, target, done)
        from torch._dynamo.exc import TorchDynamoException  # takes seconds, and what compiles has loaded it

        try:
            return self._update(step, images, target, done)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise DependencyError(
                f"training.compile: PyTorch {torch.__version__} cannot compile this model in {self.precision.name} ({reason}): "
                "set compile: false, or another precision"
            ) from error

    def _update(self, step: int, images: Tensor, target: Tensor, done: float) -> float:
        rate = learning_rate(done, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        images = images.to(self.precision.device, torch.float32, memory_format=torch.channels_last)
        if self.config.gate_budget < 1 and self.closing is None:  # before a step moves what was closed when a run is gone on with
            self._begin_closing(images[:1])
        target = target.to(self.precision.device)
        scores = self._scores(images)
        loss = task_loss(self.task, scores, target, overlap=self.config.overlap_loss)
        if self.teacher is not None:
            with torch.no_grad(), self.precision.autocast():
                wanted = self.teacher(images)
            loss = loss + self.distillation * distillation_loss(self.task, scores, wanted, target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value} at step {step + 1}")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.left_out = 0 if length.isfinite() else self.left_out + 1
        if self.left_out > (LEFT_OUT if self.scaler.is_enabled() else 0):
            self.optimizer.zero_grad()
            row = f", as in the {LEFT_OUT} steps before, which were left out" if self.scaler.is_enabled() else ""
            raise DivergedError(f"the gradient is {float(length)} at step {step + 1}, and the loss {value:g}{row}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.update(self.model, step)
        if self.closing is not None:
            self.closing.update(done, self.optimizer)
        return value

    def _begin_closing(self, image: Tensor) -> None:
        self.closing = GateClosing(self.model, self.average.model, image, keep=self.config.gate_budget)

    def close_gates(self, image: Tensor) -> bool:
        """Closes what `gate_budget` takes and the run's end has come before; whether that was anything. `image`: `(1, C, H, W)`, a crop."""
        if self.closing is None:
            self._begin_closing(image.to(self.precision.device, torch.float32, memory_format=torch.channels_last))
        assert self.closing is not None
        return self.closing.update(1.0, self.optimizer)

    def _scores(self, images: Tensor) -> Tensor:
        try:
            with self.precision.autocast():
                return self.forward(images)
        except ValueError as error:
            if len(images) > 1:  # one picture is what a foreign model's batch norm may refuse
                raise
            raise RecipeError(
                f"training.batch_size 1 with data.crop {images.shape[2]}: {' '.join(str(error).split())}; raise either of them"
            ) from error
