"""The seams of a task in training: its crops, its loss, its scores, and its pictures in reports.

Axes: B images, K classes, H, W rows and columns, C channels, R resamples, S sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact import ClassInfo
from muntin.images.legend import LegendEntry
from muntin.images.opening import UInt8
from muntin.runtime.tiles import Predictor
from muntin.tasks.base import Floats
from muntin.tasks.crops import Draw
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging, TaskScores

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What a loss adds up.

    `gamma`: above 0 the cross-entropy is the focal loss: each pixel or picture counts by (1 - p)^gamma, p of its true class (Lin et al.,
    1708.02002, equation 4). `weights`, (K,): of the classes in the cross-entropy; None: all equal. `overlap`: also the sums of each class
    for an overlap loss.
    """

    gamma: float = 0.0
    weights: Tensor | None = None
    overlap: bool = False


class Learning(ABC):
    """Training of a task. A target is what the scores of a batch are compared with.

    `mixtures`: kinds of crops that are joined of several. `rotates`: crops may be rotated. `seeded`: a crop has random numbers of its own.
    `small`: what becomes of a picture that is smaller than a crop. `overlaps`: the loss may have an overlap of each class. `axis`: of
    targets and scores, along which sums may be computed in chunks.
    """

    mixtures: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    small: ClassVar[str]
    overlaps: ClassVar[bool] = False
    axis: ClassVar[int] = 0

    @abstractmethod
    def window_side(self, crop: int, zoom: float, height: int, width: int) -> int:
        """Return the side of the window, in a picture of this size, that becomes a crop."""

    @abstractmethod
    def cut(self, sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
        """Make the crop that `draw` describes: image, uint8 (C, crop, crop), and its target."""

    def batch(self, targets: Sequence[Tensor]) -> Tensor:
        """Return the target of a batch of crops. Class numbers are int64."""
        target = torch.stack(list(targets))
        return target if target.is_floating_point() else target.long()

    @abstractmethod
    def random_target(self, images_BCHW: Tensor, *, classes: int, scale: int) -> Tensor:
        """Return a target of noise for a batch of images."""

    @abstractmethod
    def counted(self, target: Tensor) -> Tensor:
        """Return how many items of each picture count, int64 (B,): one a picture, its pixels, or its values."""

    def class_counts(self, target: Tensor, classes: int) -> Tensor:
        """Return how many items are of each class, float64 (K,)."""
        raise NotImplementedError

    @abstractmethod
    def sums(self, scores: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
        """Return the sums over the items of a target, float64 (S,), with gradients: the loss first."""

    def distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None) -> Tensor:
        """Return the distance to a teacher's scores, summed over the items that count; `target` None: all."""
        return divergence(scores, teacher_scores)

    def mean_distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the mean of `distance` over pictures or pixels, a scalar in FP32, or FP64 for such scores."""
        return mean_divergence(scores, teacher_scores)

    @abstractmethod
    def answer(self, session: Predictor, sample: Sample, side: int | None) -> NDArray[Any]:
        """Return the answer of a sample that is scored, computed in tiles of `side` pixels."""

    @abstractmethod
    def evaluate(self, judged: Judging) -> TaskScores:
        """Predict every sample, and compute the scores."""

    @abstractmethod
    def measure(self, session: Predictor, samples: Sequence[Sample], *, tile: int) -> Any:
        """Return the scores of single samples, or areas (N, K, 2) whose sums are one, as `budgeting.scores.Score` takes them."""

    @abstractmethod
    def same(self, sample: Sample, one: NDArray[Any], other: NDArray[Any]) -> tuple[int, int]:
        """Return how many items of two answers of a sample are equal, and how many there are."""

    def confusion(self, sample: Sample, answer: NDArray[Any], classes: int) -> Integers:
        """Return how many items of a sample have each label, truth by answer, (K, K)."""
        raise NotImplementedError

    def class_scores(self, hits_RK: Floats, truths_RK: Floats, guesses_RK: Floats) -> Floats:
        """Return the score of each class from items with the right label, in the truth, and with this label; NaN for an absent class."""
        raise NotImplementedError

    def mean_scores(self, scores_RK: Floats, hits_RK: Floats, truths_RK: Floats) -> Floats:
        """Return the score of the task from those of the classes that the truth holds, (R,)."""
        raise NotImplementedError

    @abstractmethod
    def examples(self, directory: Path, judged: Judging, classes: Sequence[ClassInfo], *, side: int) -> dict[str, Any]:
        """Write pictures of answers into `directory/pictures`, of at most `side` pixels, and return what a report names, as `examples`."""

    @abstractmethod
    def shown(self, image_HWC: UInt8, target: NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
        """Return a training crop with its target, RGB."""

    def caption(self, target: NDArray[Any], classes: Sequence[ClassInfo]) -> list[LegendEntry]:
        """Return the words below a training crop."""
        return []


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are in it."""
    return values if values.dtype is torch.float64 else values.float()


def divergence(scores: Tensor, teacher_scores: Tensor, *, reduction: str = "sum") -> Tensor:
    """The KL divergence from a teacher's probabilities, summed over pixels or images, or "none": of each score.

    A teacher may know only the first classes: the divergence is then of the probabilities among these. Source: Hinton et al., 1503.02531,
    section 2, at temperature 1.
    """
    known = scores[:, : teacher_scores.shape[1]]
    log_scores, log_teacher = (at_least_float32(values).log_softmax(1) for values in (known, teacher_scores))
    return F.kl_div(log_scores, log_teacher, reduction=reduction, log_target=True)


def mean_divergence(scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """The mean of `divergence` over pixels or images."""
    return divergence(scores, teacher_scores) * scores.shape[1] / scores.numel()
