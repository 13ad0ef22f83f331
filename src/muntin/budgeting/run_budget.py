"""An accuracy budget for a run of `muntin fit`: data, loss and metric are those of its recipe.

training split -> calibration, and the training of each candidate (labels, and the FP32 model's answers)
validation     -> evaluate
test           -> holdout; without a test split the second half of the validation pictures, which evaluate then does not see
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from muntin.artifact.answers import Task
from muntin.budgeting.budget import Budget
from muntin.budgeting.candidate import CourseStage, StepReport, course_stages
from muntin.budgeting.display import shown_search
from muntin.budgeting.forecast import QAT_STEPS, OutOfTime, SearchForecast
from muntin.budgeting.pipeline import OpenBase, compress, search_forecast
from muntin.budgeting.result import CompressionResult, SearchProgress, SearchReport
from muntin.budgeting.trials import REFERENCE, SAMPLES, recorded_steps
from muntin.compression.calibration import calibration_list
from muntin.compression.loading import load_model
from muntin.compression.structure import structure_fields
from muntin.data.source import Samples, Source
from muntin.errors import CheckpointError, DataError
from muntin.models.compression_record import CompressionRecord
from muntin.models.eager import eager_copy
from muntin.tasks.learning import LEARNING
from muntin.text import count, list_some
from muntin.training.checkpoint import Checkpoint, calibration_of, checkpoints_in, newest_sound, source_of
from muntin.training.config import CompressionConfig, QuantizationConfig, TrainingConfig
from muntin.training.evaluation import tile_of
from muntin.training.loop import Training
from muntin.training.loss import class_weights
from muntin.training.model_checks import check_maps
from muntin.training.precision import prepare_hardware
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.metrics_log import MetricsLog
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import Recipe
from muntin.training.recovery.out_of_memory import MemoryUse
from muntin.training.trainer import Trainer
from muntin.training.weights import load_weights

FOLDER = "compressed"
"""Folder of the trials in a run's folder."""
TRAINING_SHARE, TRIALS = 0.4, 3
"""Largest share of a time limit for the training of so many trials, the fewest that a search should try."""
SEED = 104729
"""Added to the recipe's seed, so that candidates learn from other crops than `fit`."""


def compress_run(
    checkpoint: Checkpoint,
    budget: Budget | None = None,
    folder: Path | None = None,
    *,
    progress: bool | SearchReport = True,
    plans: OpenBase | None = None,
) -> CompressionResult:
    """Find the smallest or fastest form of a run's model within a budget (`muntin.compress`), by the recipe's section `compression`.

    `budget`: by default the recipe's (`budget_of`). `folder`: by default `compressed` in the run's. `plans`: as of `compress`. Candidates
    are trained by the recipe (`RecipeCourse`), without steps in that section by the shares of its stages, or fewer with a time limit
    (`_config`). Ctrl-C ends after the step in progress. Raises `CheckpointError` for a model that is compressed already, `DataError` for
    too few validation pictures.
    """
    budget, folder = budget or budget_of(checkpoint.recipe), folder or checkpoint.path.parent.parent / FOLDER
    config, source, recipe = _config(checkpoint, folder), source_of(checkpoint), checkpoint.recipe
    model = load_model(checkpoint)
    judged, held_out = _splits(source)
    course = RecipeCourse(checkpoint, source, config) if config.steps else None
    tile = tile_of(recipe.data.crop)
    with shown_search(budget.objective, progress or (lambda state: None)) as report:
        result = compress(
            model, calibration=calibration_of(checkpoint, source), evaluate=_metric(judged, tile, recipe.task), budget=budget,
            holdout=_metric(held_out, tile, recipe.task), folder=folder, signature=checkpoint.signature, recipe=config,
            settings={"recipe": recipe.model_dump(mode="json", exclude={"compression", "update"})}, seed=recipe.seed,
            progress=_with_samples(report, judged, held_out), step_seconds=_step_seconds(checkpoint),
            keep=(*config.keep, *recipe.quantization.keep), dense=config.dense, plans=plans, course=course,
        )  # fmt: skip
    absent = _absent_classes(folder, [one.name for one in checkpoint.signature.classes]) if recipe.answer.masks else ()
    return replace(result, notes=(*result.notes, *absent, *(() if course is None else course.notes), *_unused(recipe)))


def budget_of(recipe: Recipe) -> Budget:
    """The budget of a recipe's section `compression`; without `max_drop` the task's margin of scores that do not count."""
    config = recipe.compression
    drop = recipe.answer.score.margin if config.max_drop is None else config.max_drop
    return Budget(max_drop=drop, objective=config.objective, confidence=config.confidence)


def _absent_classes(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on classes that the images of `evaluate` do not hold, from the reference's samples."""
    areas_NK2 = np.load(folder / REFERENCE / SAMPLES, allow_pickle=False)
    absent = [name for name, union in zip(names, areas_NK2[..., 1].sum(0), strict=True) if not union]
    return (f"the images that judge candidates hold no {list_some(absent)}: the mIoU here leaves that out",) if absent else ()


def _config(checkpoint: Checkpoint, folder: Path) -> CompressionConfig:
    """Return the recipe's section `compression` with steps and learning rate filled in. Raises `CheckpointError` for a compressed model.

    Unset steps are those of the search in the folder, or the shares of the stages. With a time limit there are fewer, down to a quarter, so
    that the training of three trials takes at most `TRAINING_SHARE` of it.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    config = checkpoint.recipe.compression
    steps = recorded_steps(folder) if config.steps is None else config.steps
    if steps is None:
        steps = max(1, round((config.recover.share + config.quantize.share + config.mix.share) * checkpoint.trained_steps))
        if config.minutes:
            fitting = TRAINING_SHARE * 60 * config.minutes / TRIALS / (QAT_STEPS * max(_step_seconds(checkpoint), 1e-9))
            steps = max(1, steps // 4, min(steps, int(fitting)))
    rate = config.mix.learning_rate if config.learning_rate is None else config.learning_rate
    return config.model_copy(update={"steps": steps, "learning_rate": rate})


def _step_seconds(checkpoint: Checkpoint) -> float:
    return checkpoint.state.seconds / max(1, checkpoint.state.step)


def forecast_run(checkpoint: Checkpoint, folder: Path) -> SearchForecast:
    """Return what `compress_run` is going to do. Writes nothing."""
    config, source = _config(checkpoint, folder), source_of(checkpoint)
    course = RecipeCourse(checkpoint, source, config) if config.steps else None
    batches = calibration_list(calibration_of(checkpoint, source))
    found = search_forecast(load_model(checkpoint), batches, course, config, folder, step_seconds=_step_seconds(checkpoint))
    return replace(found, samples=_samples_text(*_splits(source)))


def _with_samples(progress: SearchReport, judged: Samples, held_out: Samples) -> SearchReport:
    """Return a report that adds the number of images to the forecast."""

    def report(state: SearchProgress) -> None:
        if state.forecast is not None:
            state = replace(state, forecast=replace(state.forecast, samples=_samples_text(judged, held_out)))
        progress(state)

    return report


def _samples_text(judged: Samples, held_out: Samples) -> str:
    return f"candidates are judged on {count(len(judged), 'image')}; the final figures are of {len(held_out)} others"


def _unused(recipe: Recipe) -> tuple[str, ...]:
    """Notes on values of the recipe that candidates do not use."""
    notes = []
    if recipe.quantization.min_sqnr_db != QuantizationConfig().min_sqnr_db:
        notes.append("quantization.min_sqnr_db is for `muntin export` and plain INT8: the search chooses the bits of candidates itself")
    if recipe.training.compile:
        notes.append("training.compile is for fit: candidates are trained without it")
    return tuple(notes)


def _splits(source: Source) -> tuple[Samples, Samples]:
    validation, test = source.split("validation"), source.split("test")
    if len(test):
        return validation, test
    if len(validation) < 2:
        raise DataError(
            f"{len(validation)} validation pictures and no test pictures: the search needs some to judge by, and others for the figures "
            "that are reported: add a test split, or more validation pictures"
        )
    return validation.select(range(0, len(validation), 2)), validation.select(range(1, len(validation), 2))


def _metric(samples: Samples, tile: int, task: Task) -> Callable[[Any], Any]:
    """Return a function from an artifact to its scores, as of `Learning.measure`."""
    return lambda deployed: LEARNING[task].measure(deployed.session, samples, tile=tile)


class _CandidateRun(Training):
    """Training of a candidate, whose artefact is scored afterwards: nothing is validated."""

    keeps_best = False

    def _judge(self, log: MetricsLog, samples: Samples, validation: Samples) -> None:
        with self.trainer.average.whole():
            self._renew_statistics(samples)


class RecipeCourse:
    """A `Course` by a run's recipe: its optimiser, precision, use of memory, recovery, averages, unlabelled pictures.

    `config`: with steps and learning rate. Candidates see other crops than `fit` drew, each the same ones. An interrupted training goes on
    from its newest checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, source: Source, config: CompressionConfig) -> None:
        self.checkpoint, self.source, self.compression = checkpoint, source, config
        self.stages = course_stages(config, config.steps or 0, config.learning_rate or config.mix.learning_rate)
        recipe = checkpoint.recipe
        precision = prepare_hardware(self._config(self.stages[-1]), begun=checkpoint.state.precision)
        crop, channels = recipe.data.crop, recipe.data.channels
        self.precision = check_maps(
            load_model(checkpoint), precision, crop=crop, channels=channels, requested=recipe.training.precision
        )  # fmt: skip
        self.class_weights = class_weights(recipe.training, source)
        self.shrunk: MemoryUse | None = None
        """How an earlier candidate had to use memory, if it was less than the recipe allows."""
        self.notes: list[str] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        config = self.compression
        return {"training": "by the recipe", "distillation": config.distillation, "average": config.average}

    def _config(self, stage: CourseStage) -> TrainingConfig:
        alone: dict[str, Any] = {"minutes": None, "patience": None, "compile": False, "sharding": "none"}
        alone |= {"gate_budget": 1.0, "validate_every": stage.steps}  # closed channels are cut before
        rates = {"learning_rate": stage.learning_rate, "final_learning_rate": stage.final_learning_rate}
        return self.checkpoint.recipe.training.model_copy(
            update={"steps": stage.steps, "average": self.compression.average, **alone, **rates}
        )  # fmt: skip

    def train(self, stage: CourseStage, model: nn.Module, teacher: nn.Module, *, seed: int, folder: Path, report: StepReport) -> float:
        recipe, written = self.checkpoint.recipe, folder / "checkpoints"
        start = newest_sound(written, note=self.notes.append) if checkpoints_in(written) else None
        trainer = Trainer(
            eager_copy(model), self._config(stage), task=recipe.task, precision=self.precision, teacher=eager_copy(teacher),
            distillation=self.compression.distillation, class_weights=self.class_weights, seed=seed,
        )  # fmt: skip
        trainer.remember(self.shrunk)

        late, interruption = False, Interruption()

        def tell(progress: FitProgress) -> None:
            nonlocal late
            if progress.kind == "step":
                try:
                    report(progress.step, progress.loss or 0.0)
                except OutOfTime:  # training ends after this step, with a checkpoint
                    late = interruption.requested = True

        state = self.checkpoint.state
        training = _CandidateRun(
            trainer, recipe, self.source, directory=folder, root=Path(state.root), start=start, report=tell, seed=recipe.seed + SEED,
            compression=CompressionRecord(origin=state.weights, steps=self.checkpoint.trained_steps, **structure_fields(model)),
        )  # fmt: skip
        with interruption:
            training.run(interruption)
        if late:
            raise OutOfTime
        if interruption.requested:
            raise KeyboardInterrupt
        self.shrunk = trainer.shrunk or self.shrunk
        self.notes += (f"trial {int(folder.parent.name)}: {note}" for note in training.notes)
        load_weights(model, trainer.average.tensors(), folder)
        model.eval()
        return 0.0 if start is None else start.state.seconds
