"""A whole run: a recipe in, a checkpoint out."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muntin.artifact.file_lock import folder_in_use
from muntin.data import Source, open_source
from muntin.data.batches import small_picture_notes
from muntin.data.source import SPLITS
from muntin.errors import RecipeError
from muntin.images import write_whole
from muntin.models.trusted_code import trust_model
from muntin.text import plain
from muntin.training.checkpoint import Checkpoint, check_classes, checkpoints_in, find_start, recipe_changes
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import Ranks, joined_processes, restarted
from muntin.training.evaluation import poor_classes, worse_than_input
from muntin.training.gate_pruning import GateClosing
from muntin.training.loop import Training
from muntin.training.loss import class_weights, weights_note
from muntin.training.model_checks import check_maps, check_model, check_reading, measured_precision
from muntin.training.precision import prepare_hardware
from muntin.training.progress.bar import shown_fit
from muntin.training.progress.best import out_of_patience
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe, load_recipe, settled
from muntin.training.recovery.out_of_memory import forget_use
from muntin.training.teachers.opening import open_teacher
from muntin.training.teachers.unlabelled import check_unlabelled
from muntin.training.trainer import Trainer
from muntin.training.weights import load_initial_weights, new_model

SPLIT_LIST = "splits.csv"
"""File in a run's folder that lists the pictures of each split."""


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
    result: dict[str, Any] | None
    """The validation of the result's weights: of an ended run the best one; None if there is none."""
    notes: tuple[str, ...]
    splits: dict[str, int]
    """Pictures, or windows of one, of each split."""


def fit(
    recipe: Recipe | Path | str,
    *,
    directory: Path | str | None = None,
    root: Path | str | None = None,
    resume: bool = False,
    progress: bool | FitReport = True,
    check: bool = True,
) -> FitResult:
    """Train by a recipe: a `Recipe`, or the path of a YAML file.

    `directory`: the run's folder, by default `runs/NAME`; refused while another process trains in it. `root`: the folder at which relative
    paths of the recipe start, by default the file's own or the current one. `resume`: continue from the newest checkpoint, and refuse a
    directory without one; False refuses a directory with one. Changed keys of `training` (except `gate_budget` and `optimizer`) are noted
    and apply from this step on. Ctrl-C ends the run after the step in progress, with a checkpoint. Writes `checkpoints/`, `metrics.jsonl`,
    `splits.csv` (which picture is in which split) and TensorBoard events. `progress`: True shows a bar on a terminal, and elsewhere a line
    every half minute; False shows nothing; a function is called with each `FitProgress` instead. `check`: open every image of the
    data before the first step. Raises kinds of `MuntinError`.
    """
    if not isinstance(recipe, Recipe):
        root = Path(recipe).resolve().parent if root is None else root
        recipe = load_recipe(recipe)
    directory, root = Path(directory or Path("runs") / recipe.name), Path(root or ".").resolve()
    with joined_processes() as ranks, held_folder(directory, "muntin fit", ranks) as notes:
        resume = resume or (ranks.any(restarted()) and bool(checkpoints_in(directory / "checkpoints")))
        with shown_fit(recipe.task, progress if ranks.first else False) as report:
            return _fit(recipe, directory, root, resume, report, list(notes), ranks, check)


def held_folder(folder: Path, work: str, ranks: Ranks) -> AbstractContextManager[tuple[str, ...]]:
    """Hold a folder for a run (see `folder_in_use`): of several processes the first one does it."""
    return folder_in_use(folder, work) if ranks.first else nullcontext(())


def _fit(
    recipe: Recipe, directory: Path, root: Path, resume: bool, report: FitReport, notes: list[str], ranks: Ranks, check: bool
) -> FitResult:  # fmt: skip
    trust_model(recipe.model.name)
    recipe = settled(recipe, root)
    start = find_start(directory, recipe, resume=resume, ranks=ranks, note=notes.append)
    if start is None and ranks.first and not restarted():
        forget_use(directory)
    precision = prepare_hardware(recipe.training, begun=None if start is None else start.state.precision, ranks=ranks)
    source = open_source(recipe.data, task=recipe.task, root=root)
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
    if recipe.training.gate_budget < 1:  # report an impossible budget before the data are checked
        image = torch.zeros(1, recipe.data.channels, recipe.data.crop, recipe.data.crop)
        GateClosing(model, model, image, keep=recipe.training.gate_budget)
    weights = None if start is not None else recipe.model.weights
    begun = () if weights is None else load_initial_weights(model, root / weights)
    teacher, taught = open_teacher(recipe, classes, root)
    precision = measured_precision(model, precision, recipe, classes, teacher=teacher, ranks=ranks)
    precision = check_maps(model, precision, crop=recipe.data.crop, channels=recipe.data.channels, requested=recipe.training.precision)

    def report_checked(done: int, total: int) -> None:
        report(FitProgress(kind="check", step=done, steps=total))

    # last: it may take minutes
    checked = (*source.check(report_checked), *check_unlabelled(recipe, root, report_checked)) if check and ranks.first else ()
    small = small_picture_notes(source.split("train"), task=recipe.task, crop=recipe.data.crop)
    notes += (*source.notes, *checked, *small, *unsuited, *begun, *taught, *precision.notes)
    if ranks.first:
        write_splits(directory / SPLIT_LIST, source)
    weights_K = class_weights(recipe.training, source)
    notes += weights_note(weights_K, source)
    trainer = Trainer(
        model, recipe.training, task=recipe.task, precision=precision, class_weights=weights_K, teacher=teacher,
        distillation=0.0 if recipe.teacher is None else recipe.teacher.weight, seed=recipe.seed, ranks=ranks,
    )  # fmt: skip
    training = Training(trainer, recipe, source, directory=directory, root=root, start=start, report=report)
    for note in notes:
        report(FitProgress(kind="note", step=training.step, steps=training.steps, note=note))
    first_step = training.step
    with Interruption(answers=ranks.first) as interruption:
        path = training.run(interruption)
    if training.finished:
        if start is not None and training.step == first_step:
            training.note(f"ended at step {first_step} before, nothing was trained: to go on, raise training.steps (or minutes, patience)")
        worse = worse_than_input(training.result)
        poor = () if training.collapsed else poor_classes([] if training.result is None else [training.result])
        for note in (*ended_early(recipe.training, training.step, training.validation), *poor, *worse):
            training.note(note)
    return FitResult(
        directory=directory, checkpoint=path, step=training.step, steps=training.steps, interrupted=not training.finished,
        stop_requested=interruption.requested, precision=f"{precision.name} on {precision.device}: {precision.reason}",
        seconds=training.seconds, waiting=training.feed.waiting, workers=training.feed.workers, validation=training.validation,
        result=training.result, notes=(*notes, *training.notes), splits={name: len(source.split(name)) for name in SPLITS},
    )  # fmt: skip


def write_splits(file: Path, source: Source) -> None:
    """Write which picture is in which split, as CSV with the columns split and picture."""
    rows = [(name, picture) for name in SPLITS for picture in source.split(name).names()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("split", "picture"), *rows])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, plain(text.getvalue()).encode())


def broken_off(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note if the training of a checkpoint ended before its last step or its validation, with the command that continues."""
    state, config = checkpoint.state, checkpoint.recipe.training
    if checkpoint.trial:
        return ()  # it is kept when it is trained
    command = "`muntin fit RECIPE --resume`" if state.update is None else "the same `muntin update`"
    if config.share_done(state.step, state.seconds) >= 1 or out_of_patience(config.patience, state.validation):
        return () if state.judged else (f"its last step was not validated: {command} does it",)
    newest = (checkpoints_in(checkpoint.path.parent) or [checkpoint.path])[-1]  # a copied checkpoint may have another name
    rest = f"{command} goes on" if newest.name == checkpoint.path.name else f"{newest.name} is there, too"
    return (f"step {state.step} of {config.steps_expected(state.step, state.seconds)}: {rest}",)


def ended_early(config: TrainingConfig, step: int, validation: Sequence[Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """A note on a run that its minutes, or its patience, ended before the recipe's steps."""
    if step < config.steps and out_of_patience(config.patience, validation):
        return (f"training.patience ({config.patience}) ended the run after {step:,} of the recipe's {config.steps:,} steps",)
    if config.minutes is None or step >= config.steps:
        return ()
    return (f"training.minutes ({config.minutes:g}) ended the run after {step:,} of the recipe's {config.steps:,} steps",)
