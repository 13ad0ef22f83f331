"""Score a session on a split: a live model, its quantised form or the deployed artefact.

Axes: H W map, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassConfusionMatrix

from muntin.data.classes import list_some
from muntin.data.source import Sample
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.rasters import bands
from muntin.runtime.session import Labels
from muntin.runtime.tiles import Predictor, allowed_tile, check_image_session, label_bands, predict
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.restoration.evaluation import RestoredScores, evaluate_restored

MOST_CONFUSED, MOST_MISTAKES = 64, 20
"""Classes of a confusion matrix, and rows of the list of mistakes."""
COUNTED_AT_ONCE = 1 << 21
"""Pixels whose labels are counted at once, in 8 bytes each and several copies."""
POOR = 0.1
"""Recall of a class below which a run is said hardly ever to find it."""
EARLY = 50
"""Steps before which no class is said to be missing: every model begins like that."""
SCORE_LOST = 1 / 3
"""Share of the best validation score that a collapsed run has lost at least."""
LOSS_RISE = 0.5
"""Least rise of the training loss in a collapsed run, as a share of the first point of its curve."""
SMALL_LOSS = 0.25
"""Training loss below which no run has collapsed: that of a model that fits its pictures, where twice as much is noise. Of restore, whose
loss is a share of 64 grey levels, no loss is too small."""
DB_LOST = 3.0
"""Loss of PSNR that a collapsed run of restore has lost at least, dB."""
LOSS_POINTS = 5
"""Points of the training curve, of ten steps each, that are averaged for the loss at a step."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a session. `iou` and `recall` are by class name; None if a class has no pixel in truth and prediction, or in the truth."""

    task: str
    samples: int
    counted: int
    """Number of pixels (or images) that are not ignored."""
    accuracy: float
    iou: dict[str, float | None]
    recall: dict[str, float | None]
    confusion: tuple[tuple[int, ...], ...] = ()
    """Pixels or pictures by their true class (rows) and their predicted one, up to `MOST_CONFUSED` classes; empty for more."""
    mistakes: tuple[tuple[str, str, int], ...] = ()
    """The most frequent mistakes: true class, predicted class, and their pixels or pictures; at most `MOST_MISTAKES`."""

    @property
    def by_class(self) -> dict[str, float | None]:
        """The score of each class: IoU for segment, recall for classify."""
        return self.iou if self.task == "segment" else self.recall

    @property
    def miou(self) -> float:
        """Mean IoU over the classes in truth or prediction."""
        present = [v for v in self.iou.values() if v is not None]
        return sum(present) / len(present)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on classes that the truth lacks: for classify all, for segment those that were predicted."""
        absent = [name for name, recall in self.recall.items() if recall is None]
        if self.task == "classify":
            return (f"no image is of {list_some(absent)}: the accuracy does not cover it",) if absent else ()
        false = [name for name in absent if self.iou[name] == 0]
        effect = "and some pixels were predicted as it: its IoU of 0 counts in the mean"
        return (f"the truth holds no {', '.join(false)}, {effect}",) if false else ()

    @property
    def score(self) -> float:
        """Score of the task: mean IoU for segment, accuracy for classify. Higher is better."""
        return self.miou if self.task == "segment" else self.accuracy

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy of classify by the number of images (Wilson 1927). None for segment: its pixels are no sample."""
        if self.task == "segment":
            return None
        z, n, p = 1.96, self.counted, self.accuracy
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    @property
    def figures(self) -> dict[str, Any]:
        """The scores of a validation."""
        figures = {"score": self.score, "accuracy": self.accuracy, "by_class": self.by_class}
        return figures | {"miou": self.miou} if self.task == "segment" else figures


def tile_of(crop: int) -> int:
    """Side of the tiles for whole pictures: twice the training crop, for a context like in training."""
    return 2 * crop


def predictions(
    session: Predictor,
    samples: Sequence[Sample],
    *,
    tile: int,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Sample, Labels]]:
    """Yield each sample with a session's labels: `(H, W)`, or `(1,)` for classify. `tile`: largest side of tiles (`allowed_tile`).

    `ranks`: several processes take turns.
    """
    side = allowed_tile(session.signature, tile)
    for index in range(ranks.index, len(samples), ranks.count):
        sample = samples[index]
        if session.signature.task == "classify":
            labels = np.array([np.argmax(predict(session, sample.image))], dtype=session.signature.label_type)
        else:
            labels = predict(session, sample.image, tile=side)
        yield sample, labels
        if progress is not None:
            progress(index + 1, len(samples))


def evaluate(
    session: Predictor,
    samples: Sequence[Sample],
    *,
    tile: int,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    similarity: bool = True,
) -> Evaluation | RestoredScores:
    """Predict every sample; compute the confusion matrix, IoU, recall and accuracy, or for restore PSNR and SSIM.

    `tile`, `ranks`: as of `predictions`. `similarity`: compute SSIM, which takes longer than PSNR. Raises `DataError` if nothing counts.
    """
    check_image_session(session)
    if session.signature.task == "restore":
        return evaluate_restored(session, samples, tile=tile, similarity=similarity, progress=progress, ranks=ranks)
    if session.signature.task == "classify":
        return score(predictions(session, samples, tile=tile, progress=progress, ranks=ranks), session, ranks)
    confusion, side = _Confusion(session), allowed_tile(session.signature, tile)
    for index in range(ranks.index, len(samples), ranks.count):
        sample = samples[index]
        for row, labels in label_bands(session, sample.image, tile=side):  # a raster's labels do not lie in memory as a whole, either
            confusion.add(sample.labels[row : row + len(labels)], labels)
        if progress is not None:
            progress(index + 1, len(samples))
    return confusion.evaluation(len(range(ranks.index, len(samples), ranks.count)), ranks)


def areas(session: Predictor, samples: Sequence[Sample], *, tile: int, block: int | None = None) -> NDArray[np.int64]:
    """Return pixels of the intersection and union of truth and prediction `(N, K, 2)`, of N blocks of images.

    A class that no truth holds has none: a single pixel predicted as it would otherwise take a share of the mean IoU. `tile`: as of
    `predictions`. `block`: side of the blocks, pixels; None for whole images. Blocks in which no pixel counts are left out. Raises
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


def score(pairs: Iterator[tuple[Sample, Labels]], session: Predictor, ranks: Ranks = ALONE) -> Evaluation:
    """Compute the scores from pairs of a sample and its labels, those of all processes."""
    confusion, samples = _Confusion(session), 0
    for sample, labels in pairs:
        samples += 1
        if isinstance(sample.target, int):
            confusion.add(np.array([sample.target]), labels)
        else:
            for row, truth in bands(sample.target):
                confusion.add(truth, labels[row : row + len(truth)])
    return confusion.evaluation(samples, ranks)


class _Confusion:
    """The sum of confusion matrices."""

    def __init__(self, session: Predictor) -> None:
        self._task, self._names = session.signature.task, [c.name for c in session.signature.classes]
        classes = len(self._names)
        self._matrix = MulticlassConfusionMatrix(
            classes, ignore_index=None if classes > IGNORED else IGNORED, validate_args=False, sync_on_compute=False
        )
        self._total = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, truth: NDArray[Any], labels: Labels) -> None:
        """Add pixels or images."""
        truth, labels = truth.ravel(), labels.ravel()
        for start in range(0, len(truth), COUNTED_AT_ONCE):
            part = slice(start, start + COUNTED_AT_ONCE)
            self._matrix.reset()
            self._matrix.update(torch.from_numpy(labels[part].astype(np.int64)), torch.from_numpy(truth[part].astype(np.int64)))
            self._total += self._matrix.compute()

    def evaluation(self, samples: int, ranks: Ranks) -> Evaluation:
        """The scores over the samples of all processes; `samples`: of this one. Raises `DataError` if nothing counts."""
        total, samples, names = ranks.sum(self._total), int(ranks.sum(torch.tensor(samples))), self._names
        counted = int(total.sum())
        if not counted:
            raise DataError(f"nothing to score: all pixels of the {samples} samples are ignored; check the split and `ignore`")
        right, truths, guesses = total.diagonal(), total.sum(1), total.sum(0)
        union = truths + guesses - right
        return Evaluation(
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


def poor_classes(validation: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A note on classes of which the last validation found less than `POOR` of the pixels or images. None before `EARLY` steps."""
    recalls = validation[-1].get("by_class", {}) if validation and validation[-1]["step"] >= EARLY else {}
    poor = [name for name, recall in recalls.items() if recall is not None and recall < POOR]
    if not poor:
        return ()
    return (
        f"hardly ever found in the validation split: {list_some(poor)} (less than {POOR:.0%} of it): too few pictures or steps, "
        "or another learning rate is needed",
    )


def worse_than_input(point: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A note if a validation of restore is worse than its input."""
    lost = 0.0 if point is None or "psnr" not in point else float(point["input_psnr"]) - float(point["psnr"])
    if lost <= 0:
        return ()
    return (f"the restored pictures are {lost:.2f} dB worse than the input, enlarged bicubically where the model enlarges: train longer",)


def collapse(training: Sequence[Mapping[str, float]], validation: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """Return the step of the best score and a description if the run has collapsed at its last validation, otherwise None.

    A run has collapsed if its score is a third or more below its best one and its training loss has risen since then by half or more of its
    first value, or if the loss is twice its first value. The score alone proves nothing: with few pictures it jumps as far, and it falls in
    a run that learns its pictures by heart. But then the loss, averaged over 50 steps, stays. The loss of a model that learns nothing is
    noisy, too, but by less than half. For restore, whose score is in dB, `DB_LOST` takes the place of a third.
    """
    if not validation or not training:
        return None
    best, last = max(validation, key=lambda point: float(point["score"])), validation[-1]
    first_loss, best_loss, last_loss = training[0]["loss"], _loss_up_to(training, best), _loss_up_to(training, last)
    restores = "psnr" in last
    if last_loss < SMALL_LOSS and not restores:
        return None
    lost = last["score"] <= (best["score"] - DB_LOST if restores else (1 - SCORE_LOST) * best["score"])
    if lost and last_loss >= best_loss + LOSS_RISE * first_loss:
        fall = f"the validation score fell from {best['score']:.3f} at step {best['step']} to {last['score']:.3f} at step {last['step']}"
        return int(best["step"]), f"{fall}, and the training loss rose from {best_loss:.2g} to {last_loss:.2g}"
    if last_loss >= 2 * first_loss:
        return int(best["step"]), f"the training loss rose from {first_loss:.2g} at the start to {last_loss:.2g} at step {last['step']}"
    return None


def _loss_up_to(training: Sequence[Mapping[str, float]], point: Mapping[str, Any]) -> float:
    """Mean loss of the last points of the training curve up to the step of a validation; of its first point if none is as early."""
    losses = [entry["loss"] for entry in training if entry["step"] <= point["step"]][-LOSS_POINTS:] or [training[0]["loss"]]
    return sum(losses) / len(losses)
