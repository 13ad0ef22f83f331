"""Training on masks, and their scores.

Axes: B images, K classes, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from muntin.artifact import ClassInfo
from muntin.images import IGNORED, overlay, to_rgb
from muntin.images.opening import UInt8
from muntin.images.rasters import bands
from muntin.runtime.tiles import Predictor, label_bands, predict
from muntin.tasks.base import Floats
from muntin.tasks.base_learning import Integers, LossTerms, divergence
from muntin.tasks.crops import Draw, changed, recolored, window
from muntin.tasks.labels import Confusion, LabelLearning
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging
from muntin.tasks.segment.loss import SegmentSums, sums_by_class
from muntin.tasks.segment.pictures import write_examples, write_worst
from muntin.tasks.segment.scores import MaskScores, areas

WHOLE_PICTURES = 100
"""Pictures from which whole ones are the samples of a score; fewer are cut into blocks of half the training crop."""


class MaskLearning(LabelLearning):
    """Crops with a class for each pixel, 255 = ignored. What lies outside a picture is 0 in the image and ignored."""

    mixtures: ClassVar = ("mosaic",)
    small: ClassVar = "the rest of a crop is black and ignored"
    overlaps: ClassVar = True
    made: ClassVar = MaskScores
    axis: ClassVar = -2

    def window_side(self, crop: int, zoom: float, height: int, width: int) -> int:
        return max(1, round(crop / zoom))

    def cut(self, sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
        """The target is uint8 (crop, crop)."""
        image_CHW = changed(partial(window, sample.image, fill=0), draw, crop, InterpolationMode.BILINEAR)
        # NEAREST would sample half a step to the upper left of where bilinear samples
        (target_HW,) = changed(
            lambda place: window(sample.labels, place, fill=IGNORED)[..., None], draw, crop, InterpolationMode.NEAREST_EXACT, fill=IGNORED
        )
        return recolored(image_CHW, draw), target_HW

    def random_target(self, images_BCHW: Tensor, *, classes: int, scale: int) -> Tensor:
        return torch.randint(0, classes, (len(images_BCHW), *images_BCHW.shape[2:]))

    def counted(self, target: Tensor) -> Tensor:
        return (target != IGNORED).flatten(1).sum(1)

    def class_counts(self, target: Tensor, classes: int) -> Tensor:
        counted_BN = (target != IGNORED).flatten(1)
        return sums_by_class(counted_BN, target.flatten(1).masked_fill(~counted_BN, 0), classes)

    def sums(self, scores: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
        """The cross-entropy, and with `overlap` the probability of the true class and all probability of each class."""
        sums_S: Tensor = SegmentSums.apply(  # type: ignore[no-untyped-call]
            scores.contiguous().flatten(2), target.flatten(1), terms.overlap, terms.gamma, terms.weights
        )
        return sums_S

    def distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return divergence(scores, teacher_scores)
        return (divergence(scores, teacher_scores, reduction="none").sum(1) * (target != IGNORED)).sum()

    def mean_distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            return super().mean_distance(scores, teacher_scores)
        return self.distance(scores, teacher_scores, target) / (target != IGNORED).sum().clamp_min(1)

    def answer(self, session: Predictor, sample: Sample, side: int | None) -> NDArray[Any]:
        """The labels, (H, W)."""
        labels: NDArray[Any] = predict(session, sample.image, tile=side)
        return labels

    def truth(self, sample: Sample) -> Iterator[tuple[int, NDArray[Any]]]:
        return bands(sample.labels)

    def add(self, confusion: Confusion, session: Predictor, sample: Sample, side: int | None) -> None:
        for row, labels in label_bands(session, sample.image, tile=side):  # a raster's labels do not lie in memory as a whole, either
            confusion.add(sample.labels[row : row + len(labels)], labels)

    def measure(self, session: Predictor, samples: Sequence[Sample], *, tile: int) -> Integers:
        """The areas of blocks of pictures."""
        return areas(session, samples, tile=tile, block=None if len(samples) >= WHOLE_PICTURES else tile // 4)

    def counts(self, truth: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray(truth != IGNORED)

    def class_scores(self, hits_RK: Floats, truths_RK: Floats, guesses_RK: Floats) -> Floats:
        """The IoU of each class; NaN without a pixel of it in the truth."""
        return np.where(truths_RK > 0, hits_RK / np.maximum(truths_RK + guesses_RK - hits_RK, 1), np.nan)

    def mean_scores(self, scores_RK: Floats, hits_RK: Floats, truths_RK: Floats) -> Floats:
        """The mean IoU."""
        known = ~np.isnan(scores_RK)
        return np.asarray(np.where(known, scores_RK, 0).sum(1) / np.maximum(known.sum(1), 1))

    def examples(self, directory: Path, judged: Judging, classes: Sequence[ClassInfo], *, side: int) -> dict[str, Any]:
        return {
            "examples": write_examples(directory, judged.session, judged.samples, classes, side=side, tile=judged.tile),
            "worst": write_worst(directory, judged.samples, judged.answers or [], classes, side=side),
        }

    def shown(self, image_HWC: UInt8, target: NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
        """A crop, and beside it the same with its mask laid over."""
        image = to_rgb(image_HWC)
        return np.concatenate([image, overlay(image, target, classes)], axis=1)
