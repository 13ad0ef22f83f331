"""Scores of class numbers: of pictures, or of pixels.

Axes: H W map, K classes, N pictures or blocks, R resamples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassConfusionMatrix

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.runtime.tiles import Predictor
from muntin.tasks.base import Floats
from muntin.tasks.base_learning import Integers, Learning
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging, RankTurns, TaskScores

MOST_CONFUSED, MOST_MISTAKES = 64, 20
"""Classes of a confusion matrix, and rows of the list of mistakes."""
COUNTED_AT_ONCE = 1 << 21
"""Pixels whose labels are counted at once, in 8 bytes each and several copies."""


@dataclass(frozen=True, kw_only=True)
class LabelScores(TaskScores):
    """Scores of labels. `iou` and `recall` are by class name; None if a class has no pixel in truth and prediction, or in the truth."""

    counted: int
    """Number of pixels (or pictures) that are not ignored."""
    accuracy: float
    iou: dict[str, float | None]
    recall: dict[str, float | None]
    confusion: tuple[tuple[int, ...], ...] = ()
    """Pixels or pictures by their true class (rows) and their predicted one, up to `MOST_CONFUSED` classes; empty for more."""
    mistakes: tuple[tuple[str, str, int], ...] = ()
    """The most frequent mistakes: true class, predicted class, and their pixels or pictures; at most `MOST_MISTAKES`."""

    @property
    def absent(self) -> list[str]:
        """Classes that the truth lacks."""
        return [name for name, recall in self.recall.items() if recall is None]

    @property
    def figures(self) -> dict[str, Any]:
        return {"score": self.score, "accuracy": self.accuracy, "by_class": self.by_class}

    def report(self, scale: int) -> dict[str, Any]:
        mistakes = [{"truth": truth, "predicted": predicted, "count": number} for truth, predicted, number in self.mistakes]
        return {"confusion": {"counts": self.confusion or None, "mistakes": mistakes}}


class LabelLearning(Learning):
    """A task whose truth is class numbers. `made`: its scores."""

    made: ClassVar[type[LabelScores]]

    @abstractmethod
    def truth(self, sample: Sample) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the true labels in bands, each with its first row."""

    def evaluate(self, judged: Judging) -> TaskScores:
        confusion, side, number = Confusion(judged.session.signature), judged.side, 0
        for sample in judged.turns():
            number += 1
            if judged.answers is None:
                self.add(confusion, judged.session, sample, side)
            else:
                judged.answers.append(self.answer(judged.session, sample, side))
                for row, truth in self.truth(sample):
                    confusion.add(truth, judged.answers[-1][row : row + len(truth)])
        return confusion.scores(self.made, number, judged.ranks)

    def add(self, confusion: Confusion, session: Predictor, sample: Sample, side: int | None) -> None:
        """Count the labels of a picture."""
        labels = self.answer(session, sample, side)
        for row, truth in self.truth(sample):
            confusion.add(truth, labels[row : row + len(truth)])

    def same(self, sample: Sample, one: NDArray[Any], other: NDArray[Any]) -> tuple[int, int]:
        """Equal labels, and all, among those that the truth does not ignore."""
        equal = total = 0
        for row, truth in self.truth(sample):
            counted = self.counts(truth)
            equal += int((one[row : row + len(truth)] == other[row : row + len(truth)])[counted].sum())
            total += int(counted.sum())
        return equal, total

    def counts(self, truth: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where labels are not ignored."""
        return np.ones(truth.shape, bool)

    def confusion(self, sample: Sample, answer: NDArray[Any], classes: int) -> Integers:
        found = np.zeros((classes, classes), np.int64)
        for row, truth in self.truth(sample):
            counted = self.counts(truth)
            pairs = truth[counted].astype(np.int64) * classes + answer[row : row + len(truth)][counted]
            found += np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)
        return found

    def class_scores(self, hits_RK: Floats, truths_RK: Floats, guesses_RK: Floats) -> Floats:
        """The recall of each class; NaN without a pixel or picture of it in the truth."""
        return np.where(truths_RK > 0, hits_RK / np.maximum(truths_RK, 1), np.nan)

    def mean_scores(self, scores_RK: Floats, hits_RK: Floats, truths_RK: Floats) -> Floats:
        """The accuracy."""
        return np.asarray(hits_RK.sum(1) / np.maximum(truths_RK.sum(1), 1))


class Confusion:
    """The sum of confusion matrices."""

    def __init__(self, signature: Signature) -> None:
        self._task, self._names = signature.task, [c.name for c in signature.classes]
        classes = len(self._names)
        self._matrix = MulticlassConfusionMatrix(
            classes, ignore_index=None if classes > IGNORED else IGNORED, validate_args=False, sync_on_compute=False
        )
        self._total = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, truth: NDArray[Any], labels: NDArray[Any]) -> None:
        """Add pixels or pictures."""
        truth, labels = truth.ravel(), labels.ravel()
        for start in range(0, len(truth), COUNTED_AT_ONCE):
            part = slice(start, start + COUNTED_AT_ONCE)
            self._matrix.reset()
            self._matrix.update(torch.from_numpy(labels[part].astype(np.int64)), torch.from_numpy(truth[part].astype(np.int64)))
            self._total += self._matrix.compute()

    def scores(self, made: type[LabelScores], samples: int, ranks: RankTurns) -> LabelScores:
        """The scores over the samples of all processes; `samples`: of this one. Raises `DataError` if nothing counts."""
        total, samples, names = ranks.sum(self._total), int(ranks.sum(torch.tensor(samples))), self._names
        counted = int(total.sum())
        if not counted:
            raise DataError(f"nothing to score: all pixels of the {samples} samples are ignored; check the split and `ignore`")
        right, truths, guesses = total.diagonal(), total.sum(1), total.sum(0)
        union = truths + guesses - right
        return made(
            task=self._task,
            samples=samples,
            counted=counted,
            accuracy=int(right.sum()) / counted,
            iou={n: int(r) / int(u) if u else None for n, r, u in zip(names, right, union, strict=True)},
            recall={n: int(r) / int(t) if t else None for n, r, t in zip(names, right, truths, strict=True)},
            confusion=tuple(tuple(row) for row in total.tolist()) if len(names) <= MOST_CONFUSED else (),
            mistakes=_most_frequent(total, names),
        )


def _most_frequent(total: torch.Tensor, names: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    """The most frequent mistakes in a confusion matrix, with the names of their classes."""
    wrong = total.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(MOST_MISTAKES, len(wrong)))
    pairs = zip(places.tolist(), counts.tolist(), strict=True)
    return tuple((names[place // len(names)], names[place % len(names)], int(number)) for place, number in pairs if number)
