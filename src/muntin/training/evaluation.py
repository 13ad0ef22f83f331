"""Score a session on a split: a live model, its quantised form or the deployed artefact; and what scores say of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from muntin.runtime.tiles import Predictor, allowed_tile, check_image_session
from muntin.tasks.learning import LEARNING
from muntin.tasks.samples import Sample
from muntin.tasks.scores import Judging, PictureAnswers, TaskScores
from muntin.text import list_some
from muntin.training.distributed.ranks import ALONE, Ranks

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


def tile_of(crop: int) -> int:
    """Side of the tiles for whole pictures: twice the training crop, for a context like in training."""
    return 2 * crop


def predictions(session: Predictor, samples: Sequence[Sample], *, tile: int) -> Iterator[tuple[Sample, NDArray[Any]]]:
    """Yield each sample with a session's answer. `tile` as of `evaluate`."""
    learning, side = LEARNING[session.signature.task], allowed_tile(session.signature, tile)
    for index in range(len(samples)):
        sample = samples[index]
        yield sample, learning.answer(session, sample, side)


def evaluate(
    session: Predictor,
    samples: Sequence[Sample],
    *,
    tile: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
    similarity: bool = True,
    answers: PictureAnswers | None = None,
) -> TaskScores:
    """Predict every sample, and compute the scores of the task.

    `tile`: largest side of tiles (`allowed_tile`). `ranks`: several processes take turns. `similarity`: compute SSIM, too, which takes
    longer than PSNR. `answers`: a list to which the answer of each sample is added. Raises `DataError` if nothing counts.
    """
    check_image_session(session)
    judged = Judging(session=session, samples=samples, tile=tile, answers=answers, ranks=ranks, progress=progress, similarity=similarity)
    return LEARNING[session.signature.task].evaluate(judged)


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
