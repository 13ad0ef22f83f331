"""An accuracy budget for a run of `muntin fit`: data, loss and metric are those of its recipe.

training split -> calibration, and the training of each candidate (labels, and the FP32 model's answers)
validation     -> evaluate
test           -> holdout; without a test split the second half of the validation pictures, which evaluate then does not see
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.budgeting.budget import Budget
from muntin.budgeting.pipeline import CompressionResult, OpenBase, SearchReport, compress
from muntin.compression.loading import load_model
from muntin.compression.rewrite import EVERY
from muntin.compression.stages import trained_steps
from muntin.data import Crops
from muntin.data.batch_feed import prefetch, worker_count
from muntin.data.source import Samples, Source
from muntin.errors import CheckpointError, DataError
from muntin.models.eager import as_input
from muntin.training.checkpoint import Checkpoint, calibration_of, source_of
from muntin.training.config import CompressionConfig, QuantizationConfig
from muntin.training.evaluation import areas, predictions, tile_of
from muntin.training.loss import class_weights, loss_of
from muntin.training.precision import resolve_precision
from muntin.training.recipe import Recipe
from muntin.training.restoration.evaluation import picture_psnrs

FOLDER = "budget"
"""Folder of the trials in a run's folder."""
SEED = 104729
"""Added to the recipe's seed, so that candidates learn from other crops than `fit`."""


def compress_run(
    checkpoint: Checkpoint,
    budget: Budget,
    folder: Path,
    *,
    progress: SearchReport = lambda progress: None,
    plans: OpenBase | None = None,
) -> CompressionResult:
    """Find the smallest or fastest form of a run's model within a budget (`muntin.compress`), by the recipe's section `budget`.

    `plans`: as of `compress`. Without steps in that section, each candidate is trained for as many steps as the three stages together:
    shares of the steps that the run took. Raises `CheckpointError` for a model that is compressed already, `DataError` for too few
    validation pictures.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} is compressed already: give the checkpoint of `muntin fit` that it was made from")
    recipe, source = checkpoint.recipe, source_of(checkpoint)
    stages, config = recipe.compression, recipe.budget
    steps = config.steps
    if steps is None:
        steps = max(1, round((stages.recover.share + stages.quantize.share + stages.mix.share) * trained_steps(checkpoint)))
    rate = stages.mix.learning_rate if config.learning_rate is None else config.learning_rate
    model = load_model(checkpoint)
    judged, held_out = _splits(source)
    training: dict[str, Any] = {}
    if steps:
        weights = class_weights(recipe.training, source)
        measure = loss_of(recipe.training, task=recipe.task, weights=weights, distillation=stages.distillation)
        data = _Lessons(checkpoint, source, model, steps)
        training = {"finetune": data, "loss": lambda scores, targets: measure(scores, *targets)}
    tile = tile_of(recipe.data.crop)
    ranks = stages.low_rank
    result = compress(
        model, calibration=calibration_of(checkpoint, source), evaluate=_metric(judged, tile, recipe.task), budget=budget,
        holdout=_metric(held_out, tile, recipe.task), folder=folder, signature=checkpoint.signature,
        recipe=config.model_copy(update={"steps": steps, "learning_rate": rate}),
        settings={"recipe": recipe.model_dump(mode="json", exclude={"budget", "update"})}, seed=recipe.seed, progress=progress,
        step_seconds=checkpoint.state.seconds / max(1, checkpoint.state.step), keep=(*stages.keep, *recipe.quantization.keep),
        dense=EVERY if ranks is None else ranks.keep, plans=plans, **training,
    )  # fmt: skip
    return replace(result, notes=(*result.notes, *_unused(recipe)))


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
    return (f"not used with a budget, which chooses ranks and bits itself: {', '.join(names)}",) if names else ()


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


def _metric(samples: Samples, tile: int, task: str) -> Callable[[Any], Any]:
    """The samples of the score of an artefact: areas of bands of pictures for segment, 1 or 0 for each picture for classify, its
    PSNR in dB for restore.
    """

    def measure(deployed: Any) -> Any:
        if task == "segment":
            return areas(deployed.session, samples, tile=tile)
        if task == "restore":
            return picture_psnrs(deployed.session, samples, tile=tile)
        return [float(labels[0] == sample.target) for sample, labels in predictions(deployed.session, samples, tile=tile)]

    return measure


class _Lessons:
    """Batches (images, (targets, the FP32 model's scores)) for `steps` steps, the same in every iteration."""

    def __init__(self, checkpoint: Checkpoint, source: Source, teacher: nn.Module, steps: int) -> None:
        recipe = checkpoint.recipe
        self.teacher, self.steps, self.workers = teacher, steps, recipe.data.workers
        self.crops = Crops(
            source.split("train"), task=recipe.task, crop=recipe.data.crop, batch_size=recipe.training.batch_size, seed=recipe.seed + SEED,
            augmentation=recipe.data.augmentation, rare=recipe.data.rare, classes=len(source.classes),
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
