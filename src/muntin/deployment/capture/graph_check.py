"""Comparison of a captured graph with its PyTorch model, and of its integers with its floats, in ONNX Runtime.

Two causes of a difference are told apart: a graph that computes otherwise, which is refused, and rounding, which is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.deployment.capture.model_contract import Pairs, SizeError, mean_error
from muntin.errors import ExportError
from muntin.graph.artifacts.engine_check import FAR_OFF
from muntin.graph.float_run import FloatRun

Errors = Mapping[tuple[int, int], float]
"""Root mean square errors, in standard deviations of all scores, by height and width."""
CAPTURED = 0.01
"""Error allowed between the captured graph and PyTorch in floats: only the order of sums differs."""
NOTHING = 1.0
"""Error of an answer that is no better than the mean of all answers."""
ELSEWHERE = 4
"""Ratio of the largest to the median error over sizes, above which integers compute otherwise at a size."""


def graph_pairs(model: onnx.ModelProto, images: Iterable[NDArray[np.uint8]], *, exact: bool) -> Pairs:
    """Return images and the scores of a graph. `exact`: quantisers round where the graph says so. Raises `SizeError` where it fails."""
    run = FloatRun(model, exact=exact)
    pairs: Pairs = []
    for images_BHWC in images:
        try:
            scores: NDArray[np.float32] = run({"images": images_BHWC})["scores"]
        except ExportError as error:
            _, H, W, _ = images_BHWC.shape
            raise SizeError(f"what was traced fails on an image of {H} x {W}: {error}; nothing was written") from error
        pairs.append((images_BHWC, scores))
    return pairs


def errors_by_size(pairs: Pairs, due: Pairs) -> Errors:
    """Return the errors of scores. Scores of another shape, and those that are not finite, have an infinite error."""
    spread = max(float(scores.std()) for _, scores in due) or 1.0
    errors: dict[tuple[int, int], float] = {}
    for (images_BHWC, scores), (_, expected) in zip(pairs, due, strict=True):
        sound = scores.shape == expected.shape and bool(np.isfinite(scores).all())
        errors[images_BHWC.shape[1], images_BHWC.shape[2]] = mean_error(scores, expected) / spread if sound else float("inf")
    return errors


def check_capture(errors: Errors, allowed: float = CAPTURED) -> None:
    """Raise `SizeError` where a graph differs from PyTorch by more than is allowed."""
    (H, W), worst = max(errors.items(), key=lambda entry: entry[1])
    if not worst <= allowed:
        raise SizeError(
            f"what was traced does not compute what PyTorch does: it differs by {worst:.2g} standard deviations in the mean on an image of "
            f"{H} x {W} (allowed: {allowed:g}); it holds one branch of each condition on the size and no random numbers: leave them out, "
            "or write all branches in one (torch.where); nothing was written"
        )


def check_rounding(errors: Errors) -> list[str]:
    """Return a note where integers move the answer far. Raises `SizeError` where they do so at one size, far more than at others.

    A network without training may answer any rounding with noise, at every size; that is no reason to refuse it.
    """
    (H, W), worst = max(errors.items(), key=lambda entry: entry[1])
    usual = median(errors.values())
    if not worst <= max(NOTHING, ELSEWHERE * usual):
        raise SizeError(
            f"rounding to integers moves the answer to an image of {H} x {W} by {worst:.2g} standard deviations in the mean, usually by "
            f"{usual:.2g}: calibrate with images of this size, too, name layers in quantization.keep, or give sizes without it; "
            "nothing was written"
        )
    if worst <= FAR_OFF:
        return []
    return [
        f"rounding to integers moves the answer to an image of {H} x {W} by {worst:.2g} standard deviations in the mean: look at the "
        "scores, and where other sizes come out better, calibrate with images of such sizes, too"
    ]


def sensitivity(model: onnx.ModelProto, pairs: Pairs) -> tuple[float, float]:
    """Return what one grey level of noise changes: the largest error of a score, in standard deviations, and the share of equal labels.

    `pairs`: images and the graph's exact scores. A network that answers noise so answers the rounding of other kernels so, too.
    """
    largest, labels = 0.0, 1.0
    noise = np.random.default_rng(0)
    moved = [(x + noise.integers(-1, 2, x.shape, np.int16)).clip(0, 255).astype(np.uint8) for x, _ in pairs]
    for (_, other), (_, scores) in zip(graph_pairs(model, moved, exact=True), pairs, strict=True):
        largest = max(largest, float(np.abs(other - scores).max()) / (float(scores.std()) or 1.0))
        labels = min(labels, float((other.argmax(1) == scores.argmax(1)).mean()))
    return largest, labels
