"""Golden pairs: each output against the recorded one, and rows of a batch against each row alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact, GoldenTolerance, TensorPair
from muntin.artifact.answers import Answer
from muntin.runtime.inputs import Named
from muntin.runtime.session import Session

RMS_SHARE = 0.25
"""Allowed root mean square error of a map, as a share of the allowed largest error: where only rounding differs, few values of a map are
near the largest error. Sound artefacts reach less than a tenth of it."""
MAP = 256
"""Values of a named output from which on it is a map."""
LARGE, TAIL = 4096, 0.999
"""Values of a named output from which on its largest error is that of all but the last of 1,000: where rounding decides, as at the edge of
a letter, single values differ by all of their range. A wrong row or column is more."""
LEAST_SPREAD = 1e-3
"""Smallest unit of errors, as a share of the largest value of an output: values that hardly differ are rounded like all others."""


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """Result of one output of one golden pair.

    `max_error`, `rms_error`: largest difference of one value (of many values of a named output, see `TAIL`) and root mean square, in
    standard deviations of the golden output (of a single number: as a share of it); None for integers. `cosine`: the smallest between a
    row of the last axis and the golden one, of named outputs of up to three axes and rows of several floats only. `equal`: share of equal
    values, of integers only. `label_agreement`: share of pixels (or images) with the golden label, where a class is the answer.
    `rms_allowed`: None where `rms_error` has no limit of its own. `tolerance`: None where nothing is recorded.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float | None = None
    rms_error: float | None = None
    cosine: float | None = None
    equal: float | None = None
    label_agreement: float | None = None
    rms_allowed: float | None = None
    tolerance: GoldenTolerance | None

    @property
    def passed(self) -> bool:
        if self.tolerance is None:
            return False
        shares = [share for share in (self.equal, self.label_agreement) if share is not None]
        errors = [(self.max_error, self.tolerance.max_error), (self.rms_error, self.rms_allowed)]
        return all(share >= self.tolerance.label_agreement for share in shares) and all(
            error is None or limit is None or error <= limit for error, limit in errors
        )

    @property
    def errors(self) -> str:
        """The differences in words."""
        if self.max_error is None:
            return f"{self.equal or 0:.2%} of its values are equal"
        cosine = "" if self.cosine is None else f", least cosine of a row {self.cosine:.5f}"
        labels = "" if self.label_agreement is None else f", {self.label_agreement:.2%} of its labels agree"
        return f"largest error {self.max_error:.2g} standard deviations, {self.rms_error:.2g} in the mean{cosine}{labels}"

    @property
    def allowed(self) -> str:
        """The limits in words."""
        if self.tolerance is None:
            return "nothing, as nothing is recorded"
        if self.max_error is None:
            return f"{self.tolerance.label_agreement:.2%}"
        mean = "" if self.rms_allowed is None else f", {self.rms_allowed:.4g} in the mean"
        labels = "" if self.label_agreement is None else f", {self.tolerance.label_agreement:.2%} of the labels"
        return f"{self.tolerance.max_error:.4g}{mean}{labels}"

    @property
    def problem(self) -> str:
        """The differences and their limits in words."""
        return f"{self.name} {self.shape}: {self.errors} (allowed: {self.allowed})"


def replay(session: Session, pair: TensorPair, tolerance: GoldenTolerance | None) -> tuple[GoldenResult, ...]:
    """Runs one golden pair and compares each output."""
    inputs, golden = pair
    facts = session.signature.answer if session.images else None
    return compare_outputs(session(inputs, tuple(golden)), golden, tolerance, facts)


def compare_outputs(
    answer: Named, golden: Named, tolerance: GoldenTolerance | None, facts: Answer | None = None
) -> tuple[GoldenResult, ...]:
    """Compares named outputs with the expected ones. A number that is not finite, or another shape, is an infinite error.

    `facts`: of the task of an image model, whose outputs are scores.
    """
    return tuple(_compared(name, answer[name], due, tolerance, facts) for name, due in golden.items())


def _compared(
    name: str, value: NDArray[np.generic], due: NDArray[np.generic], tolerance: GoldenTolerance | None, facts: Answer | None
) -> GoldenResult:
    if due.dtype.kind != "f":
        equal = float(np.mean(value == due)) if value.shape == due.shape and due.size else float(value.shape == due.shape)
        return GoldenResult(name=name, shape=due.shape, equal=equal, tolerance=tolerance)
    max_error = rms_error = float("inf") if due.size or value.shape != due.shape else 0.0
    cosine = labels = None
    if due.size and value.shape == due.shape and np.isfinite(value).all():
        x, y = value.astype(np.float64), due.astype(np.float64)
        difference = np.abs(x - y)
        unit = max(float(y.std()), LEAST_SPREAD * float(np.abs(y).max())) if y.size > 1 else float(np.abs(y).max())
        rare = facts is None and difference.size >= LARGE
        largest = float(np.quantile(difference, TAIL)) if rare else float(difference.max())
        max_error, rms_error = largest / (unit or 1.0), float(np.sqrt(np.square(difference).mean())) / (unit or 1.0)
        cosine = _least_cosine(x, y) if facts is None and 1 <= y.ndim <= 3 and y.shape[-1] > 1 else None
    if facts is not None and facts.argmax:
        labels = _label_agreement(value, due, tolerance.max_error * float(due.std(dtype=np.float64)) if tolerance else 0.0)
    is_map = due.size >= MAP if facts is None else due.ndim == 4
    return GoldenResult(
        name=name, shape=due.shape, max_error=max_error, rms_error=rms_error, cosine=cosine, label_agreement=labels,
        rms_allowed=RMS_SHARE * tolerance.max_error if tolerance and is_map else None, tolerance=tolerance,
    )  # fmt: skip


def _label_agreement(scores: NDArray[np.generic], golden: NDArray[np.generic], near: float) -> float:
    """The share of equal labels.

    A classifier's label counts as the golden one if its golden score is within the allowed error of the best: between two nearly equal
    classes rounding decides. Among the many labels of a segmentation a few near ties do not matter.
    """
    labels = scores.argmax(axis=1)
    same = labels == golden.argmax(axis=1)
    if scores.ndim == 2:
        same |= golden.max(axis=1) - np.take_along_axis(golden, labels[:, None], axis=1)[:, 0] <= near
    return float(same.mean())


def _least_cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The smallest cosine of two rows of the last axis; rows of zeros are equal to each other."""
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosines = np.where(lengths > 0, (x * y).sum(axis=-1) / np.where(lengths > 0, lengths, 1), np.abs(x - y).max(axis=-1) == 0)
    return float(cosines.min())


def batch_problems(session: Session, artifact: Artifact, tolerance: GoldenTolerance) -> Iterator[str]:
    """Compares rows of a batch with each row alone, where rows are to be independent.

    Named tensors: the smallest golden pair of several rows. Images: the smallest golden image and its pale negative.
    """
    given = [inputs for inputs, _ in artifact.golden()]
    if session.images:
        image = min(given, key=_values)["images"][:1]
        inputs = {"images": np.concatenate([image, 255 - image // 2])}
    else:
        several = [inputs for inputs in given if session.tensors.batch is not None and len(next(iter(inputs.values()))) > 1]
        if not several:
            return
        inputs = min(several, key=_values)
    rows, names = len(next(iter(inputs.values()))), ("scores",) if session.images else None
    answers = [session({name: tensor[row : row + 1] for name, tensor in inputs.items()}, names) for row in range(rows)]
    alone = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    facts = session.signature.answer if session.images else None
    for result in compare_outputs(session(inputs, names), alone, tolerance, facts):
        if not result.passed:
            yield (
                f"{rows} rows in a call give other {result.name} than each alone: {result.errors} (allowed: {result.allowed}): rows of "
                "one call would depend on each other: export a model that computes each row by itself"
            )


def _values(inputs: Mapping[str, NDArray[np.generic]]) -> int:
    return sum(tensor.size for tensor in inputs.values())
