"""The training loop: a recipe in, a checkpoint out.

    batch(step) -> autocast forward -> loss -> backward -> clip -> step -> averaged weights -> (validate, checkpoint)

A batch depends on nothing but the recipe's seed and the step, and a checkpoint holds all other state, so a run that was interrupted
and resumed ends in the same bits as one that was not (on the same machine, with the same number of threads, by the same recipe). Not where
`training.minutes` limits it, since the learning rate depends on the clock then, and not on CUDA, whose sums have no fixed order.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from muntin.artifact import Signature
from muntin.data import Crops, Source, calibration_batches, open_source, prefetch
from muntin.data.batches import each_calibration_batch
from muntin.data.source import Samples
from muntin.errors import MuntinError, RecipeError
from muntin.layers.norm import GROUP
from muntin.models import TorchSession
from muntin.models.compiler import require_compiler
from muntin.training.allocator import keep_freed_memory
from muntin.training.checkpoint import (
    Checkpoint,
    check_classes,
    make_signature,
    new_model,
    write_checkpoint,
)
from muntin.training.closing import GateClosing
from muntin.training.config import TrainingConfig
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.interrupt import Interruption
from muntin.training.metrics_log import MetricsLog
from muntin.training.precision import Precision, check_maps, resolve_precision
from muntin.training.recipe import Recipe, load_recipe
from muntin.training.resuming import changes, find_start
from muntin.training.schedule import share_done, steps_expected
from muntin.training.statistics import IMAGES, has_statistics, renew_statistics
from muntin.training.suitability import check_model, check_reading
from muntin.training.trainer import DivergedError, Trainer
from muntin.training.weights import begin_with

LOG_EVERY = 10
"""Steps between two points of the training curve."""


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """Where a run stands: what a progress line shows. Notes (`FitResult.notes`) come before the first step."""

    kind: Literal["check", "note", "step", "validation"]
    step: int
    steps: int
    loss: float | None = None
    score: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    note: str | None = None


Report = Callable[[FitProgress], None]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a run left behind."""

    directory: Path
    checkpoint: Path
    step: int
    steps: int
    """Of the whole run: the recipe's, or fewer where its minutes end first."""
    interrupted: bool
    """Steps are left."""
    asked_to_stop: bool
    """Ctrl-C or SIGTERM came, and the run ended for it or just after its last step: whoever goes on from here does not."""
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
    report: Report | None = None,
) -> FitResult:
    """Train by a recipe: a `Recipe`, or the path of a YAML file.

    `directory`: where the run goes, `runs/NAME` unless given. `root`: the folder that the recipe's relative paths start at (the
    file's own, or the current one). `resume`: go on from the newest checkpoint, or begin where there is none, which is noted; without
    it, a directory that already holds a run is refused. A run that goes on may have other keys of `training` than before, but
    `gate_budget`: they are noted, and hold from there on. Ctrl-C ends after the step in progress and leaves a checkpoint.
    Writes `checkpoints/`, `metrics.jsonl` and TensorBoard events; raises kinds of `MuntinError`.
    """
    if not isinstance(recipe, Recipe):
        root = Path(recipe).resolve().parent if root is None else root
        recipe = load_recipe(recipe)
    directory, root = Path(directory or Path("runs") / recipe.name), Path(root or ".").resolve()
    report = report or (lambda progress: None)
    start = find_start(directory, recipe, resume=resume)
    precision = prepare_hardware(recipe.training, begun=None if start is None else start.state.precision)
    source = open_source(recipe.data, root=root)
    if source.task != recipe.task:
        raise RecipeError(f"task: the data are for '{source.task}' and the recipe says '{recipe.task}'; make them agree")
    if start is not None:
        check_classes(start, source)
    anew = (f"{directory} held no checkpoint to go on from: trained from the start",) if resume and start is None else ()
    changed = () if start is None or not (what := changes(start, recipe)) else (f"on the way, from step {start.state.step} on: {what}",)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tuple(source.classes))
    sizes = check_model(model, recipe, tuple(source.classes))
    check_reading(model, recipe, tuple(source.classes))
    precision = check_maps(model, precision, crop=recipe.data.crop, channels=recipe.data.channels, asked=recipe.training.precision)
    if recipe.training.gate_budget < 1:  # what is wrong with it is told before pictures are looked at
        image = torch.zeros(1, recipe.data.channels, recipe.data.crop, recipe.data.crop)
        GateClosing(model, model, image, keep=recipe.training.gate_budget)
    weights = None if start is not None else recipe.model.weights
    begun = () if weights is None else begin_with(model, root / weights)
    checked = source.check(lambda done, total: report(FitProgress(kind="check", step=done, steps=total)))  # last: it may take minutes
    notes = (*anew, *changed, *source.notes, *checked, *sizes, *begun)
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=precision)
    training = Training(trainer, recipe, source, directory=directory, root=root, start=start, report=report)
    for note in notes:
        report(FitProgress(kind="note", step=training.step, steps=training.steps, note=note))
    with Interruption() as interruption:
        path = training.run(interruption)
    return FitResult(
        directory=directory, checkpoint=path, step=training.step, steps=training.steps, interrupted=not training.finished,
        asked_to_stop=interruption.asked, precision=f"{precision.name} on {precision.device}: {precision.reason}",
        seconds=training.seconds, validation=training.validation, notes=(*notes, *training.notes),
    )  # fmt: skip


def prepare_hardware(config: TrainingConfig, *, begun: str | None) -> Precision:
    """Set the threads that a recipe asks for and say what will be computed in; `begun`: what a run that goes on was computed in so far.

    Raises `DependencyError` for what this machine lacks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.compile:
        require_compiler(device)
    return resolve_precision(config.precision, device, begun=begun)


class Training:
    """A trainer on its way from one step to the last: batches, curve, validation, checkpoints.

    `start`: the checkpoint to go on from, of the same model. `seed`: of the crops; the recipe's unless given. `compression`: kept in
    every checkpoint (see `CheckpointState`).
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
        report: Report,
        seed: int | None = None,
        compression: dict[str, Any] | None = None,
    ) -> None:
        self.trainer, self.recipe, self.source, self.config = trainer, recipe, source, trainer.config
        self.directory, self.root, self.start, self.report = directory, root, start, report
        self.seed = recipe.seed if seed is None else seed
        self.compression = compression
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.validation: list[dict[str, Any]] = []
        self.notes: list[str] = []
        """What went wrong on the way, and did not end it."""
        if start is not None:
            trainer.restore(start)
            state = start.state
            self.step, self.seconds, self.losses = state.step, state.seconds, list(state.pending)
            self.curve, self.validation = list(state.training), list(state.validation)
        self.session = TorchSession(trainer.average.model, signature_of(recipe, source), dtype=trainer.precision.dtype)

    @property
    def finished(self) -> bool:
        """Nothing is left of the run's steps, or of its minutes."""
        return share_done(self.config, self.step, self.seconds) >= 1

    @property
    def steps(self) -> int:
        """Of the whole run, as far as can be told now."""
        return steps_expected(self.config, self.step, self.seconds)

    @property
    def _judgement_failed(self) -> bool:
        """The step that is gone on from was to be validated and was not: what failed there is mended by now, maybe."""
        due = self.start is not None and self.step > 0 and (self.finished or self.step % self.config.validate_every == 0)
        return due and (not self.validation or self.validation[-1]["step"] != self.step)

    def run(self, interruption: Interruption) -> Path:
        """Train to the end, or to the step in which an interruption is asked for; the newest checkpoint."""
        config, data = self.config, self.recipe.data
        samples = self.source.split("train")
        crops = Crops(
            samples, task=self.recipe.task, crop=data.crop, batch_size=config.batch_size, seed=self.seed,
            augmentation=data.augmentation, rare=data.rare,
        )  # fmt: skip
        validation = self.source.split("validation")
        # It is written anew where it says something else now: the recipe, or the folder that its relative paths begin at.
        same = self.start is not None and not changes(self.start, self.recipe) and Path(self.start.state.root) == self.root
        path = self.start.path if self.start is not None and same else None
        closed = self.start is not None and self.finished and self._close_gates(samples)  # where fewer steps are asked for now
        if closed and self.validation and self.validation[-1]["step"] == self.step:
            self.validation.pop()  # of another model
        with keep_freed_memory(), MetricsLog(self.directory, self.step, self.curve, self.validation) as log:
            if self._judgement_failed:
                self._judge(log, samples, validation)
                path = self._write()
            started, first = time.perf_counter(), self.step
            before = self.seconds
            for step, (images, target) in prefetch(crops, self.step, self.step if self.finished else config.steps):
                random.seed(self.seed * config.steps + step)  # what a model draws outside of PyTorch is the same when a run goes on
                np.random.seed((self.seed * config.steps + step) % 2**32)
                done = share_done(config, step + 0.5, before + time.perf_counter() - started)
                try:
                    self.losses.append(self.trainer.update(step, images, target, done=done))
                except DivergedError as error:
                    raise MuntinError(f"{error}: {self._slower()}") from error
                self.step, self.seconds = step + 1, before + time.perf_counter() - started
                ended = self.finished
                if ended:
                    self._close_gates(samples)
                if self.step % LOG_EVERY == 0 or ended:
                    rate = (self.step - first) * config.batch_size / (time.perf_counter() - started)
                    self._log_step(log, sum(self.losses) / len(self.losses), rate)
                    self.losses = []
                if judged := self.step % config.validate_every == 0 or ended:
                    self._judge(log, samples, validation)
                    self.seconds = before + time.perf_counter() - started
                    # By what validating took it may be over: where gates are closed at once, it is another model, and goes on for a step.
                    ended = ended or (self.finished and not self._close_gates(samples))
                last = ended or interruption.asked  # read once: a checkpoint follows for sure
                if last and not judged:  # the checkpoint may be evaluated or exported as it is
                    with self._kept():
                        self._renew_statistics(samples)
                if last or self.step % config.checkpoint_every == 0:
                    path = self._write()
                if last:
                    break
        return path or self._write()

    def _slower(self) -> str:
        """What to do where training has left the numbers."""
        rate, least = self.config.learning_rate, self.config.final_learning_rate
        if self.compression is not None:
            return f"lower this stage's learning_rate in compression (now {rate:g}) and compress anew, into another --output"
        lower = f"{rate / 4:.2g}"
        words = ["--resume", "--set", f"training.learning_rate={lower}"]
        words += ["--set", f"training.final_learning_rate={lower}"] if least > float(lower) else []
        return f"lower training.learning_rate (now {rate:g}) and go on from the last checkpoint, by {' '.join(words)}"

    def _log_step(self, log: MetricsLog, loss: float, rate: float) -> None:
        point = {
            "step": self.step, "seconds": self.seconds, "loss": loss, "learning_rate": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_s": rate,
        }  # fmt: skip
        self.curve.append(point)
        self._note(log, "training", point)
        left = (self.steps - self.step) * self.config.batch_size / rate
        score = self.validation[-1]["score"] if self.validation else None
        self.report(
            FitProgress(kind="step", step=self.step, steps=self.steps, loss=loss, score=score, images_per_second=rate, seconds_left=left)
        )

    def _note(self, log: MetricsLog, kind: str, point: dict[str, Any]) -> None:
        log.write(kind, point)
        if log.failed and log.failed not in self.notes:
            self.notes.append(log.failed)
            self.report(FitProgress(kind="note", step=self.step, steps=self.steps, note=log.failed))

    def _close_gates(self, samples: Samples) -> bool:
        """Closes at a run's end what its budget takes, however early that came; whether that was anything."""
        if self.config.gate_budget == 1:
            return False
        crop = calibration_batches(samples, crop=self.recipe.data.crop, count=1, batch_size=1, seed=self.seed, task=self.recipe.task)
        return self.trainer.close_gates(next(iter(crop)))

    def _judge(self, log: MetricsLog, samples: Samples, validation: Samples) -> None:
        """Validate, norms with statistics of the weights of now."""
        with self._kept():
            self._renew_statistics(samples)
            self._validate(log, validation)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Where what is done with the trained model fails, of a model or of pictures, or by a second Ctrl-C, what was trained is kept."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def _renew_statistics(self, samples: Samples) -> None:
        """Of the averaged weights' norms, whenever they are judged: after the last step, too."""
        model, data = self.trainer.average.model, self.recipe.data
        if has_statistics(model):
            seen = self.step * self.config.batch_size
            count = max(GROUP, min(IMAGES, seen) // GROUP * GROUP)
            batches = each_calibration_batch(samples, crop=data.crop, count=count, batch_size=GROUP, seed=self.seed, task=self.recipe.task)
            renew_statistics(model, batches, self.trainer.precision)

    def _validate(self, log: MetricsLog, samples: Samples) -> None:
        result = evaluate(self.session, samples, tile=tile_of(self.recipe.data.crop))
        point: dict[str, Any] = {"step": self.step, "score": result.score, "accuracy": result.accuracy, "by_class": result.by_class}
        if self.recipe.task == "segment":
            point["miou"] = result.miou
        self.validation.append(point)
        self._note(log, "validation", point)
        self.report(FitProgress(kind="validation", step=self.step, steps=self.steps, score=result.score))

    def _write(self) -> Path:
        state = {
            "step": self.step, "recipe": self.recipe, "root": str(self.root), "classes": tuple(self.source.classes),
            "precision": self.trainer.precision.name, "seconds": self.seconds, "training": self.curve, "pending": self.losses,
            "validation": self.validation, "compression": self.compression,
        }  # fmt: skip
        return write_checkpoint(self.directory / "checkpoints", state, self.trainer.tensors())


def signature_of(recipe: Recipe, source: Source) -> Signature:
    """What goes in and comes out of a model trained by a recipe on a source; a checkpoint has its own, `Checkpoint.signature`."""
    return make_signature(recipe, tuple(source.classes))
