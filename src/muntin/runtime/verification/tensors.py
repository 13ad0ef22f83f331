"""Golden pairs of named tensors: each output against the recorded one, and rows of a batch against each row alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import GoldenTolerance, TensorPair
from muntin.runtime.session import Named
from muntin.runtime.tensors import TensorSession

RMS_SHARE = 0.25
"""Allowed root mean square error of a map, as a share of the allowed largest error. Sound artefacts reach less than a tenth of it."""
MAP = 256
"""Values of an output from which on it is a map: where only rounding differs, few of them are near the largest error."""
LARGE, TAIL = 4096, 0.999
"""Values of an output from which on its largest error is that of all but the last of 1,000: where rounding decides, as at the edge of a
letter, single values differ by all of their range. A wrong row or column is more."""
LEAST_SPREAD = 1e-3
"""Smallest unit of errors, as a share of the largest value of an output: values that hardly differ are rounded like all others."""


@dataclass(frozen=True, kw_only=True)
class OutputResult:
    """Result of one output of one golden pair.

    `max_error`, `rms_error`: largest difference of one value (of many values, see `TAIL`) and root mean square, in standard deviations of
    the golden output (of a single number: as a share of it), None for integers. `cosine`: the smallest between a row of the last axis and
    the golden one, of up to three axes and rows of several floats only. `equal`: share of equal values, of integers only. `tolerance`: None
    where nothing is recorded.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float | None
    rms_error: float | None
    cosine: float | None
    equal: float | None
    tolerance: GoldenTolerance | None

    @property
    def passed(self) -> bool:
        if self.tolerance is None:
            return False
        if self.max_error is None or self.rms_error is None:
            return self.equal is not None and self.equal >= self.tolerance.label_agreement
        return self.max_error <= self.tolerance.max_error and self.rms_error <= self._rms_allowed

    @property
    def _rms_allowed(self) -> float:
        assert self.tolerance is not None
        return self.tolerance.max_error * (RMS_SHARE if np.prod(self.shape) >= MAP else 1)

    @property
    def errors(self) -> str:
        """The differences in words."""
        if self.max_error is None or self.rms_error is None:
            return f"{self.equal:.2%} of its values are equal"
        cosine = "" if self.cosine is None else f", least cosine of a row {self.cosine:.5f}"
        return f"largest error {self.max_error:.2g} standard deviations, {self.rms_error:.2g} in the mean{cosine}"

    @property
    def allowed(self) -> str:
        """The limits in words."""
        if self.tolerance is None:
            return "nothing, as nothing is recorded"
        if self.max_error is None:
            return f"{self.tolerance.label_agreement:.2%}"
        return f"{self.tolerance.max_error:.4g}, {self._rms_allowed:.4g} in the mean"

    @property
    def problem(self) -> str:
        """The differences and their limits in words."""
        return f"{self.name} {self.shape}: {self.errors} (allowed: {self.allowed})"


def replay_tensors(session: TensorSession, pair: TensorPair, tolerance: GoldenTolerance | None) -> tuple[OutputResult, ...]:
    """Runs one golden pair and compares each output."""
    inputs, golden = pair
    return compare_outputs(session(inputs), golden, tolerance)


def compare_outputs(answer: Named, golden: Named, tolerance: GoldenTolerance | None) -> tuple[OutputResult, ...]:
    """Compares named outputs with the expected ones. A number that is not finite, or another shape, is an infinite error."""
    return tuple(_compared(name, answer[name], due, tolerance) for name, due in golden.items())


def _compared(name: str, value: NDArray[np.generic], due: NDArray[np.generic], tolerance: GoldenTolerance | None) -> OutputResult:
    max_error, rms_error, cosine, equal = None, None, None, None
    if due.dtype.kind != "f":
        equal = float(np.mean(value == due)) if value.shape == due.shape and due.size else float(value.shape == due.shape)
    elif not due.size:
        max_error = rms_error = 0.0 if value.shape == due.shape else float("inf")
    else:
        max_error = rms_error = float("inf")
        if value.shape == due.shape and np.isfinite(value).all():
            x, y = value.astype(np.float64), due.astype(np.float64)
            difference = np.abs(x - y)
            unit = max(float(y.std()), LEAST_SPREAD * float(np.abs(y).max())) if y.size > 1 else float(np.abs(y).max())
            largest = float(np.quantile(difference, TAIL)) if difference.size >= LARGE else float(difference.max())
            max_error, rms_error = largest / (unit or 1.0), float(np.sqrt(np.square(difference).mean())) / (unit or 1.0)
            cosine = _least_cosine(x, y) if 1 <= y.ndim <= 3 and y.shape[-1] > 1 else None
    return OutputResult(
        name=name, shape=due.shape, max_error=max_error, rms_error=rms_error, cosine=cosine, equal=equal, tolerance=tolerance
    )


def _least_cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The smallest cosine of two rows of the last axis; rows of zeros are equal to each other."""
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosines = np.where(lengths > 0, (x * y).sum(axis=-1) / np.where(lengths > 0, lengths, 1), np.abs(x - y).max(axis=-1) == 0)
    return float(cosines.min())


def batch_problems(session: TensorSession, pairs: tuple[TensorPair, ...], tolerance: GoldenTolerance) -> Iterator[str]:
    """Compares the rows of the smallest golden pair of several rows with those of each row alone, where rows are to be independent."""
    batch = session.signature.batch
    several = [inputs for inputs, _ in pairs if batch is not None and next(iter(inputs.values())).shape[0] > 1]
    if not several:
        return
    inputs = min(several, key=_values)
    rows = next(iter(inputs.values())).shape[0]
    answers = [session({name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(rows)]
    alone = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    for result in compare_outputs(session(inputs), alone, tolerance):
        if not result.passed:
            yield (
                f"{rows} rows in a call give another {result.name} than each alone: {result.errors} (allowed: {result.allowed}): rows of "
                "one call would depend on each other: export the artefact again"
            )


def _values(inputs: Mapping[str, NDArray[np.generic]]) -> int:
    return sum(tensor.size for tensor in inputs.values())
