"""Training on degraded and clean pictures, and the scores of restored ones.

Axes: B images, C channels, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact import ClassInfo
from muntin.images import to_rgb
from muntin.images.opening import UInt8
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.tasks.base_learning import Learning, LossTerms, at_least_float32
from muntin.tasks.crops import Draw, recolored
from muntin.tasks.restore.crops import cut_pair
from muntin.tasks.restore.degradation import enlarged
from muntin.tasks.restore.pictures import write_restored_examples
from muntin.tasks.restore.scores import mean_scores, picture_scores, psnr
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging, TaskScores

UNIT = 64.0
"""Grey levels that are 1 in the loss, as in the model's own numbers."""
CLOSE = 1
"""Levels by which restored values may differ and count as equal."""


class RestoredLearning(Learning):
    """Crops of degraded pictures with the clean ones, uint8 (C, scale*crop, scale*crop). A smaller picture is continued by mirroring."""

    rotates: ClassVar = False
    seeded: ClassVar = True
    small: ClassVar = "they are mirrored"
    axis: ClassVar = -2

    def window_side(self, crop: int, zoom: float, height: int, width: int) -> int:
        return crop

    def cut(self, sample: Sample, draw: Draw, crop: int) -> tuple[Tensor, Tensor]:
        return cut_pair(sample, draw, lambda clean_CHW: recolored(clean_CHW, draw))

    def batch(self, targets: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(targets))

    def random_target(self, images_BCHW: Tensor, *, classes: int, scale: int) -> Tensor:
        rows, channels, *sides = images_BCHW.shape
        return torch.randint(0, 256, (rows, channels, *(scale * side for side in sides)), dtype=torch.uint8)

    def counted(self, target: Tensor) -> Tensor:
        return torch.full((len(target),), target[0].numel(), device=target.device)

    def sums(self, scores: Tensor, target: Tensor, terms: LossTerms) -> Tensor:
        """The absolute error in units of 64 grey levels."""
        return ((at_least_float32(scores) - target) / UNIT).abs().sum().double()[None]

    def distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None) -> Tensor:
        """The squared difference in units of 64 grey levels, summed over all values."""
        return F.mse_loss(at_least_float32(scores) / UNIT, at_least_float32(teacher_scores) / UNIT, reduction="sum")

    def mean_distance(self, scores: Tensor, teacher_scores: Tensor, target: Tensor | None = None) -> Tensor:
        return F.mse_loss(scores.float() / UNIT, teacher_scores.float() / UNIT)

    def answer(self, session: Predictor, sample: Sample, side: int | None) -> NDArray[Any]:
        """The restored picture."""
        restored: NDArray[Any] = predict(session, sample.image, tile=side)
        return restored

    def evaluate(self, judged: Judging) -> TaskScores:
        """Compare every restored picture with the clean one."""
        side, rows = judged.side, []
        for sample in judged.turns():
            restored = self.answer(judged.session, sample, side)
            rows.append(picture_scores(restored, sample, similarity=judged.similarity))
            if judged.answers is not None:
                judged.answers.append(restored)
        return mean_scores(rows, judged.ranks)

    def measure(self, session: Predictor, samples: Sequence[Sample], *, tile: int) -> list[float]:
        """The PSNR of each picture, dB."""
        side = allowed_tile(session.signature, tile)
        return [psnr(self.answer(session, sample, side), sample.clean) for sample in samples]

    def same(self, sample: Sample, one: NDArray[Any], other: NDArray[Any]) -> tuple[int, int]:
        """Values that differ by at most `CLOSE`, and all."""
        return int((np.abs(one.astype(np.int16) - other.astype(np.int16)) <= CLOSE).sum()), one.size

    def examples(self, directory: Path, judged: Judging, classes: Sequence[ClassInfo], *, side: int) -> dict[str, Any]:
        return {"examples": write_restored_examples(directory, judged.samples, judged.answers or [], side=side)}

    def shown(self, image_HWC: UInt8, target: NDArray[Any], classes: Sequence[ClassInfo]) -> UInt8:
        """An input, enlarged to the size of the clean picture, beside it."""
        clean = np.ascontiguousarray(target.transpose(1, 2, 0))
        return to_rgb(np.concatenate([enlarged(image_HWC, clean.shape[0] // image_HWC.shape[0]), clean], axis=1))
