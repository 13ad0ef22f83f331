"""The pictures of a reference: windows of a run's training split. Needs torch, as every access to a run does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import numpy as np

from muntin.artifact import Artifact, Signature, open_artifact
from muntin.errors import DataError
from muntin.runtime.engines.registry import open_image_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.tasks.base import Floats
from muntin.text import count
from muntin.training.checkpoint import Checkpoint, source_of
from muntin.updating.drift.comparison import Advance, Corner, few_pictures_note, most_windows
from muntin.updating.drift.features import describe, feature_list
from muntin.updating.drift.reference import FILE, LEAST_REFERENCE, REFERENCE_PICTURES, make_reference, write_reference


def with_training_reference(
    artifact: Artifact, checkpoint: Checkpoint, *, threads: int | None = None, progress: Advance = lambda done, total: None
) -> tuple[Artifact, tuple[str, ...]]:
    """Write the reference of a run's training images into its artifact, unless it has one. Returns the artifact as it is now, and notes.

    Costs a call of the session for each window, and a second or two. Without images, or with
    too few, there is no reference, which a note says.
    """
    if artifact.optional_file(FILE) is not None:
        return artifact, ()
    with closing(open_image_session(artifact.path, SessionOptions(threads=threads))) as session:
        try:
            features_NF, pictures = describe_training(session, checkpoint, progress=progress)
        except DataError as error:  # the images are gone, and an artifact that is there already is exported again
            return artifact, (f"no drift reference: {error}",)
    windows = len(features_NF)
    if windows < LEAST_REFERENCE:
        least = f"`muntin drift` needs {LEAST_REFERENCE}, or --reference with a folder of as many"
        return artifact, (f"no drift reference: the training images give {count(windows, 'window')}, and {least}",)
    write_reference(artifact, make_reference(features_NF, feature_list(artifact.picture)))
    return open_artifact(artifact.path), few_pictures_note(pictures)


def describe_training(
    session: Session,
    checkpoint: Checkpoint,
    *,
    most: int = REFERENCE_PICTURES,
    seed: int = 0,
    progress: Advance = lambda done, total: None,
) -> tuple[Floats, int]:
    """Return the features (N, F) of at most `most` windows of a run's training split, and the number of pictures in the split.

    One random window of each of so many pictures; of fewer than `LEAST_REFERENCE` pictures several, the more the larger a picture is.
    Raises DataError where the data are gone.
    """
    samples = source_of(checkpoint).split("train")
    generator = np.random.default_rng(seed)
    rows = []
    draws = _draws(samples.sizes(), session.signature, most, generator)
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
