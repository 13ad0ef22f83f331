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
from muntin.budgeting.candidate import StepReport
from muntin.budgeting.display import shown_search
from muntin.budgeting.forecast import QAT_STEPS, OutOfTime, SearchForecast
from muntin.budgeting.pipeline import OpenBase, compress, search_forecast
from muntin.budgeting.result import CompressionResult, SearchProgress, SearchReport
from muntin.budgeting.trials import REFERENCE, SAMPLES, recorded_steps
from muntin.compression.calibration import calibration_list
from muntin.compression.loading import load_model
from muntin.compression.rewrite import EVERY
from muntin.compression.stages import trained_steps
from muntin.data.source import Samples, Source
from muntin.errors import CheckpointError, DataError
from muntin.models.eager import eager_copy
from muntin.tasks.learning import LEARNING
from muntin.text import count, list_some
from muntin.training.checkpoint import Checkpoint, calibration_of, checkpoints_in, newest_sound, source_of
from muntin.training.config import BudgetConfig, CompressionConfig, QuantizationConfig
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

FOLDER = "budget"
"""Folder of the trials in a run's folder."""
TRAINING_SHARE, TRIALS = 0.4, 3
"""Largest share of a time limit for the training of so many trials, the fewest that a search should try."""
SEED = 104729
"""Added to the recipe's seed, so that candidates learn from other crops than `fit`."""


def compress_run(
    checkpoint: Checkpoint,
    budget: Budget,
    folder: Path,
    *,
    progress: bool | SearchReport = True,
    plans: OpenBase | None = None,
) -> CompressionResult:
    """Find the smallest or fastest form of a run's model within a budget (`muntin.compress`), by the recipe's section `budget`.

    `plans`: as of `compress`. Candidates are trained as by a stage of the recipe (`RecipeCourse`), without steps in the section `budget`
    for as many as the three stages together, or fewer with a time limit (`_config`). Ctrl-C ends after the step in progress. Raises
    `CheckpointError` for a model that is compressed already, `DataError` for too few validation pictures.
    """
    config, source = _config(checkpoint, folder), source_of(checkpoint)
    recipe = checkpoint.recipe
    stages, steps, rate = recipe.compression, config.steps or 0, config.learning_rate or 0.0
    model = load_model(checkpoint)
    judged, held_out = _splits(source)
    course = RecipeCourse(checkpoint, source, steps=steps, learning_rate=rate) if steps else None
    tile = tile_of(recipe.data.crop)
    ranks = stages.low_rank
    with shown_search(budget.objective, progress or (lambda state: None)) as report:
        result = compress(
            model, calibration=calibration_of(checkpoint, source), evaluate=_metric(judged, tile, recipe.task), budget=budget,
            holdout=_metric(held_out, tile, recipe.task), folder=folder, signature=checkpoint.signature, recipe=config,
            settings={"recipe": recipe.model_dump(mode="json", exclude={"budget", "update"})}, seed=recipe.seed,
            progress=_with_samples(report, judged, held_out), step_seconds=_step_seconds(checkpoint),
            keep=(*stages.keep, *recipe.quantization.keep), dense=EVERY if ranks is None else ranks.keep, plans=plans, course=course,
        )  # fmt: skip
    absent = _absent_classes(folder, [one.name for one in checkpoint.signature.classes]) if recipe.answer.masks else ()
    return replace(result, notes=(*result.notes, *absent, *(() if course is None else course.notes), *_unused(recipe)))


def _absent_classes(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return a note on classes that the images of `evaluate` do not hold, from the reference's samples."""
    areas_NK2 = np.load(folder / REFERENCE / SAMPLES, allow_pickle=False)
    absent = [name for name, union in zip(names, areas_NK2[..., 1].sum(0), strict=True) if not union]
    return (f"the images that judge candidates hold no {list_some(absent)}: the mIoU here leaves that out",) if absent else ()


def _config(checkpoint: Checkpoint, folder: Path) -> BudgetConfig:
    """Return the recipe's section `budget` with steps and learning rate filled in. Raises `CheckpointError` for a compressed model.

    Unset steps are those of the search in the folder, or of the three stages. With a time limit there are fewer, down to a quarter, so that
    the training of three trials takes at most `TRAINING_SHARE` of it.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    stages, config = checkpoint.recipe.compression, checkpoint.recipe.budget
    steps = config.steps
    if steps is None:
        steps = recorded_steps(folder)
    if steps is None:
        steps = max(1, round((stages.recover.share + stages.quantize.share + stages.mix.share) * trained_steps(checkpoint)))
        if config.minutes:
            fitting = TRAINING_SHARE * 60 * config.minutes / TRIALS / (QAT_STEPS * max(_step_seconds(checkpoint), 1e-9))
            steps = max(1, steps // 4, min(steps, int(fitting)))
    rate = stages.mix.learning_rate if config.learning_rate is None else config.learning_rate
    return config.model_copy(update={"steps": steps, "learning_rate": rate})


def _step_seconds(checkpoint: Checkpoint) -> float:
    return checkpoint.state.seconds / max(1, checkpoint.state.step)


def forecast_run(checkpoint: Checkpoint, folder: Path) -> SearchForecast:
    """Return what `compress_run` is going to do. Writes nothing."""
    config, source = _config(checkpoint, folder), source_of(checkpoint)
    course = RecipeCourse(checkpoint, source, steps=config.steps, learning_rate=config.learning_rate or 0.0) if config.steps else None
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
    """A note on values of the recipe that only the stages, or export, use."""
    stages, plain = recipe.compression, CompressionConfig()
    sections = [
        ("compression", stages, plain, ("weight_bits", "average_bits", "average")),
        ("compression.low_rank", stages.low_rank, plain.low_rank, ("criterion", "parameters", "macs", "threshold", "multiple")),
        ("quantization", recipe.quantization, QuantizationConfig(), ("min_sqnr_db",)),
    ]  # fmt: skip
    names = [
        f"{section}.{key}"
        for section, own, default, keys in sections
        for key in keys
        if own is not None and getattr(own, key) != getattr(default, key)
    ]
    notes = [f"not used with a budget, which chooses ranks and bits itself: {', '.join(names)}"] if names else []
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
    """A `Course` by a run's recipe, as that of a stage: its optimiser, precision, use of memory, recovery, averages, unlabelled pictures.

    The learning rate falls once. Candidates see other crops than `fit` drew, each the same ones. An interrupted training goes on from its
    newest checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, source: Source, *, steps: int, learning_rate: float) -> None:
        recipe = checkpoint.recipe
        self.checkpoint, self.source, self.steps = checkpoint, source, steps
        alone: dict[str, Any] = {"minutes": None, "patience": None, "compile": False, "sharding": "none"}
        alone |= {"gate_budget": 1.0, "validate_every": steps}  # closed channels are cut before
        rates = {"learning_rate": learning_rate, "final_learning_rate": 0.0, "average": recipe.compression.average}
        self.config = recipe.training.model_copy(update={"steps": steps, **alone, **rates})
        precision = prepare_hardware(self.config, begun=checkpoint.state.precision)
        crop, channels = recipe.data.crop, recipe.data.channels
        model = load_model(checkpoint)
        self.precision = check_maps(model, precision, crop=crop, channels=channels, requested=self.config.precision)
        self.class_weights = class_weights(recipe.training, source)
        self.shrunk: MemoryUse | None = None
        """How an earlier candidate had to use memory, if it was less than the recipe allows."""
        self.notes: list[str] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"loss": True, "learning_rate": self.config.learning_rate, "training": "by the recipe"}

    def train(self, model: nn.Module, teacher: nn.Module, *, seed: int, folder: Path, report: StepReport) -> float:
        recipe, written = self.checkpoint.recipe, folder / "checkpoints"
        start = newest_sound(written, note=self.notes.append) if checkpoints_in(written) else None
        trainer = Trainer(
            eager_copy(model), self.config, task=recipe.task, precision=self.precision, teacher=eager_copy(teacher),
            distillation=recipe.compression.distillation, class_weights=self.class_weights, seed=seed,
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

        root = Path(self.checkpoint.state.root)
        training = _CandidateRun(
            trainer, recipe, self.source, directory=folder, root=root, start=start, report=tell, seed=recipe.seed + SEED
        )
        with interruption:
            training.run(interruption)
        if late:
            raise OutOfTime
        if interruption.requested:
            raise KeyboardInterrupt
        self.shrunk = trainer.shrunk or self.shrunk
        self.notes += (f"trial {int(folder.name)}: {note}" for note in training.notes)
        load_weights(model, trainer.average.tensors(), folder)
        model.eval()
        return 0.0 if start is None else start.state.seconds
