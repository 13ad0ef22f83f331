"""Pictures of masks for a report: examples and the worst ones.

Axes: H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.classes import ClassInfo
from muntin.images import IGNORED, colorize, difference, to_rgb, write_image
from muntin.images.opening import UInt8
from muntin.runtime.session import Labels
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.tasks.samples import Sample
from muntin.text import plain


def example_windows(samples: Sequence[Sample], *, side: int, count: int) -> list[tuple[int, int, int]]:
    """Return (sample, top, left) of the `count` separate windows with the most varied truth, chosen without any prediction."""
    windows: list[tuple[float, int, int, int]] = []
    for index in range(len(samples)):
        labels = samples[index].labels
        height, width = labels.shape
        for top in range(0, max(1, height - side + 1), side):
            for left in range(0, max(1, width - side + 1), side):
                shares = np.bincount(labels[top : top + side, left : left + side].ravel(), minlength=256)[:IGNORED]
                total = shares.sum()
                if total:
                    p = shares[shares > 0] / total
                    windows.append((float(-(p * np.log(p)).sum()), index, top, left))
    windows.sort(key=lambda entry: (-entry[0], *entry[1:]))
    return [(index, top, left) for _, index, top, left in windows[:count]]


def write_examples(
    directory: Path, session: Predictor, samples: Sequence[Sample], classes: Sequence[ClassInfo], *, side: int, tile: int, count: int = 5
) -> list[dict[str, str]]:
    """Write picture, truth, prediction (in the tiles of the score) and difference of windows of a split to `directory/pictures`."""
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (index, top, left) in enumerate(example_windows(samples, side=side, count=count), 1):
        sample = samples[index]
        image, truth = (np.ascontiguousarray(a[top : top + side, left : left + side]) for a in (sample.image, sample.labels))
        labels = predict(session, image, tile=allowed_tile(session.signature, tile))
        name = f"{plain(sample.name)}, {_place(top, left, truth)}"
        examples.append({"name": name} | _write_views(folder, f"{number}", image, truth, labels, classes))
    return examples


def _place(top: int, left: int, part: NDArray[Any]) -> str:
    return f"rows {top}-{top + part.shape[0]}, columns {left}-{left + part.shape[1]}"


def _write_views(
    folder: Path, prefix: str, image: UInt8, truth: UInt8, labels: NDArray[Any], classes: Sequence[ClassInfo]
) -> dict[str, str]:
    """Write a picture, its truth, a prediction and their difference. Returns their paths from the folder above."""
    views = {
        "image": to_rgb(image), "truth": colorize(truth, classes), "prediction": colorize(labels, classes),
        "difference": difference(labels, truth),
    }  # fmt: skip
    for kind, view in views.items():
        write_image(folder / f"{prefix}-{kind}.png", view)
    return {kind: f"{folder.name}/{prefix}-{kind}.png" for kind in views}


def worst_windows(
    samples: Sequence[Sample], labels: Sequence[Labels], *, classes: int, side: int, count: int
) -> list[tuple[float, int, int, int]]:
    """Return (mean IoU, sample, top, left) of the `count` pictures with the lowest mean IoU over their classes, the lowest first.

    The window, of `side` pixels, is the one with the most wrong pixels. Pictures without a wrong pixel are left out. Reads every truth
    once.
    """
    found: list[tuple[float, int, int, int]] = []
    for index, (sample, answer) in enumerate(zip(samples, labels, strict=True)):
        both, either = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        worst = (0, 0, 0)
        height, width = sample.labels.shape
        for top in range(0, height, side):
            for left in range(0, width, side):
                truth, guess = (np.asarray(part[top : top + side, left : left + side]) for part in (sample.labels, answer))
                counted = truth != IGNORED
                truth, guess = truth[counted].astype(np.int64), guess[counted].astype(np.int64)
                right = np.bincount(truth[truth == guess], minlength=classes)
                both += right
                either += np.bincount(truth, minlength=classes) + np.bincount(guess, minlength=classes) - right
                worst = max(worst, (int((truth != guess).sum()), -top, -left))
        if worst[0]:
            present = either > 0
            found.append((float((both[present] / either[present]).mean()), index, -worst[1], -worst[2]))
    return sorted(found)[:count]


def write_worst(
    directory: Path, samples: Sequence[Sample], labels: Sequence[Labels], classes: Sequence[ClassInfo], *, side: int, count: int = 4
) -> list[dict[str, str]]:
    """Write the views of `write_examples` of the worst pictures to `directory/pictures`. `labels`: of each sample."""
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (iou, index, top, left) in enumerate(worst_windows(samples, labels, classes=len(classes), side=side, count=count), 1):
        sample, window = samples[index], (slice(top, top + side), slice(left, left + side))
        image, truth, guess = (np.ascontiguousarray(part[window]) for part in (sample.image, sample.labels, labels[index]))
        name = f"{plain(sample.name)}: mean IoU {iou:.3f}; {_place(top, left, truth)}"
        examples.append({"name": name} | _write_views(folder, f"worst-{number}", image, truth, guess, classes))
    return examples
