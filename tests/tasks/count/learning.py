"""Learning of a number a picture, which is the first part of the file's name: 12-street.png.

Axes: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss
from torchvision.transforms import InterpolationMode

from muntin.artifact import ClassInfo
from muntin.images import to_rgb
from muntin.images.opening import UInt8
from muntin.runtime.tiles import Predictor, predict
from muntin.tasks.base_learning import Learning, LossTerms
from muntin.tasks.crops import Draw, changed, recolored, window
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging, TaskScores


@dataclass(frozen=True, kw_only=True)
class NumberScores(TaskScores):
    error: float

    @property
    def score(self) -> float:
        return -self.error

    @property
    def figures(self) -> dict[str, Any]:
        return {"score": self.score, "by_class": {}, "error": self.error}


class NumberLearning(Learning):
    rotates: ClassVar = False
    small: ClassVar = "they are enlarged"

    def window_side(self, crop: int, zoom: float, height: int, width: int) -> int:
        return min(height, width)

    def cut(self, sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
        image_CHW = changed(partial(window, sample.image, fill=0), draw, crop, InterpolationMode.BILINEAR)
        return recolored(image_CHW, draw), torch.from_numpy(sample.target)

    def random_target(self, images_BCHW: Tensor, *, classes: int, scale: int) -> Tensor:
        return torch.rand(len(images_BCHW), 1)

    def counted(self, target: Tensor) -> Tensor:
        return torch.ones(len(target), dtype=torch.int64, device=target.device)

    def sums(self, scores: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
        return mse_loss(scores.float(), target, reduction="sum").double()[None]

    def distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None) -> Tensor:
        return mse_loss(scores.float(), teacher_scores.float(), reduction="sum")

    def mean_distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
        return mse_loss(scores.float(), teacher_scores.float())

    def answer(self, session: Predictor, sample: Sample, side: int | None) -> NDArray[Any]:
        number: NDArray[Any] = predict(session, sample.image)
        return number

    def evaluate(self, judged: Judging) -> TaskScores:
        errors = self.measure(judged.session, list(judged.turns()), tile=judged.tile)
        total, count = judged.ranks.sum(torch.tensor([sum(errors), len(errors)], dtype=torch.float64)).tolist()
        return NumberScores(task="count", samples=round(count), error=-total / count)  # type: ignore[arg-type]

    def measure(self, session: Predictor, samples: Sequence[Sample], *, tile: int) -> list[float]:
        return [-float(np.abs(self.answer(session, sample, None) - sample.target).sum()) for sample in samples]

    def same(self, sample: Sample, one: NDArray[Any], other: NDArray[Any]) -> tuple[int, int]:
        return int(np.allclose(one, other, atol=0.1)), 1

    def examples(self, directory: Path, judged: Judging, classes: Sequence[ClassInfo], *, side: int) -> dict[str, Any]:
        return {"examples": []}

    def shown(self, image_HWC: UInt8, target: NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
        return to_rgb(image_HWC)
