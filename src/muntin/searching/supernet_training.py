"""Training of a supernet: in each step the largest network learns from the labels, and others of similar size from it and the labels.

    batch(step), networks(step) -> largest: loss -> scores that teach -> networks: loss and distance to the teacher -> one optimiser step

Networks are drawn in rounds of `ROUND` steps: sorted by multiply-adds, so that those of a step and of neighbouring steps have similar
sizes, ascending in one round and descending in the next. Sources: the sandwich rule with distillation in place (Yu et al., 2003.11142,
section 3), neighbouring steps of similar sizes (ElasticViT, Tang et al., 2303.09730, section 3.2). Deviation: no smallest network, which
the sampling reaches in each round.

Batches and networks depend on the seed, the step and the number of batches that were left out, so that a resumed run ends in the same bits,
except with `minutes`. A batch whose loss or gradient is not sound is left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.data import Crops
from muntin.data.batch_feed import prefetch, worker_count
from muntin.data.source import Source
from muntin.errors import MuntinError
from muntin.models import ModelConfig
from muntin.searching.cost import layer_macs
from muntin.searching.space import Architecture, Space, UnbuildableError
from muntin.searching.supernet import Supernet
from muntin.training.checkpoint import Checkpoint, checkpoints_in, newest_sound, write_checkpoint
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.gradients import buffers_kept, kept_buffers, random_kept, restore_buffers
from muntin.training.loss import class_weights, loss_of
from muntin.training.model_checks import random_batch
from muntin.training.optimizer import averaged_weights, load_optimizer, make_optimizer, optimizer_tensors
from muntin.training.precision import TrainingPrecision, choose_by_speed
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe
from muntin.training.recovery.instability import SKIPPED_IN_A_ROW, LossGuard
from muntin.training.weights import load_weights

SAMPLED = 2
"""Networks of a step beside the largest one."""
ROUND = 32
"""Steps in which the sizes of the networks rise, or fall, once."""
DISTILLATION = 1.0
"""Weight of the distance to the largest network's scores."""
FIRST_CHECKPOINT_S = 30.0
"""Seconds after which the first checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class SupernetResult:
    """A supernet with averaged weights. `finished`: False after an interruption. `seconds`: of training, all parts together."""

    supernet: Supernet
    finished: bool
    step: int
    seconds: float
    notes: tuple[str, ...]


def draw_round(space: Space, base: ModelConfig, seed: int, round_: int) -> tuple[Architecture, ...]:
    """The networks of `ROUND` steps beside the largest one, by multiply-adds: rising in even rounds, falling in odd ones."""
    generator = random.Random(f"{seed}:{round_}")  # noqa: S311 - no secret
    drawn: list[Architecture] = []
    attempts = 0
    while len(drawn) < ROUND * SAMPLED:
        attempts += 1
        try:
            drawn.append(space.architecture(space.sample(generator), base))
        except UnbuildableError:
            if attempts > 1000 * ROUND * SAMPLED:
                raise
    drawn.sort(key=lambda one: layer_macs(one.config, one.resolution), reverse=bool(round_ % 2))
    return tuple(drawn)


class SupernetTraining:
    """Trains a supernet by the `training` section of a recipe, in `folder`, and continues from its newest checkpoint there."""

    def __init__(
        self, space: Space, base: ModelConfig, recipe: Recipe, source: Source, *, folder: Path, root: Path, precision: TrainingPrecision
    ) -> None:
        self.space, self.base, self.recipe, self.source, self.config = space, base, recipe, source, recipe.training
        self.folder, self.root = folder, root
        self.supernet = Supernet(space, base, seed=recipe.seed, norm_group=self.config.norm_group).to(precision.device)
        self.loss = loss_of(self.config, task=recipe.task, weights=class_weights(self.config, source), distillation=DISTILLATION)
        self.precision = precision = self._decided(precision)
        self.average = WeightAverage(self.supernet, 0.0 if self.config.optimizer == "schedule-free" else self.config.average)
        self.optimizer = make_optimizer(self.supernet, self.config, precision.dtype)
        self.scaler = precision.scaler()
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.guard = LossGuard(self.config.spike)
        self.notes = list(self.precision.notes)
        self._rounds = cache(lambda round_: draw_round(space, base, recipe.seed, round_))
        if checkpoints_in(folder / "checkpoints"):
            self._restore(newest_sound(folder / "checkpoints", note=self.notes.append))

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_weights(self.supernet, checkpoint.tensors[MODEL], checkpoint.path / MODEL)
        load_weights(self.average.model, checkpoint.tensors[AVERAGE], checkpoint.path / AVERAGE)
        load_optimizer(self.supernet, self.optimizer, self.scaler, checkpoint.tensors[OPTIMIZER])
        self.step, self.seconds, self.curve = checkpoint.state.step, checkpoint.state.seconds, list(checkpoint.state.training)
        self.guard = LossGuard(self.config.spike, checkpoint.state.guard)

    def _decided(self, precision: TrainingPrecision) -> TrainingPrecision:
        """Decide an undecided precision by steps of the largest network on random crops."""
        if not precision.undecided:
            return precision
        with random_kept(), buffers_kept(self.supernet):
            images, target = random_batch(self.recipe, len(self.source.classes), rows := self.config.batch_size)

            def step(each: TrainingPrecision, rows: int) -> None:
                with each.autocast():
                    scores = self.supernet.run(self.supernet.largest, images[:rows].float().to(memory_format=torch.channels_last))
                self.loss(scores, target[:rows]).backward()  # type: ignore[no-untyped-call]
                self.supernet.zero_grad()

            return choose_by_speed(precision, self.config, step, rows=rows, least=2)

    @property
    def finished(self) -> bool:
        """True if no steps, or no minutes, are left."""
        return self.config.share_done(self.step, self.seconds) >= 1

    def run(self, *, stopped: Callable[[], bool] = lambda: False, report: FitReport = lambda progress: None) -> SupernetResult:
        """Train to the last step, or until `stopped` returns True after a step; writes checkpoints on the way and at the end."""
        started, before, written = time.perf_counter(), self.seconds, self.step
        first_due = not checkpoints_in(self.folder / "checkpoints")
        with closing(self._batches()) as batches:
            while not self.finished and not stopped():
                images, target = next(batches)
                done = self.config.share_done(self.step + 0.5, self.seconds)
                if (loss := self._update(images, target, done)) is None:
                    continue
                self.step, self.seconds = self.step + 1, before + time.perf_counter() - started
                self.curve.append({"step": self.step, "seconds": self.seconds, "loss": loss})
                steps, share = self.config.steps_expected(self.step, self.seconds), self.config.share_in_time(self.step, self.seconds)
                report(FitProgress(kind="step", step=self.step, steps=steps, share=share, loss=loss))
                due = first_due and time.perf_counter() - started >= FIRST_CHECKPOINT_S
                if due or self.step % self.config.checkpoint_every == 0:
                    self._write()
                    first_due, written = False, self.step
        if written != self.step or first_due:
            self._write()
        supernet = self.average.model
        assert isinstance(supernet, Supernet)
        return SupernetResult(
            supernet=supernet, finished=self.finished, step=self.step, seconds=self.seconds, notes=tuple(self.notes)
        )  # fmt: skip

    def _batches(self) -> Generator[tuple[Tensor, Tensor]]:
        data, device = self.recipe.data, self.precision.device
        crops = Crops(
            self.source.split("train"), task=self.recipe.task, crop=data.crop, batch_size=self.config.batch_size, seed=self.recipe.seed,
            augmentation=data.augmentation, rare=data.rare, classes=len(self.source.classes),
        )  # fmt: skip
        workers, first = worker_count(data.workers, device=device), self.step + self.guard.state.skipped
        with closing(prefetch(crops.batch, first, first + (1 << 40), workers=workers, device=device)) as numbered:
            for _, batch in numbered:
                yield batch

    def _update(self, images: Tensor, target: Tensor, done: float) -> float | None:
        """Take one optimiser step; returns the loss of the largest network, None if the batch was left out."""
        kept = kept_buffers(self.supernet)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(done)
        self.supernet.train()
        images = images.to(self.precision.device, torch.float32, memory_format=torch.channels_last)
        target = target.to(self.precision.device)
        networks = sampled_from(self._rounds, self.step)
        share = 1 / (1 + len(networks))
        scores = self._scores(self.supernet.largest, images)
        largest = self.loss(scores, target)
        if fault := self.guard.fault(value := float(largest.detach())):
            self._leave_out(fault, kept)
            return None
        self.scaler.scale(share * largest).backward()  # type: ignore[no-untyped-call]
        taught = scores.detach()
        for one in networks:
            scores = self._scores(one.config, resized(images, one.resolution))
            self.scaler.scale(share * self.loss(scores, target, taught)).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), self.config.clip)
        if not (norm.isfinite() or self.scaler.is_enabled()):
            self._leave_out(f"the gradient is {float(norm)}", kept)
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with averaged_weights(self.optimizer):
            self.average.update(self.supernet, self.step)
        self.guard.accept(value)
        return value

    def _leave_out(self, fault: str, kept: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Leave a batch out, with a note. Raises `MuntinError` after several in a row."""
        self.optimizer.zero_grad()
        restore_buffers(self.supernet, kept)
        if not self.guard.skip():
            raise MuntinError(
                f"supernet: {fault} at step {self.step + 1}, after {SKIPPED_IN_A_ROW} other unsound batches: lower training.learning_rate "
                f"(now {self.config.learning_rate:g}) and search anew, with another --output"
            )
        self.notes.append(f"shared weights: {fault} at step {self.step + 1}: its batch is skipped")

    def _scores(self, config: ModelConfig, images: Tensor) -> Tensor:
        with self.precision.autocast():
            return self.supernet.run(config, images)

    def _write(self) -> None:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.precision.name, "seconds": self.seconds, "training": self.curve, "pending": [], "validation": [],
            "compression": None, "memory": None, "guard": self.guard.state,
        }  # fmt: skip
        tensors = {
            MODEL: dict(self.supernet.state_dict()), AVERAGE: self.average.tensors(),
            OPTIMIZER: optimizer_tensors(self.supernet, self.optimizer, self.scaler),
        }  # fmt: skip
        write_checkpoint(self.folder / "checkpoints", state, tensors)


def sampled_from(rounds: Callable[[int], tuple[Architecture, ...]], step: int) -> list[Architecture]:
    """The networks of a step, from a function that draws those of a round."""
    round_, position = divmod(step, ROUND)
    return list(rounds(round_)[position * SAMPLED : (position + 1) * SAMPLED])


def resized(images_BCHW: Tensor, resolution: float) -> Tensor:
    """Images with sides of `resolution` of theirs, by averaging."""
    if resolution == 1:
        return images_BCHW
    side = tuple(max(1, round(resolution * length)) for length in images_BCHW.shape[2:])
    return F.interpolate(images_BCHW, size=side, mode="bilinear", antialias=True).to(memory_format=torch.channels_last)
