"""An accuracy budget for a run of `muntin fit`: data, loss and metric are those of its recipe.

training split -> calibration, and the training of each candidate (labels, and the FP32 model's answers)
validation     -> evaluate
test           -> holdout; without a test split the second half of the validation pictures, which evaluate then does not see
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.budgeting.budget import Budget
from muntin.budgeting.pipeline import TRIALS, CompressionResult, SearchReport, compress
from muntin.compression.loading import load_model
from muntin.data import Crops
from muntin.data.batch_feed import prefetch, worker_count
from muntin.data.source import Samples, Source
from muntin.errors import CheckpointError, DataError
from muntin.models.eager import as_input
from muntin.training.checkpoint import Checkpoint, calibration_of, source_of
from muntin.training.evaluation import evaluate, predictions, tile_of
from muntin.training.loss import Loss
from muntin.training.precision import resolve_precision

FOLDER = "budget"
"""Folder of the trials in a run's folder."""
SEED = 104729
"""Added to the recipe's seed, so that candidates learn from other crops than `fit`."""


def compress_run(
    checkpoint: Checkpoint,
    budget: Budget,
    folder: Path,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    minutes: float | None = None,
    trials: int = TRIALS,
    progress: SearchReport = lambda progress: None,
) -> CompressionResult:
    """Find the smallest or fastest form of a run's model within a budget (`muntin.compress`).

    `steps`: of the training of each candidate; 0: none; None: the share of the recipe's steps that its three stages would take.
    `learning_rate`: None for that of the recipe's last stage. Raises `CheckpointError` for a model that is compressed already, `DataError`
    for too few validation pictures.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    recipe, source = checkpoint.recipe, source_of(checkpoint)
    stages = recipe.compression
    if steps is None:
        steps = max(1, round((stages.recover.share + stages.quantize.share + stages.mix.share) * recipe.training.steps))
    model = load_model(checkpoint)
    judged, held_out = _splits(source)
    training: dict[str, Any] = {}
    if steps:
        measure = Loss(task=recipe.task, overlap=recipe.training.overlap_loss, distillation=stages.distillation)
        rate = stages.mix.learning_rate if learning_rate is None else learning_rate
        data = _Lessons(checkpoint, source, model, steps)
        training = {"finetune": data, "loss": lambda scores, targets: measure(scores, *targets), "steps": steps, "learning_rate": rate}
    tile = tile_of(recipe.data.crop)
    return compress(
        model, calibration=calibration_of(checkpoint, source), evaluate=_metric(judged, tile), budget=budget,
        holdout=_metric(held_out, tile, each=recipe.task == "classify"), folder=folder, minutes=minutes, trials=trials,
        signature=checkpoint.signature, settings={"recipe": recipe.model_dump(mode="json")}, seed=recipe.seed, progress=progress,
        **training,
    )  # fmt: skip


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


def _metric(samples: Samples, tile: int, *, each: bool = False) -> Callable[[Any], Any]:
    """Mean IoU or accuracy of an artefact on samples. `each`: of a classifier, 1 or 0 for each sample."""

    def measure(deployed: Any) -> Any:
        if not each:
            return evaluate(deployed.session, samples, tile=tile).score
        return [float(labels[0] == sample.target) for sample, labels in predictions(deployed.session, samples, tile=tile)]

    return measure


class _Lessons:
    """Batches (images, (targets, the FP32 model's scores)) for `steps` steps, the same in every iteration."""

    def __init__(self, checkpoint: Checkpoint, source: Source, teacher: nn.Module, steps: int) -> None:
        recipe = checkpoint.recipe
        self.teacher, self.steps, self.workers = teacher, steps, recipe.data.workers
        self.crops = Crops(
            source.split("train"), task=recipe.task, crop=recipe.data.crop, batch_size=recipe.training.batch_size, seed=recipe.seed + SEED,
            augmentation=recipe.data.augmentation, rare=recipe.data.rare,
        )  # fmt: skip
        self.precision = resolve_precision(recipe.training.precision, next(teacher.parameters()).device.type)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        with closing(prefetch(self.crops.batch, 0, self.steps, workers=worker_count(self.workers, device="cpu"))) as batches:
            for _, (images_BCHW, target) in batches:
                with torch.no_grad(), self.precision.autocast():
                    scores: Tensor = self.teacher(as_input(self.teacher, images_BCHW))
                yield images_BCHW, (target, scores)
