"""Pictures without labels in training: their share of each batch, and a loss in which they count for the distance to the teacher alone.

Axes: B images, K classes, H W map, S sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muntin.artifact.answers import ANSWERS, Task
from muntin.data import Crops, calibration_batches
from muntin.data.batch_feed import ImageBatch
from muntin.data.batches import BatchMaker
from muntin.data.source import CheckProgress, SampleCache, Samples
from muntin.errors import DataError, RecipeError
from muntin.images import IGNORED, image_size, read_image
from muntin.images.listing import images_in
from muntin.tasks.samples import Sample
from muntin.text import count
from muntin.training.loss import Loss
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer

UNLABELLED = -1
"""Target of a picture, or a pixel, without a label. 255, ignored, counts for no loss at all."""
_SEED = 15485863
"""Added to the seed of the labelled crops for that of the others."""


class UnlabelledPictures(Samples):
    """The images in a folder and its subfolders (`images_in`), decoded on access; targets are 0. Raises DataError if there are none."""

    def __init__(self, folder: Path, *, task: Task, channels: int, cache_bytes: int) -> None:
        self.paths, self.notes = images_in(folder)
        if not self.paths:
            raise DataError(f"teacher.unlabelled {folder} holds no picture: put pictures into it, or leave it out")
        self._task, self._channels, self._cache = task, channels, SampleCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Sample:
        path = self.paths[index]
        return self._cache.get(index, lambda: self._read(path))

    def _read(self, path: Path) -> Sample:
        image = read_image(path, self._channels)
        return Sample(name=path.stem, image=image, target=0 if ANSWERS[self._task].one else np.zeros(image.shape[:2], np.uint8))

    def sizes(self) -> list[tuple[int, int]]:
        return [image_size(path) for path in self.paths]


class PartlyLabelledCrops:
    """Batches with `share` of their rows from pictures without labels, spread evenly; the other rows are the labelled batch's first ones.

    A batch depends on its step alone, as those of `labelled` and `unlabelled` do. `pictures`: the samples of `unlabelled`.
    """

    def __init__(self, labelled: BatchMaker, unlabelled: BatchMaker, *, batch_size: int, share: float, pictures: Samples) -> None:
        self.labelled, self.unlabelled, self.share, self.pictures = labelled, unlabelled, share, pictures
        before = [round(row * share) for row in range(batch_size + 1)]  # unlabelled rows before each row
        self.rows = [(before[row + 1] > before[row], before[row]) for row in range(batch_size)]
        """For each row: whether it has no label, and the number of such rows before it."""

    def batch(self, step: int, rows: slice = slice(None)) -> ImageBatch:
        """The batch of a step, or some rows of it; targets of pictures without labels are `UNLABELLED`, where not 255."""
        numbers = range(len(self.rows))[rows]
        bare = [self.rows[row][1] for row in numbers if self.rows[row][0]]
        known = [row - self.rows[row][1] for row in numbers if not self.rows[row][0]]
        parts = [maker.batch(step, slice(own[0], own[-1] + 1)) for maker, own in ((self.unlabelled, bare), (self.labelled, known)) if own]
        if bare:
            images, target = parts[0]
            padding = target == IGNORED if target.ndim > 1 else torch.zeros_like(target, dtype=torch.bool)
            shape = parts[1][1].shape[1:] if known else target.shape[1:]  # classes may be shares, (B, K)
            hidden = torch.full((len(bare), *shape), UNLABELLED, dtype=parts[-1][1].dtype)
            parts[0] = images, hidden.masked_fill(padding, IGNORED) if target.ndim > 1 else hidden
        images, target = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = sorted(range(len(numbers)), key=lambda place: not self.rows[numbers[place]][0])  # where each joined row belongs
        back = torch.tensor(order).argsort()
        return images[back].contiguous(memory_format=torch.channels_last), target[back]


@dataclass(frozen=True, kw_only=True)
class PartlyLabelled(Loss):
    """A loss of batches in which some pictures have no label (target `UNLABELLED`): they count for the distance to the teacher alone.

    All terms but the overlaps are means over the pixels or pictures of both kinds.
    """

    @property
    def _one(self) -> bool:
        return ANSWERS[self.task].one

    def totals(self, target: Tensor, classes: int) -> Tensor:
        labels, known_B = self._labels(target)
        totals = super().totals(labels, classes)
        bare = (~known_B).sum() if self._one else (target == UNLABELLED).sum()
        return torch.cat([totals[:1] + bare, totals[1:]])

    def sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        labels, known_B = self._labels(target)
        sums_S = super().sums(scores if known_B.all() or not self._one else scores[known_B], labels)
        if teacher_scores is None:
            return sums_S
        return torch.cat([sums_S[:-1], self.in_parts(self.distance, [scores, target, teacher_scores])])

    def _labels(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The targets of the label's terms, and which pictures have one: pictures without are left out, pixels ignored."""
        known_B = target.reshape(len(target), -1)[:, 0] != UNLABELLED
        if self._one:
            return target[known_B], known_B
        return target.masked_fill(target == UNLABELLED, IGNORED), known_B


def add_unlabelled(crops: BatchMaker, trainer: Trainer, recipe: Recipe, root: Path, *, seed: int) -> BatchMaker:
    """Mix a recipe's pictures without labels into the batches of a trainer that has a teacher, and change its loss accordingly."""
    config = recipe.teacher
    if config is None or config.unlabelled is None or trainer.teacher is None or type(trainer.loss) not in (Loss, PartlyLabelled):
        return crops  # an update has a loss and a mix of its own
    batch_size = trainer.config.batch_size
    samples = open_unlabelled(recipe, root)
    assert samples is not None
    bare = Crops(
        samples, task=recipe.task, crop=recipe.data.crop, batch_size=batch_size, seed=seed + _SEED, augmentation=recipe.data.augmentation
    )
    if not isinstance(trainer.loss, PartlyLabelled):
        trainer.loss = PartlyLabelled(**{field.name: getattr(trainer.loss, field.name) for field in fields(trainer.loss)})
    return PartlyLabelledCrops(crops, bare, batch_size=batch_size, share=config.share, pictures=samples)


def check_unlabelled(recipe: Recipe, root: Path, progress: CheckProgress = lambda done, total: None) -> tuple[str, ...]:
    """Decode a recipe's pictures without labels once, and return a note on them. Raises DataError for a damaged one."""
    config = recipe.teacher
    if config is None or config.unlabelled is None:
        return ()
    rows = round(config.share * recipe.training.batch_size)
    if not rows:
        raise RecipeError(
            f"teacher.share {config.share:g} of training.batch_size {recipe.training.batch_size} is no picture: raise either of them"
        )
    samples = open_unlabelled(recipe, root)
    assert samples is not None
    for number in range(len(samples)):
        samples.load(number)
        progress(number + 1, len(samples))
    found = count(len(samples), "picture")
    shares = f"{found} without labels, {rows} of the {recipe.training.batch_size} crops of a batch"
    return (f"teacher.unlabelled {config.unlabelled}: {shares}", *samples.notes)


def open_unlabelled(recipe: Recipe, root: Path) -> UnlabelledPictures | None:
    """A recipe's pictures without labels; None if it has none."""
    config = recipe.teacher
    if config is None or config.unlabelled is None:
        return None
    folder, cache_bytes = root / config.unlabelled, recipe.data.cache_mib << 20
    return UnlabelledPictures(folder, task=recipe.task, channels=recipe.data.channels, cache_bytes=cache_bytes)


def plain_crops(samples: Samples, crops: BatchMaker, recipe: Recipe, *, count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Crops without augmentation for the statistics of norms, as `calibration_batches` yields them from `samples`.

    If `crops` are mixed, the rows of a batch are, too: statistics are of what the model was trained on.
    """
    data, bare = recipe.data, round(crops.share * batch_size) if isinstance(crops, PartlyLabelledCrops) else 0
    parts = [(samples, batch_size - bare)]
    if isinstance(crops, PartlyLabelledCrops):
        parts.append((crops.pictures, bare))
    batches = math.ceil(count / batch_size)
    made = [
        calibration_batches(own, crop=data.crop, count=min(count, batches * rows), batch_size=rows, seed=seed, task=recipe.task)
        for own, rows in parts
        if rows
    ]
    for rows in zip(*made, strict=True):
        yield torch.cat(rows).contiguous(memory_format=torch.channels_last)
