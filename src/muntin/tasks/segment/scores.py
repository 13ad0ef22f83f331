"""Scores of masks.

Axes: H W map, K classes, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.runtime.tiles import Predictor, allowed_tile, label_bands
from muntin.tasks.labels import LabelScores
from muntin.tasks.samples import Sample


class MaskScores(LabelScores):
    """Scores of masks: the mean IoU."""

    @property
    def score(self) -> float:
        return self.miou

    @property
    def miou(self) -> float:
        """Mean IoU over the classes in truth or prediction."""
        present = [v for v in self.iou.values() if v is not None]
        return sum(present) / len(present)

    @property
    def by_class(self) -> dict[str, float | None]:
        """The IoU of each class."""
        return self.iou

    @property
    def figures(self) -> dict[str, Any]:
        return super().figures | {"miou": self.miou}

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on classes that the truth lacks and that were predicted."""
        false = [name for name in self.absent if self.iou[name] == 0]
        effect = "and some pixels were predicted as it: its IoU of 0 counts in the mean"
        return (f"the truth holds no {', '.join(false)}, {effect}",) if false else ()


def areas(session: Predictor, samples: Sequence[Sample], *, tile: int, block: int | None = None) -> NDArray[np.int64]:
    """Return pixels of the intersection and union of truth and prediction `(N, K, 2)`, of N blocks of images.

    A class that no truth holds has none: a single pixel predicted as it would otherwise take a share of the mean IoU. `tile`: as of
    `evaluate`. `block`: side of the blocks, pixels; None for whole images. Blocks in which no pixel counts are left out. Raises
    `DataError` if there are no others.
    """
    side, classes = allowed_tile(session.signature, tile), len(session.signature.classes)
    parts, present_K = [], np.zeros(classes, bool)
    for sample in samples:
        height, width = sample.image.shape[:2]
        across = -(-width // block) if block else 1
        columns_W = np.arange(width) // (block or width)
        total = np.zeros((-(-height // (block or height)) * across * classes, 3), np.int64)  # truth, prediction, both
        for top, labels in label_bands(session, sample.image, tile=side):
            truth = np.asarray(sample.labels[top : top + len(labels)])
            rows_H = np.arange(top, top + len(labels)) // (block or height)
            first_HW = (rows_H[:, None] * across + columns_W) * classes
            counted_HW = np.ones(truth.shape, bool) if classes > IGNORED else truth != IGNORED
            first, truth, labels = first_HW[counted_HW], truth[counted_HW], labels[counted_HW]
            for column, places in enumerate((first + truth, first + labels, (first + truth)[truth == labels])):
                total[:, column] += np.bincount(places, minlength=len(total))
        truths, guesses, right = total.reshape(-1, classes, 3).transpose(2, 0, 1)
        found = np.stack([right, truths + guesses - right], -1)
        parts.append(found[truths.sum(1) > 0])
        present_K |= truths.sum(0) > 0
    if not sum(map(len, parts)):
        raise DataError(f"nothing to score: all pixels of the {len(samples)} samples are ignored; check the split and `ignore`")
    found = np.concatenate(parts)
    found[:, ~present_K] = 0
    return found
