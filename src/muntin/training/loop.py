"""The training loop: a recipe in, a checkpoint out.

    batch(step) -> autocast forward -> loss -> backward -> clip -> step -> averaged weights -> (validate, checkpoint)

A batch depends only on the recipe's seed and the step, and a checkpoint holds all other state. A resumed run therefore ends in the same
bits as an uninterrupted one on the same machine, with the same number of threads and recipe. Exceptions: with `training.minutes` the
learning rate depends on the clock, and the sums of CUDA have no fixed order.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from muntin.artifact.file_lock import folder_in_use
from muntin.data import Crops, Source, calibration_batches, open_source, prefetch
from muntin.data.batches import small_picture_notes
from muntin.data.source import Samples
from muntin.errors import MuntinError, RecipeError
from muntin.layers.norm import GROUP
from muntin.models import CompressionRecord, TorchSession
from muntin.training.checkpoint import Checkpoint, check_classes, checkpoints_in, find_start, recipe_changes
from muntin.training.config import TrainingConfig
from muntin.training.distributed.checkpoint_writer import CheckpointWriter
from muntin.training.distributed.ranks import Ranks, joined_processes, restarted
from muntin.training.evaluation import collapse, evaluate, poor_classes, tile_of
from muntin.training.gate_pruning import GateClosing
from muntin.training.memory.memory_format import keep_freed_memory
from muntin.training.metrics_log import MetricsLog, NoLog
from muntin.training.model_checks import check_maps, check_model, check_reading
from muntin.training.norm_recalibration import MAX_IMAGES, renew_statistics
from muntin.training.precision import prepare_hardware
from muntin.training.recipe import Recipe, load_recipe
from muntin.training.recovery.interrupt import Interruption
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.recovery.out_of_memory import MemoryShortError, forget_use, remember_use, remembered_use
from muntin.training.trainer import DivergedError, Trainer
from muntin.training.weights import load_initial_weights, new_model

LOG_EVERY = 10
"""Steps between two points of the training curve."""
FIRST_CHECKPOINT_S = 30.0
"""Seconds of training after which a run that has no checkpoint writes its first one; the others follow `checkpoint_every`."""


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Progress of a run. Notes (`FitResult.notes`) are reported before the first step.

    `kind`: "check" (of pictures), "note", "prepare" (a stage of compression before its first step), "step" (each one; `loss` is a mean
    over at most 10), "validating" (`step` of `steps` pictures), "validation" (its end).
    """

    kind: Literal["check", "note", "prepare", "step", "validating", "validation"]
    step: int
    steps: int
    loss: float | None = None
    score: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    note: str | None = None


FitReport = Callable[[FitProgress], None]


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
    directory without one; False refuses a directory with one. Changed keys of `training` (except `gate_budget`) are noted and apply from
    this step on. Ctrl-C ends the run after the step in progress, with a checkpoint. Writes `checkpoints/`, `metrics.jsonl` and TensorBoard
    events. Raises kinds of `MuntinError`.
    """
    if not isinstance(recipe, Recipe):
        root = Path(recipe).resolve().parent if root is None else root
        recipe = load_recipe(recipe)
    directory, root = Path(directory or Path("runs") / recipe.name), Path(root or ".").resolve()
    with joined_processes() as ranks, held_folder(directory, "muntin fit", ranks) as notes:
        resume = resume or (ranks.any(restarted()) and bool(checkpoints_in(directory / "checkpoints")))
        report = report if ranks.first else None
        return _fit(recipe, directory, root, resume, report or (lambda progress: None), list(notes), ranks)


def held_folder(folder: Path, work: str, ranks: Ranks) -> AbstractContextManager[tuple[str, ...]]:
    """Hold a folder for a run (see `folder_in_use`): of several processes the first one does it."""
    return folder_in_use(folder, work) if ranks.first else nullcontext(())


def _fit(recipe: Recipe, directory: Path, root: Path, resume: bool, report: FitReport, notes: list[str], ranks: Ranks) -> FitResult:
    start = find_start(directory, recipe, resume=resume, ranks=ranks, note=notes.append)
    if start is None and ranks.first and not restarted():
        forget_use(directory)
    precision = prepare_hardware(recipe.training, begun=None if start is None else start.state.precision, ranks=ranks)
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
    # last: it may take minutes
    checked = source.check(lambda done, total: report(FitProgress(kind="check", step=done, steps=total))) if ranks.first else ()
    small = small_picture_notes(source.split("train"), task=recipe.task, crop=recipe.data.crop)
    notes += (*source.notes, *checked, *small, *unsuited, *begun)
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=precision, seed=recipe.seed, ranks=ranks)
    training = Training(trainer, recipe, source, directory=directory, root=root, start=start, report=report)
    for note in notes:
        report(FitProgress(kind="note", step=training.step, steps=training.steps, note=note))
    with Interruption(answers=ranks.first) as interruption:
        path = training.run(interruption)
    if training.finished:
        poor = () if training.collapsed else poor_classes(training.validation)
        for note in (*ended_by_minutes(recipe.training, training.step), *poor):
            training.note(note)
    return FitResult(
        directory=directory, checkpoint=path, step=training.step, steps=training.steps, interrupted=not training.finished,
        stop_requested=interruption.requested, precision=f"{precision.name} on {precision.device}: {precision.reason}",
        seconds=training.seconds, validation=training.validation, notes=(*notes, *training.notes),
    )  # fmt: skip


def ended_by_minutes(config: TrainingConfig, step: int) -> tuple[str, ...]:
    """A note on a run that its minutes ended before the recipe's steps."""
    if config.minutes is None or step >= config.steps:
        return ()
    return (f"training.minutes ({config.minutes:g}) ended the run after {step:,} of the recipe's {config.steps:,} steps",)


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
        self.ranks = trainer.ranks
        self.directory, self.root, self.start, self.report = directory, root, start, report
        self.seed = recipe.seed if seed is None else seed
        self.compression = compression
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
            state = start.state
            self.step, self.seconds, self.losses = state.step, state.seconds, list(state.pending)
            self.curve, self.validation = list(state.training), list(state.validation)
        trainer.remember(remembered_use(directory))
        self.writer = CheckpointWriter(directory / "checkpoints", self.ranks)
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
        own = self.trainer.rows * self.ranks.index
        batch = partial(crops.batch, rows=slice(own, own + self.trainer.rows))
        validation = self.source.split("validation")
        # a checkpoint is rewritten if the recipe or the folder of its relative paths has changed
        same = self.start is not None and not recipe_changes(self.start, self.recipe) and Path(self.start.state.root) == self.root
        path = self.start.path if self.start is not None and same else None
        closed = self.start is not None and self.finished and self._close_gates(samples)  # if `steps` was reduced
        if closed and self.validation and self.validation[-1]["step"] == self.step:
            self.validation.pop()  # it was of the model before closing
        log_type = MetricsLog if self.ranks.first else NoLog
        with (
            keep_freed_memory(), memory_bound(config.memory), self.writer,
            log_type(self.directory, self.step, self.curve, self.validation) as log,
        ):  # fmt: skip
            if self._validation_missing:
                interruption.work = "the validation"
                self._judge(log, samples, validation)
                path = self._write()
                if self.ranks.any(interruption.requested):
                    return path
            started, first = time.perf_counter(), self.step
            before = self.seconds
            for step, (images, target) in prefetch(batch, self.step, self.step if self.finished else config.steps):
                validated = (step + 1) % config.validate_every == 0 or step + 1 == config.steps
                interruption.work = "this step and its validation" if validated else "this step"
                done = config.share_done(step + 0.5, before + self._seconds_since(started))
                try:
                    self.losses.append(self.trainer.update(step, images, target, done=done))
                except MemoryShortError as error:
                    remember_use(self.directory, error.use)
                    raise
                except DivergedError as error:
                    raise MuntinError(f"{error}: {self._lower_rate()}") from error
                self._take_notes()
                self.step, self.seconds = step + 1, before + self._seconds_since(started)
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
                first_due = path is None and self._seconds_since(started) >= FIRST_CHECKPOINT_S
                if last or first_due or self.step % config.checkpoint_every == 0:
                    path = self._write()
                if last:
                    break
            path = path or self._write()
        self._note_collapse(path)
        return path

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
        gates = f" or training.gate_budget ({self.config.gate_budget:g}) too low" if self.config.gate_budget < 1 else ""
        text += f": the learning rate (now {self.config.learning_rate:g}) is probably too high{gates}; train anew with another one"
        if newest is not None:
            kept = next((path for path in checkpoints_in(newest.parent) if path.name == f"step-{best:08d}"), None)
            text += f"; the checkpoint of step {best} is not kept" if kept is None else f"; {kept} has the best score"
        self.note(text)

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
        self.writer.wait()
        resumable = bool(checkpoints_in(self.directory / "checkpoints"))
        again = "go on from the last checkpoint, by --resume" if resumable else "train anew, by"
        return f"lower training.learning_rate (now {rate:g}) and {again} {' '.join(words)}"

    def _log_step(self, log: MetricsLog, loss: float, rate: float) -> None:
        point = {
            "step": self.step, "seconds": self.seconds, "loss": loss, "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_s": rate,
        }  # fmt: skip
        self.curve.append(point)
        self._log(log, "training", point)

    def _report_step(self, rate: float) -> None:
        loss = self.curve[-1]["loss"] if self.curve else sum(self.losses) / len(self.losses)
        left = (self.steps - self.step) * self.config.batch_size / rate
        score = self.validation[-1]["score"] if self.validation else None
        self.report(
            FitProgress(kind="step", step=self.step, steps=self.steps, loss=loss, score=score, images_per_second=rate, seconds_left=left)
        )

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
            result = evaluate(
                self.session, validation, tile=tile_of(self.recipe.data.crop), progress=self._report_validating, ranks=self.ranks
            )
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
        """Write a checkpoint if the block raises (a damaged picture, a second Ctrl-C). Several processes cannot: the others do not know."""
        try:
            yield
        except BaseException:
            if self.ranks.count == 1:
                self._write()
            raise

    def _renew_statistics(self, samples: Samples) -> None:
        """Renew the statistics of the averaged model's norms."""
        data, seen = self.recipe.data, self.step * self.config.batch_size
        count = max(GROUP, min(MAX_IMAGES, seen) // GROUP * GROUP)
        batches = calibration_batches(samples, crop=data.crop, count=count, batch_size=GROUP, seed=self.seed, task=self.recipe.task)
        renew_statistics(self.trainer.average.model, batches, self.trainer.precision)

    def _write(self) -> Path:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.trainer.precision.name, "seconds": self.seconds, "training": self.curve, "pending": self.losses,
            "validation": self.validation, "compression": self.compression, "memory": self.trainer.shrunk,
        }  # fmt: skip
        return self.writer.write(state, self.trainer.tensors())
