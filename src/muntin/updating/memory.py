"""Replay memory: a bounded number of pictures, or windows of large ones, in which the classes are balanced.

    segment   windows of one side, in random order -> counts of each class -> the rarest kept class gets the next window, again and again
    classify  labels of all pictures -> one picture of each class, a second one of each, ...

The order within a class is random (a reservoir of the windows), or by herding: each next window brings the mean of the kept features
closest to the class's mean. Source of herding: Welling (ICML 2009), as in iCaRL (Rebuffi et al., 1611.07725, algorithm 4). Deviation: for
maps a window belongs to every class that covers `LEAST_SHARE` of it. Of maps, `CANDIDATES` windows are looked at for each kept one: a class
that none of these shows is not in the memory.

Axes: N windows, K classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from muntin.data.items import ItemSamples
from muntin.data.source import Samples
from muntin.images import IGNORED
from muntin.images.opening import UInt8
from muntin.tasks.samples import Sample

CANDIDATES = 4
"""Windows that are looked at, as a multiple of those that are kept."""
LEAST_SHARE = 0.01
"""Share of a window's pixels that a class covers at least for the window to count as one of it."""


@dataclass(frozen=True, kw_only=True)
class PictureWindow:
    """A part of a picture: sample index, and its rows and columns."""

    index: int
    top: int
    left: int
    height: int
    width: int

    def cut(self, samples: Sequence[Sample]) -> tuple[UInt8, UInt8 | int]:
        """The pixels and the target."""
        sample = samples[self.index]
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        target = sample.target if isinstance(sample.target, int) else sample.target[rows, columns]
        return sample.image[rows, columns], target


def windows_of(samples: Samples, side: int | None) -> list[PictureWindow]:
    """All windows of at most `side` pixels that tile the pictures; None: whole pictures. Reads the files' headers."""
    return [window for index, size in enumerate(samples.sizes()) for window in _tiled(index, *size, side)]


def _tiled(index: int, height: int, width: int, side: int | None) -> Iterator[PictureWindow]:
    for top, rows in _spans(height, side):
        for left, columns in _spans(width, side):
            yield PictureWindow(index=index, top=top, left=left, height=rows, width=columns)


def _spans(length: int, side: int | None) -> list[tuple[int, int]]:
    """Starts and lengths of equal parts, as few as have at most `side` pixels each."""
    parts = 1 if side is None else -(-length // side)
    edges = [round(number * length / parts) for number in range(parts + 1)]
    return [(start, end - start) for start, end in pairwise(edges)]


def class_shares(target: UInt8 | int, classes: int) -> NDArray[np.float64]:
    """Share of each class in a target's pixels, `(K,)`; ignored ones count in none."""
    if isinstance(target, int):
        return np.asarray(np.arange(classes) == target, np.float64)
    counts = np.bincount(target.ravel(), minlength=IGNORED + 1)[:classes]
    return np.asarray(counts / max(1, target.size), np.float64)


def remember_windows(
    samples: Samples,
    *,
    count: int,
    classes: int,
    side: int | None,
    seed: int,
    features: Callable[[UInt8], NDArray[np.float32]] | None = None,
) -> list[PictureWindow]:
    """Choose at most `count` windows with balanced classes, in the order of their pictures.

    `side`: None for classify. `features`: of one window, `(F,)`: choose by herding; None: at random. Decodes the pictures of at most
    `CANDIDATES` · `count` windows; for classify without features none.
    """
    every = windows_of(samples, side)
    order = np.random.default_rng(seed).permutation(len(every))
    if side is None:
        return [every[number] for number in sorted(_balanced_pictures(samples, order, count, features))]
    candidates = [every[number] for number in order[: CANDIDATES * count]]
    shares = np.zeros((len(candidates), classes))
    rows: list[NDArray[np.float32]] = []
    by_picture = sorted(range(len(candidates)), key=lambda number: candidates[number].index)  # each picture is decoded once
    described: dict[int, NDArray[np.float32]] = {}
    for number in by_picture:
        image, target = candidates[number].cut(samples)
        shares[number] = class_shares(target, classes)
        if features is not None:
            described[number] = features(image)
    rows = [described[number] for number in range(len(candidates))] if features is not None else []
    chosen = balanced_choice(shares, count, np.stack(rows) if rows else None)
    return sorted((candidates[number] for number in chosen), key=lambda window: (window.index, window.top, window.left))


def _balanced_pictures(
    samples: Samples, order: NDArray[np.intp], count: int, features: Callable[[UInt8], NDArray[np.float32]] | None
) -> list[int]:
    labels = np.array(picture_labels(samples))
    if features is None:
        return [int(order[row]) for row in balanced_labels(labels[order], count)]
    candidates = sorted(int(order[row]) for row in balanced_labels(labels[order], CANDIDATES * count))
    features_NF = np.stack([features(samples[index].image[:, :]) for index in candidates])
    return [candidates[row] for row in balanced_labels(labels[candidates], count, features_NF)]


def picture_labels(samples: Samples) -> list[int]:
    """The class number of each picture of a classifier. Decodes nothing that lies in files."""
    if isinstance(samples, ItemSamples):
        return [item.target for item in samples.items]
    return [sample.target for sample in samples if isinstance(sample.target, int)]


def balanced_labels(labels_N: NDArray[np.intp], count: int, features_NF: NDArray[np.float32] | None = None) -> list[int]:
    """Choose at most `count` rows: one of each class, then a second one of each, and so on.

    The order within a class is that of the rows, or by herding if there are features.
    """
    round_N = np.full(len(labels_N), len(labels_N))
    by_label = np.argsort(labels_N, kind="stable")
    for own in np.split(by_label, np.flatnonzero(np.diff(labels_N[by_label])) + 1):
        ordered = own if features_NF is None else own[herding(features_NF[own], count)]
        round_N[ordered] = np.arange(len(ordered))
    return [int(row) for row in np.argsort(round_N, kind="stable")[:count]]


def balanced_choice(shares_NK: NDArray[np.float64], count: int, features_NF: NDArray[np.float32] | None = None) -> list[int]:
    """Choose at most `count` rows: each time the next one of the class that the chosen rows cover least.

    The next row of a class is the first one, or by herding if there are features. Rows without any class are never chosen.
    """
    queues = {}
    for label in np.flatnonzero(shares_NK.any(0)).tolist():
        own = np.flatnonzero(shares_NK[:, label] >= min(LEAST_SHARE, float(shares_NK[:, label].max())))
        queues[label] = own.tolist() if features_NF is None else own[herding(features_NF[own], count)].tolist()
    chosen: dict[int, None] = {}
    covered_K = np.zeros(shares_NK.shape[1])
    while len(chosen) < count and queues:
        label = min(queues, key=lambda one: float(covered_K[one]))
        row = next((row for row in queues[label] if row not in chosen), None)
        if row is None:
            del queues[label]
            continue
        chosen[row] = None
        covered_K += shares_NK[row]
    return list(chosen)


def herding(features_NF: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Order of at most `count` rows in which the mean of the first ones is always close to the mean of all. O(count·N·F)."""
    features = features_NF / np.maximum(np.linalg.norm(features_NF, axis=1, keepdims=True), 1e-12)
    mean_F, sum_F = features.mean(0), np.zeros(features.shape[1])
    left = np.ones(len(features), bool)
    order = []
    for number in range(min(count, len(features))):
        distance_N = np.linalg.norm(mean_F - (sum_F + features) / (number + 1), axis=1)
        best = int(np.where(left, distance_N, np.inf).argmin())
        order.append(best)
        left[best] = False
        sum_F = sum_F + features[best]
    return np.array(order, dtype=np.intp)
