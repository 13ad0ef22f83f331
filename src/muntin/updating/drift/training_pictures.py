"""The pictures of a reference: windows of a run's training split. Needs torch, as every access to a run does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.runtime.session import Session
from muntin.training.checkpoint import Checkpoint, source_of
from muntin.updating.drift.comparison import Advance, Corner, most_windows
from muntin.updating.drift.features import Floats, describe
from muntin.updating.drift.reference import LEAST_REFERENCE, REFERENCE_PICTURES


def describe_training(
    session: Session,
    checkpoint: Checkpoint,
    *,
    count: int = REFERENCE_PICTURES,
    seed: int = 0,
    progress: Advance = lambda done, total: None,
) -> tuple[Floats, int]:
    """Return the features (N, F) of at most `count` windows of a run's training split, and the number of pictures in the split.

    One random window of each of so many pictures; of fewer than `LEAST_REFERENCE` pictures several, the more the larger a picture is.
    Raises DataError where the data are gone.
    """
    samples = source_of(checkpoint).split("train")
    generator = np.random.default_rng(seed)
    rows = []
    draws = _draws(samples.sizes(), session.signature, count, generator)
    for done, (index, corner) in enumerate(draws, 1):
        rows.append(describe(session, samples[index].image, corner))
        progress(done, len(draws))
    return np.array(rows), len(samples)


def check_origin(signature: Signature, checkpoint: Checkpoint) -> None:
    """Raise DataError for a run of another task or other classes than the artefact's."""
    other = checkpoint.signature
    if (signature.task, signature.channels, signature.classes) != (other.task, other.channels, other.classes):
        raise DataError(
            f"{checkpoint.path} is a run of another model ({other.task}, {len(other.classes)} classes, {other.channels} channels): name "
            "the run that the artefact was exported from"
        )


def _draws(sizes: Sequence[tuple[int, int]], signature: Signature, count: int, generator: np.random.Generator) -> list[tuple[int, Corner]]:
    """Draw (index of a picture, place of its window), in order of the pictures, so that each is decoded once."""
    most = np.array([most_windows(size, signature) for size in sizes])
    if len(sizes) >= LEAST_REFERENCE:
        chosen = generator.permutation(len(sizes))[:count]
    elif most.sum() <= count:
        chosen = np.arange(len(sizes)).repeat(most)
    else:
        chosen = generator.choice(len(sizes), size=count, p=most / most.sum())
    corners = generator.random((len(chosen), 2)).tolist()
    return [(int(index), (row, column)) for index, (row, column) in zip(sorted(chosen.tolist()), corners, strict=True)]
