"""Pictures of a folder compared with the reference of an artefact: the effect size, what changed in words, and the farthest pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.images import IMAGE_SUFFIXES, MAX_PIXELS, open_source
from muntin.images.listing import images_in
from muntin.runtime.session import Session
from muntin.tasks.base import Floats, PictureFeature
from muntin.updating.drift.features import WINDOW, describe, feature_list
from muntin.updating.drift.reference import LEAST, LEAST_REFERENCE, DriftReference, FeatureMoments

Corner = tuple[float, float]
Advance = Callable[[float, float], None]
FARTHEST = 8
"""Number of pictures that are named."""
SHOWN_CHANGES = 8
"""Largest number of features that are named."""
OVERLAPPING = 4
"""Windows of a large picture, at most, as a multiple of those that cover it."""
FEW_WINDOWS = 32
"""Number of windows that fewer than `LEAST` large pictures give together."""


@dataclass(frozen=True, kw_only=True)
class FeatureChange:
    """One feature of a batch and of the reference, as means. `effect`: difference in standard deviations. `notable`: beyond chance."""

    feature: PictureFeature
    before: float
    after: float
    effect: float
    notable: bool

    @property
    def text(self) -> str:
        """The change in words, such as "class ice more frequent: 2.1 % -> 15 % (+1.4 standard deviations)"."""
        words = self.feature.more if self.effect > 0 else self.feature.less
        values = f"{self.feature.text(self.before)} -> {self.feature.text(self.after)}"
        return f"{self.feature.name} {words}: {values} ({self.effect:+.1f} standard deviations)"


@dataclass(frozen=True, kw_only=True)
class FarPicture:
    """A picture far from the reference. `distance`: 1 is usual. `reason`: the feature that deviates most. `corner`: of its window."""

    path: Path
    distance: float
    reason: str
    corner: Corner


@dataclass(frozen=True, kw_only=True)
class DriftResult:
    """A comparison. `windows`: described parts of the pictures. `changes`: of single features, largest first. `skipped`: with reasons."""

    pictures: int
    windows: int
    effect: float
    threshold: float
    changes: tuple[FeatureChange, ...]
    farthest: tuple[FarPicture, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def drifted(self) -> bool:
        return self.effect > self.threshold

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        relation = f"{self.effect:.2f} standard deviations, and {self.threshold:.2f} occur by chance in {self.windows} pictures"
        return f"drift: {relation}" if self.drifted else f"no drift: {relation}"


def pictures_in(folder: Path, *, newest: int | None = None) -> tuple[list[Path], tuple[str, ...]]:
    """Return the images in a folder and its subfolders (`images_in`), and notes on what was left out.

    `newest`: only so many, those that were changed last. Raises DataError for a folder that does not exist or has no images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: name a folder of pictures, such as that of `muntin serve --keep-samples`")
    found, notes = images_in(folder)
    if not found:
        raise DataError(f"{folder} holds no pictures: put some there ({', '.join(IMAGE_SUFFIXES)}), or serve with --keep-samples {folder}")
    if newest is None or newest >= len(found):
        return found, notes
    return sorted(sorted(found, key=_changed)[-newest:]), notes


def describe_files(
    session: Session,
    paths: Sequence[Path],
    *,
    windows: int = 1,
    max_pixels: int = MAX_PIXELS,
    progress: Advance = lambda done, total: None,
) -> tuple[Floats, list[tuple[Path, Corner]], list[tuple[Path, str]]]:
    """Return the features (n, F) of pictures, the picture and the place of each row, and the pictures that cannot be read with the reason.

    One window a picture, at a place that depends on the number of the picture alone; of fewer than `windows` pictures several.
    """
    rows, places, skipped = [], [], []
    each = math.ceil(windows / len(paths))
    for number, path in enumerate(paths):
        try:
            picture = open_source(path, session.signature.channels, max_pixels=max_pixels)
            chosen = list(corners(min(each, most_windows(picture.shape, session.signature)), number))
            described = [describe(session, picture, corner) for corner in chosen]
        except DataError as error:  # damaged, perhaps in a window of a raster alone, of other channels, or removed meanwhile
            skipped.append((path, str(error)))
            continue
        rows += described
        places += [(path, corner) for corner in chosen]
        progress(number + 1, len(paths))
    return np.array(rows).reshape(len(rows), -1), places, skipped


def compare_folder(
    session: Session,
    reference: DriftReference,
    folder: Path,
    *,
    newest: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Advance = lambda done, total: None,
) -> DriftResult:
    """Compare the pictures of a folder with a reference. Costs one call of the session a picture.

    Raises DataError for fewer than `LEAST` pictures that can be read.
    """
    paths, found_notes = pictures_in(folder, newest=newest)
    windows = FEW_WINDOWS if len(paths) < LEAST else 1
    features_nF, places, skipped = describe_files(session, paths, windows=windows, max_pixels=max_pixels, progress=progress)
    if len(places) < LEAST:
        reason = f"; {len(skipped)} cannot be read, such as: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{folder} holds {len(paths)} pictures, and at least {LEAST} are compared{reason}")
    pictures = len(paths) - len(skipped)
    notes = list(found_notes)
    if len(places) > pictures:
        notes.append(f"{len(places)} windows of {pictures} pictures: those of one picture are alike, which itself can look like drift")
    return compared(features_nF, places, reference, session.signature, pictures=pictures, skipped=skipped, notes=notes)


def compared(
    features_nF: Floats,
    places: Sequence[tuple[Path, Corner]],
    reference: DriftReference,
    signature: Signature,
    *,
    pictures: int,
    skipped: Sequence[tuple[Path, str]] = (),
    notes: Sequence[str] = (),
) -> DriftResult:
    """Compare described pictures with a reference."""
    moments, features, count = FeatureMoments.of(reference), feature_list(signature), len(features_nF)
    effects, means = moments.changes(features_nF), features_nF.mean(0)
    usual = reference.largest_change(count)
    order = np.argsort(-np.abs(effects))[:SHOWN_CHANGES]
    changes = [
        FeatureChange(
            feature=features[f], before=float(moments.mean[f]), after=float(means[f]), effect=float(effects[f]),
            notable=bool(abs(effects[f]) > usual),
        )
        for f in order
    ]  # fmt: skip
    distances, z_nF = moments.distances(features_nF), (features_nF - moments.mean) / moments.deviation
    farthest: dict[Path, FarPicture] = {}
    for row in np.argsort(-distances):
        path, corner = places[row]
        if len(farthest) < FARTHEST and path not in farthest:
            reason = _deviation(features, z_nF[row])
            farthest[path] = FarPicture(path=path, distance=float(distances[row]), reason=reason, corner=corner)
    return DriftResult(
        pictures=pictures, windows=count, effect=moments.effect(features_nF), threshold=reference.threshold(count),
        changes=tuple(changes), farthest=tuple(farthest.values()), skipped=tuple(skipped), notes=tuple(notes),
    )  # fmt: skip


def most_windows(shape: Sequence[int], signature: Signature) -> int:
    """Return how many windows of a picture (H, W, C) may be described: 1 of one that a window holds, and of a classifier's."""
    tiles = math.ceil(shape[0] / WINDOW) * math.ceil(shape[1] / WINDOW)
    return 1 if tiles == 1 or signature.answer.one else OVERLAPPING * tiles


def few_pictures_note(pictures: int) -> tuple[str, ...]:
    """Return a note on a reference of so few pictures that it takes several windows of each."""
    if pictures >= LEAST_REFERENCE:
        return ()
    return (f"the drift reference has {pictures} pictures, in many windows each: other subjects or places than these look like drift",)


def corners(count: int, number: int) -> Iterator[Corner]:
    """Yield the places of the windows of picture `number`: random, and the same for the same numbers."""
    yield from map(tuple, np.random.default_rng(number).random((count, 2)).tolist())


def _deviation(features: Sequence[PictureFeature], z_F: Floats) -> str:
    largest = int(np.argmax(np.abs(z_F)))
    feature = features[largest]
    return f"{feature.name} {feature.more if z_F[largest] > 0 else feature.less} ({z_F[largest]:+.1f})"


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0
