"""The training loop: a recipe in, a checkpoint out.

    batch(step) -> autocast forward -> loss -> backward -> clip -> step -> averaged weights -> (validate, checkpoint)

A batch depends only on the recipe's seed and the step, and a checkpoint holds all other state. A resumed run therefore ends in the same
bits as an uninterrupted one on the same machine, with the same number of threads and recipe. Exceptions: with `training.minutes` the
learning rate depends on the clock, and the sums of CUDA have no fixed order.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muntin.artifact.file_lock import folder_in_use
from muntin.data import BatchFeed, Crops, Source, calibration_batches, open_source
from muntin.data.batches import small_picture_notes
from muntin.data.source import Samples
from muntin.errors import MuntinError, RecipeError
from muntin.layers.norm import GROUP
from muntin.models import CompressionRecord, TorchSession
from muntin.models.session import require_compiler
from muntin.training.checkpoint import (
    Checkpoint,
    check_classes,
    checkpoints_in,
    find_start,
    read_checkpoint,
    recipe_changes,
    write_checkpoint,
)
from muntin.training.config import TrainingConfig
from muntin.training.evaluation import collapse, evaluate, poor_classes, tile_of
from muntin.training.gate_pruning import GateClosing
from muntin.training.memory.memory_format import keep_freed_memory
from muntin.training.model_checks import check_maps, check_model, check_reading
from muntin.training.norm_recalibration import MAX_IMAGES, renew_statistics
from muntin.training.precision import TrainingPrecision, resolve_precision
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.metrics_log import MetricsLog
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe, load_recipe
from muntin.training.recovery.attempt import Attempt
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.trainer import DivergedError, Trainer
from muntin.training.weights import load_initial_weights, new_model

LOG_EVERY = 10
"""Steps between two points of the training curve."""
FIRST_CHECKPOINT_S = 30.0
"""Seconds of training after which a run that has no checkpoint writes its first one; the others follow `checkpoint_every`."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Result of a run."""

    directory: Path
    checkpoint: Path
    step: int
    steps: int
    """Steps of the whole run; fewer than the recipe's if its minutes end first."""
    interrupted: bool
    """True if steps are left."""
    stop_requested: bool
    """True after Ctrl-C or SIGTERM, also during the last step: the caller should start no further work."""
    precision: str
    seconds: float
    waiting: float | None
    """Share of the steps' time spent waiting for batches, which `workers` threads made; None before the second step."""
    workers: int
    validation: list[dict[str, Any]]
    notes: tuple[str, ...]


def fit(
    recipe: Recipe | Path | str,
    *,
    directory: Path | str | None = None,
    root: Path | str | None = None,
    resume: bool = False,
    report: FitReport | None = None,
) -> FitResult:
    """Train by a recipe: a `Recipe`, or the path of a YAML file.

    `directory`: the run's folder, by default `runs/NAME`; refused while another process trains in it. `root`: the folder at which relative
    paths of the recipe start, by default the file's own or the current one. `resume`: continue from the newest checkpoint, and refuse a
    directory without one; False refuses a directory with one. Changed keys of `training` (except `gate_budget` and `optimizer`) are noted
    and apply from this step on. Ctrl-C ends the run after the step in progress, with a checkpoint. Writes `checkpoints/`, `metrics.jsonl`
    and TensorBoard events. Raises kinds of `MuntinError`.
    """
    if not isinstance(recipe, Recipe):
        root = Path(recipe).resolve().parent if root is None else root
        recipe = load_recipe(recipe)
    directory, root = Path(directory or Path("runs") / recipe.name), Path(root or ".").resolve()
    with folder_in_use(directory, "muntin fit") as notes:
        return _fit(recipe, directory, root, resume, report or (lambda progress: None), list(notes))


def _fit(recipe: Recipe, directory: Path, root: Path, resume: bool, report: FitReport, notes: list[str]) -> FitResult:
    start = find_start(directory, recipe, resume=resume)
    precision = prepare_hardware(recipe.training, begun=None if start is None else start.state.precision)
    source = open_source(recipe.data, root=root)
    if source.task != recipe.task:
        raise RecipeError(f"task: the data are for '{source.task}' and the recipe says '{recipe.task}'; make them agree")
    if start is not None:
        check_classes(start, source)
        if changed := recipe_changes(start, recipe):
            notes.append(f"on the way, from step {start.state.step} on: {changed}")
    torch.manual_seed(recipe.seed)
    model, classes = new_model(recipe, tuple(source.classes)), tuple(source.classes)
    unsuited = check_model(model, recipe, classes)
    check_reading(model, recipe, classes)
    precision = check_maps(model, precision, crop=recipe.data.crop, channels=recipe.data.channels, requested=recipe.training.precision)
    if recipe.training.gate_budget < 1:  # report an impossible budget before the data are checked
        image = torch.zeros(1, recipe.data.channels, recipe.data.crop, recipe.data.crop)
        GateClosing(model, model, image, keep=recipe.training.gate_budget)
    weights = None if start is not None else recipe.model.weights
    begun = () if weights is None else load_initial_weights(model, root / weights)
    checked = source.check(lambda done, total: report(FitProgress(kind="check", step=done, steps=total)))  # last: it may take minutes
    small = small_picture_notes(source.split("train"), task=recipe.task, crop=recipe.data.crop)
    notes += (*source.notes, *checked, *small, *unsuited, *begun)
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=precision, seed=recipe.seed)
    training = Training(trainer, recipe, source, directory=directory, root=root, start=start, report=report)
    for note in notes:
        report(FitProgress(kind="note", step=training.step, steps=training.steps, note=note))
    with Interruption() as interruption:
        path = training.run(interruption)
    if training.finished:
        poor = () if training.collapsed else poor_classes(training.validation)
        for note in (*ended_by_minutes(recipe.training, training.step), *poor):
            training.note(note)
    return FitResult(
        directory=directory, checkpoint=path, step=training.step, steps=training.steps, interrupted=not training.finished,
        stop_requested=interruption.requested, precision=f"{precision.name} on {precision.device}: {precision.reason}",
        seconds=training.seconds, waiting=training.feed.waiting, workers=training.feed.workers, validation=training.validation,
        notes=(*notes, *training.notes),
    )  # fmt: skip


def ended_by_minutes(config: TrainingConfig, step: int) -> tuple[str, ...]:
    """A note on a run that its minutes ended before the recipe's steps."""
    if config.minutes is None or step >= config.steps:
        return ()
    return (f"training.minutes ({config.minutes:g}) ended the run after {step:,} of the recipe's {config.steps:,} steps",)


def prepare_hardware(config: TrainingConfig, *, begun: str | None) -> TrainingPrecision:
    """Set the number of threads and choose the precision. `begun`: the precision of a resumed run so far.

    Raises `DependencyError` for a precision or compiler that this machine lacks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.compile:
        require_compiler(device)
    return resolve_precision(config.precision, device, begun=begun)


class Training:
    """Runs a trainer to the last step: batches, curve, validation, checkpoints.

    `start`: the checkpoint of the same model to continue from. `seed`: of the crops. `compression`: the record for every checkpoint.
    """

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
        if start is not None:
            trainer.restore(start)
            self._take(start)
            self.seconds = start.state.seconds
        self.session = TorchSession(trainer.average.model, recipe.signature(source.classes), dtype=trainer.precision.dtype)

    @property
    def finished(self) -> bool:
        """True if no steps, or no minutes, of the run are left."""
        return self.config.share_done(self.step, self.seconds) >= 1

    @property
    def steps(self) -> int:
        """Steps of the whole run, as estimated now."""
        return self.config.steps_expected(self.step, self.seconds)

    @property
    def _validation_missing(self) -> bool:
        """True if the step that the run continues from should have been validated and was not, because of an error."""
        due = self.start is not None and self.step > 0 and (self.finished or self.step % self.config.validate_every == 0)
        return due and (not self.validation or self.validation[-1]["step"] != self.step)

    def run(self, interruption: Interruption) -> Path:
        """Train to the last step, or until an interruption. Returns the newest checkpoint."""
        config, data = self.config, self.recipe.data
        samples = self.source.split("train")
        crops = Crops(
            samples, task=self.recipe.task, crop=data.crop, batch_size=config.batch_size, seed=self.seed,
            augmentation=data.augmentation, rare=data.rare,
        )  # fmt: skip
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
        with (
            keep_freed_memory(config.memory is None),
            memory_bound(config.memory),
            attempt,
            MetricsLog(self.directory, self.step, self.curve, self.validation) as log,
        ):
            attempt.note(self.trainer.memory)
            if self._validation_missing:
                interruption.work = "the validation"
                self._judge(log, samples, validation)
                path = self._write()
                if interruption.requested:
                    return path
            started, first = time.perf_counter(), self.step
            before = self.seconds
            batches = self._batches(crops)
            going = not self.finished
            while going:
                step, (images, target) = self.step, next(batches)
                validated = (step + 1) % config.validate_every == 0 or step + 1 == config.steps
                interruption.work = "this step and its validation" if validated else "this step"
                done = config.share_done(step + 0.5, before + time.perf_counter() - started)
                try:
                    self.losses.append(self.trainer.update(step, images, target, done=done))
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
                self.step, self.seconds = step + 1, before + time.perf_counter() - started
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
                    self.seconds = before + time.perf_counter() - started
                    # The minutes may end during validation. If gates are then closed, the model is another one and needs one more step.
                    ended = ended or (self.finished and not self._close_gates(samples))
                last = ended or interruption.requested  # read once, so that a checkpoint follows
                if last and not judged:  # the checkpoint may be evaluated or exported
                    with self._saved_on_error():
                        self._renew_statistics(samples)
                first_due = path is None and time.perf_counter() - started >= FIRST_CHECKPOINT_S
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

    def _note_collapse(self, newest: Path | None = None) -> None:
        """Note a collapse of the score, at the first validation that shows it and at the end. `newest`: the last checkpoint, at the end."""
        seen = collapse(self.curve, self.validation)
        if seen is None or (newest is None and (self.collapsed or self.finished)):
            return
        self.collapsed = True
        best, text = seen
        gates = f" or training.gate_budget ({self.config.gate_budget:g}) too low" if self.config.gate_budget < 1 else ""
        text += f": the learning rate (now {self.config.learning_rate:g}) is probably too high{gates}; train anew with another one"
        if newest is not None:
            kept = next((path for path in checkpoints_in(newest.parent) if path.name == f"step-{best:08d}"), None)
            text += f"; the checkpoint of step {best} is not kept" if kept is None else f"; {kept} has the best score"
        self.note(text)

    def _batches(self, crops: Crops) -> Generator[ImageBatch]:
        """The batches from the present step on, without those that were left out."""
        first = self.step + self.trainer.guard.state.skipped
        with closing(self.feed.batches(crops.batch, first, sys.maxsize)) as numbered:
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
        kept = checkpoints_in(self.directory / "checkpoints")
        earlier = read_checkpoint(kept[-1]) if kept else None
        guard = self.trainer.guard
        if earlier is None or not guard.go_back(earlier.state.guard, self.step - earlier.state.step):
            raise MuntinError(f"{error}, and at {guard.state.in_a_row - 1} batches before it: {self._lower_rate()}") from error
        self.trainer.restore(earlier)
        self.trainer.guard = guard
        self._take(earlier)
        log.go_back(self.step, self.curve, self.validation)
        self.note(f"{error}, as with the batches before it: the run goes on from step {self.step}, with other batches")

    def _take(self, checkpoint: Checkpoint) -> None:
        """Continue the history of a checkpoint."""
        state = checkpoint.state
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

    def _lower_rate(self) -> str:
        """Advice after the loss has diverged."""
        rate, final = self.config.learning_rate, self.config.final_learning_rate
        if self.compression is not None:
            return f"lower this stage's learning_rate in compression (now {rate:g}) and compress anew, into another --output"
        lower = f"{rate / 4:.2g}"
        words = ["--set", f"training.learning_rate={lower}"]
        words += ["--set", f"training.final_learning_rate={lower}"] if final > float(lower) else []
        resumable = bool(checkpoints_in(self.directory / "checkpoints"))
        again = "go on from the last checkpoint, by --resume" if resumable else "train anew, by"
        return f"lower training.learning_rate (now {rate:g}) and {again} {' '.join(words)}"

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
        self.report(FitProgress(kind="step", step=self.step, steps=self.steps, waiting=self.feed.waiting, **figures))

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
        with self._saved_on_error():
            self._renew_statistics(samples)
            result = evaluate(self.session, validation, tile=tile_of(self.recipe.data.crop), progress=self._report_validating)
            point: dict[str, Any] = {"step": self.step, "score": result.score, "accuracy": result.accuracy, "by_class": result.by_class}
            if self.recipe.task == "segment":
                point["miou"] = result.miou
            self.validation.append(point)
            self._log(log, "validation", point)
            self.report(FitProgress(kind="validation", step=self.step, steps=self.steps, score=result.score))
            self._note_collapse()

    def _report_validating(self, done: int, total: int) -> None:
        self.report(FitProgress(kind="validating", step=done, steps=total))

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Write a checkpoint if the block raises (a damaged picture, a second Ctrl-C)."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def _renew_statistics(self, samples: Samples) -> None:
        """Renew the statistics of the averaged model's norms."""
        data, seen = self.recipe.data, self.step * self.config.batch_size
        group = min(GROUP, self.config.norm_group or GROUP)
        count = max(group, min(MAX_IMAGES, seen) // group * group)
        batches = calibration_batches(samples, crop=data.crop, count=count, batch_size=group, seed=self.seed, task=self.recipe.task)
        renew_statistics(self.trainer.average.model, batches, self.trainer.precision)

    def _write(self) -> Path:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.trainer.precision.name, "seconds": self.seconds, "training": self.curve, "pending": self.losses,
            "validation": self.validation, "compression": self.compression, "memory": self.trainer.shrunk,
            "guard": self.trainer.guard.state,
        }  # fmt: skip
        return write_checkpoint(self.directory / "checkpoints", state, self.trainer.tensors())
