"""The training loop: batches, steps, validations, checkpoints.

    batch(step) -> Trainer.update -> (validate, checkpoint); a bad batch: skip it, or go back to the last checkpoint

A batch depends only on the recipe's seed, the step, and the number of batches that were skipped before; a checkpoint holds all other state.
A resumed run therefore ends in the same bits as an uninterrupted one on the same machine, with the same number of threads and recipe.
Exceptions: with `training.minutes` the learning rate depends on the clock, and the sums of CUDA have no fixed order.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from muntin.data import BatchFeed, Crops, Source, calibration_batches
from muntin.data.batch_feed import ImageBatch
from muntin.data.batches import BatchMaker
from muntin.data.source import Samples
from muntin.errors import MuntinError
from muntin.layers.norm import GROUP
from muntin.models import CompressionRecord, TorchSession
from muntin.training.checkpoint import Checkpoint, UpdateRecord, checkpoints_in, newest_sound, recipe_changes
from muntin.training.distributed.checkpoint_writer import CheckpointWriter
from muntin.training.evaluation import collapse, evaluate, tile_of
from muntin.training.memory.memory_format import keep_freed_memory
from muntin.training.norm_recalibration import MAX_IMAGES, renew_statistics
from muntin.training.progress.advice import after_collapse, lower_rate, where_best
from muntin.training.progress.best import BestWeights, out_of_patience
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.metrics_log import MetricsLog, NoLog
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe
from muntin.training.recovery.attempt import Attempt
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.recovery.out_of_memory import MemoryShortError, remember_use, remembered_use
from muntin.training.teachers.unlabelled import add_unlabelled, plain_crops
from muntin.training.trainer import DivergedError, Trainer

LOG_EVERY = 10
"""Steps between two points of the training curve."""
FIRST_CHECKPOINT_S = 30.0
"""Seconds of training after which a run that has no checkpoint writes its first one; the others follow `checkpoint_every`."""


def training_crops(
    recipe: Recipe, source: Source, samples: Samples | None = None, *, batch_size: int | None = None, seed: int | None = None
) -> Crops:
    """The maker of a recipe's training batches. `samples`, `batch_size`, `seed`: in place of the training split's, the recipe's ones."""
    return Crops(
        source.split("train") if samples is None else samples, task=recipe.task, crop=recipe.data.crop,
        batch_size=batch_size or recipe.training.batch_size, seed=recipe.seed if seed is None else seed,
        augmentation=recipe.data.augmentation, rare=recipe.data.rare, classes=len(source.classes),
    )  # fmt: skip


class Training:
    """Runs a trainer to the last step: batches, curve, validation, checkpoints.

    `start`: the checkpoint of the same model to continue from. `seed`: of the crops. `compression`, `update`: for every checkpoint.
    """

    update: UpdateRecord | None = None
    keeps_best = True
    """True if the result has the averaged weights of the best validation; False: of the last step."""
    maker: BatchMaker

    def __init__(
        self,
        trainer: Trainer,
        recipe: Recipe,
        source: Source,
        *,
        directory: Path,
        root: Path,
        start: Checkpoint | None,
        report: FitReport,
        seed: int | None = None,
        compression: CompressionRecord | None = None,
    ) -> None:
        self.trainer, self.recipe, self.source, self.config = trainer, recipe, source, trainer.config
        self.ranks = trainer.ranks
        self.directory, self.root, self.start, self.report = directory, root, start, report
        self.seed = recipe.seed if seed is None else seed
        self.compression = compression
        self.feed = BatchFeed(recipe.data.workers, device=trainer.precision.device)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.validation: list[dict[str, Any]] = []
        self.notes: list[str] = []
        """Problems that did not end the run."""
        self.collapsed = False
        """True after a note on a collapse of the score."""
        self.best = BestWeights(trainer.average, kept=self.keeps_best and compression is None and self.config.gate_budget == 1)
        if start is not None:
            self._restore(start)
            self.seconds = start.state.seconds
        trainer.remember(remembered_use(directory))
        self.writer = CheckpointWriter(directory / "checkpoints", self.ranks)
        self.session = TorchSession(trainer.average.model, recipe.signature(source.classes), dtype=trainer.precision.dtype)

    @property
    def finished(self) -> bool:
        """True if no steps, no minutes or no patience of the run is left."""
        return self.config.share_done(self.step, self.seconds) >= 1 or out_of_patience(self.config.patience, self.validation)

    @property
    def result(self) -> dict[str, Any] | None:
        """The validation of the averaged weights, or the last one; None if there is none."""
        return self.best.result(self.validation)

    @property
    def steps(self) -> int:
        """Steps of the whole run, as estimated now."""
        return self.config.steps_expected(self.step, self.seconds)

    @property
    def _share(self) -> float | None:
        return self.config.share_in_time(self.step, self.seconds)

    @property
    def _validation_missing(self) -> bool:
        """True if the step that the run continues from should have been validated and was not, because of an error."""
        due = self.start is not None and self.step > 0 and (self.finished or self.step % self.config.validate_every == 0)
        return due and (not self.validation or self.validation[-1]["step"] != self.step)

    def run(self, interruption: Interruption) -> Path:
        """Train to the last step, or until an interruption. Returns the newest checkpoint."""
        config, samples = self.config, self.source.split("train")
        crops = self.maker = add_unlabelled(self.crops(samples), self.trainer, self.recipe, self.root, seed=self.seed)
        validation = self.source.split("validation")
        # a checkpoint is rewritten if the recipe or the folder of its relative paths has changed
        same = self.start is not None and not recipe_changes(self.start, self.recipe) and Path(self.start.state.root) == self.root
        path = self.start.path if self.start is not None and same else None
        closed = self.start is not None and self.finished and self._close_gates(samples)  # if `steps` was reduced
        if closed and self.validation and self.validation[-1]["step"] == self.step:
            self.validation.pop()  # it was of the model before closing
        attempt = Attempt(self.directory, writes=self.trainer.ranks.first)
        if self.trainer.ranks.any(attempt.lacked_memory) and attempt.earlier is not None:
            self.trainer.after_kill(attempt.earlier.memory)
            self._take_notes()
        log_type = MetricsLog if self.ranks.first else NoLog
        with (
            keep_freed_memory(config.memory is None), memory_bound(config.memory), attempt, self.writer,
            log_type(self.directory, self.step, self.curve, self.validation) as log,
        ):  # fmt: skip
            attempt.note(self.trainer.memory)
            if self._validation_missing:
                interruption.work = "the validation"
                self._judge(log, samples, validation)
                self.best.take(self.step, ended=self.finished)
                path = self._write()
                if self.ranks.any(interruption.requested):
                    return path
            started, first = time.perf_counter(), self.step
            before = self.seconds
            batches = self._batches(crops)
            going = not self.finished
            while going:
                step, (images, target) = self.step, next(batches)
                validated = (step + 1) % config.validate_every == 0 or step + 1 == config.steps
                interruption.work = "this step and its validation" if validated else "this step"
                done = config.share_done(step + 0.5, before + self._seconds_since(started))
                try:
                    self.losses.append(self.trainer.update(step, images, target, done=done))
                except MemoryShortError as error:
                    remember_use(self.directory, error.use)
                    raise
                except DivergedError as error:
                    if self._skip(error):
                        continue
                    batches.close()
                    self._go_back(error, log)
                    batches = self._batches(crops)
                    continue
                finally:
                    self._take_notes()
                    attempt.note(self.trainer.memory)
                self.feed.end_step()
                self.step, self.seconds, self.best.averaged_at = step + 1, before + self._seconds_since(started), None
                ended = self.finished
                if ended:
                    self._close_gates(samples)
                rate = (self.step - first) * config.batch_size / (time.perf_counter() - started)
                if self.step % LOG_EVERY == 0 or ended:
                    self._log_step(log, sum(self.losses) / len(self.losses), rate)
                    self.losses = []
                self._report_step(rate)
                if judged := self.step % config.validate_every == 0 or ended:
                    interruption.work = "this validation"
                    self._judge(log, samples, validation)
                    self.seconds = before + self._seconds_since(started)
                    # The minutes may end during validation. If gates are then closed, the model is another one and needs one more step.
                    ended = ended or (self.finished and not self._close_gates(samples))
                last = self.ranks.any(ended or interruption.requested)  # read once, so that a checkpoint follows
                if last and not judged:  # the checkpoint may be evaluated or exported
                    with self._saved_on_error(), self.trainer.average.whole():
                        self._renew_statistics(samples)
                self.best.take(self.step, ended=ended)
                first_due = path is None and self._seconds_since(started) >= FIRST_CHECKPOINT_S
                if last or first_due or self.step % config.checkpoint_every == 0:
                    path = self._write()
                if last:
                    break
            batches.close()
            path = path or self._write()
        for advice in self.feed.advice():
            self.note(advice)
        self._note_collapse(path)
        return path

    def crops(self, samples: Samples) -> BatchMaker:
        """The maker of training batches."""
        return training_crops(self.recipe, self.source, samples, batch_size=self.config.batch_size, seed=self.seed)

    def _seconds_since(self, started: float) -> float:
        """Seconds by the first process's clock, on which the learning rate may depend."""
        return self.ranks.of_first(time.perf_counter() - started)

    def _note_collapse(self, newest: Path | None = None) -> None:
        """Note a collapse of the score, at the first validation that shows it and at the end. `newest`: the last checkpoint, at the end."""
        seen = collapse(self.curve, self.validation)
        if seen is None or (newest is None and (self.collapsed or self.finished)):
            return
        self.collapsed = True
        best, text = seen
        result = "" if newest is None else where_best(best, newest, kept=self.best.kept)
        self.note(after_collapse(text, self.config, result=result))

    def _batches(self, crops: BatchMaker) -> Generator[ImageBatch]:
        """The batches from the present step on, without those that were left out."""
        first = self.step + self.trainer.guard.state.skipped
        own = self.trainer.rows * self.ranks.index
        make = partial(crops.batch, rows=slice(own, own + self.trainer.rows))
        with closing(self.feed.batches(make, first, sys.maxsize)) as numbered:
            for _, batch in numbered:
                yield batch

    def _skip(self, error: DivergedError) -> bool:
        """Leave a batch out. Returns False if the run should go back in place of it."""
        if not self.trainer.guard.skip():
            return False
        self.note(f"{error}: its batch is skipped")
        return True

    def _go_back(self, error: DivergedError, log: MetricsLog) -> None:
        """Go on from the newest checkpoint with unseen batches. Raises `MuntinError` if there is none, or after several times."""
        self.writer.wait()
        folder = self.directory / "checkpoints"
        earlier = newest_sound(folder, ranks=self.ranks, note=self.note) if checkpoints_in(folder) else None
        guard = self.trainer.guard
        if earlier is None or not guard.go_back(earlier.state.guard, self.step - earlier.state.step):
            advice = lower_rate(self.config, of_candidate=self.compression is not None, resumable=bool(checkpoints_in(folder)))
            raise MuntinError(f"{error}, and at {guard.state.in_a_row - 1} batches before it: {advice}") from error
        self._restore(earlier)
        self.trainer.guard = guard
        log.go_back(self.step, self.curve, self.validation)
        self.note(f"{error}, as with the batches before it: the run goes on from step {self.step}, with other batches")

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        state = checkpoint.state
        self.trainer.restore(checkpoint)
        self.best.restore(checkpoint)
        self.step, self.losses = state.step, list(state.pending)
        self.curve, self.validation = list(state.training), list(state.validation)

    def _take_notes(self) -> None:
        """Report what recovery changed."""
        for text in self.trainer.notes:
            self.note(text)
        self.trainer.notes.clear()

    def note(self, text: str) -> None:
        """Report a note, once."""
        if text not in self.notes:
            self.notes.append(text)
            self.report(FitProgress(kind="note", step=self.step, steps=self.steps, note=text))

    def _log_step(self, log: MetricsLog, loss: float, rate: float) -> None:
        point = {
            "step": self.step, "seconds": self.seconds, "loss": loss, "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_s": rate, **self.feed.recent_waiting(),
        }  # fmt: skip
        self.curve.append(point)
        self._log(log, "training", point)

    def _report_step(self, rate: float) -> None:
        loss = self.curve[-1]["loss"] if self.curve else sum(self.losses) / len(self.losses)
        left = (self.steps - self.step) * self.config.batch_size / rate
        score = self.validation[-1]["score"] if self.validation else None
        figures: dict[str, Any] = {"loss": loss, "score": score, "images_per_second": rate, "seconds_left": left}
        self.report(FitProgress(kind="step", step=self.step, steps=self.steps, share=self._share, waiting=self.feed.waiting, **figures))

    def _log(self, log: MetricsLog, kind: str, point: dict[str, Any]) -> None:
        log.write(kind, point)
        if log.failed:
            self.note(log.failed)

    def _close_gates(self, samples: Samples) -> bool:
        """Close gates down to the final budget. Returns True if any gate was closed."""
        if self.config.gate_budget == 1:
            return False
        (crop,) = calibration_batches(samples, crop=self.recipe.data.crop, count=1, batch_size=1, seed=self.seed, task=self.recipe.task)
        return self.trainer.close_gates(crop)

    def _judge(self, log: MetricsLog, samples: Samples, validation: Samples) -> None:
        """Recalibrate the norms and validate."""
        with self._saved_on_error(), self.trainer.average.whole():
            self._renew_statistics(samples)
            side, report = tile_of(self.recipe.data.crop), self._report_validating
            result = evaluate(self.session, validation, tile=side, progress=report, ranks=self.ranks, similarity=False)
            point = {"step": self.step, **result.figures}
            self.validation.append(point)
            self.best.judge(self.validation)
            self._log(log, "validation", point)
            self.report(FitProgress(kind="validation", step=self.step, steps=self.steps, share=self._share, score=result.score))
            self._note_collapse()

    def _report_validating(self, done: int, total: int) -> None:
        self.report(FitProgress(kind="validating", step=done, steps=total))

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Write a checkpoint if the block raises (a damaged picture, a second Ctrl-C). Several processes cannot: the others do not know."""
        try:
            yield
        except BaseException:
            if self.ranks.count == 1:
                self._write()
            raise

    def _renew_statistics(self, samples: Samples) -> None:
        """Renew the statistics of the averaged model's norms."""
        seen = self.step * self.config.batch_size
        group = min(GROUP, self.config.norm_group or GROUP)
        count = max(group, min(MAX_IMAGES, seen) // group * group)
        batches = plain_crops(samples, self.maker, self.recipe, count=count, batch_size=group, seed=self.seed)
        renew_statistics(self.trainer.average.model, batches, self.trainer.precision)

    def _write(self) -> Path:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.trainer.precision.name, "seconds": self.seconds, "training": self.curve, "pending": self.losses,
            "validation": self.validation, "compression": self.compression, "memory": self.trainer.shrunk,
            "guard": self.trainer.guard.state, "update": self.update, "averaged_at": self.best.averaged_at,
        }  # fmt: skip
        return self.writer.write(state, {**self.trainer.tensors(), **self.best.unsaved(self.step)})
