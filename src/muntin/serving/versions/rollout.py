"""Rules for a new version: when a trial is over, and whether the version passed.

Before the flip a candidate may be tried beside the current version: as a canary it answers a share of the requests, as a shadow it computes
a share of the answered ones again, for comparison only. After the flip the previous version stays warm while the new one is on probation.
Both are trials with the same rules: failures, overdue batches, disagreement and slowness. Times are compared between calls of the same
kind, by their medians.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from muntin.artifact import Signature
from muntin.artifact.tensors import Tensors
from muntin.serving.versions.version import Latencies, Version

ENOUGH = 20
"""Batches, or compared rows, that slowness or disagreement is judged by before the trial is over."""
FEW = 5
"""Batches of a kind of call needed to compare its times."""


class Rollout(BaseModel):
    """Bounds for a new version. With neither canary nor shadow it takes over as soon as it is verified and warm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canary: Annotated[float, Field(ge=0, le=1, description="share of requests that a candidate answers before it takes over")] = 0.0
    shadow: Annotated[float, Field(ge=0, le=1, description="share of answered requests that a candidate computes again")] = 0.0
    for_requests: Annotated[int, Field(ge=1, description="rows (images) that each trial lasts")] = 100
    for_seconds: Annotated[
        float, Field(ge=0, description="longest trial, apart from batches in progress; 0: none, the old version is closed at once")
    ] = 60.0
    max_error_rate: Annotated[float, Field(ge=0, le=1, description="share of its rows that may fail")] = 0.0
    min_agreement: Annotated[
        float, Field(ge=0, le=1, description="share of equal labels, or similarity of tensors, that its shadow needs")
    ] = 0.8
    max_slowdown: Annotated[float, Field(ge=1, description="how many times as long as its predecessor it may take")] = 3.0

    @property
    def tried(self) -> bool:
        """True if a version is tried beside the current one before it takes over."""
        return self.canary > 0 or self.shadow > 0


@dataclass(kw_only=True)
class Tally:
    """Counts of a trial that began at `since`.

    `rows`: those (images) of the `batches` that were computed or failed, of which `failed`, and of these `overdue`. `compared`: rows whose
    answers were compared; `agreed`: sum of their agreements. `why`: the error of the first failure. `passed_at`: when the version passed,
    apart from batches in progress.
    """

    since: float
    batches: int = 0
    rows: int = 0
    failed: int = 0
    overdue: int = 0
    compared: int = 0
    agreed: float = 0.0
    why: str = ""
    passed_at: float = inf


class Verdict(NamedTuple):
    """The end of a trial: whether the version passed, and the reason in a line."""

    passed: bool
    reason: str


def judge_version(rollout: Rollout, tally: Tally, version: Version, base: Version, *, now: float) -> Verdict | None:
    """Judge a version beside its predecessor `base` by their engines, then by its counts (`judge`). None: the trial goes on.

    A version passes only after the batches that it began before.
    """
    if not version.able:
        return Verdict(passed=False, reason="its engine died again and again, or could not be begun again") if base.able else None
    if not base.able:
        return Verdict(passed=True, reason=f"the engine of {base.name} died again and again")
    verdict = judge(rollout, tally, version.latencies, base.latencies, now=now)
    if verdict is not None and verdict.passed:
        tally.passed_at = min(tally.passed_at, now)
        if any(begun.at <= tally.passed_at for begun in version.begun):
            return None
    return verdict


def judge(rollout: Rollout, tally: Tally, latencies: Latencies, base: Latencies, *, now: float) -> Verdict | None:
    """Judge a version by its counts and times. None: the trial goes on. `base`: the times of its predecessor."""
    if tally.overdue:  # whatever share of rows may fail: every overdue batch keeps a thread
        return Verdict(passed=False, reason=f"it does not come back with {tally.overdue} of its rows: its engine hangs")
    due = now - tally.since >= rollout.for_seconds
    if due and not tally.rows:
        return Verdict(passed=True, reason=f"untried: no request in {rollout.for_seconds:g} s")
    over = due or tally.rows >= rollout.for_requests
    # Before the end only failures count that good rows could not make up for.
    if tally.failed > rollout.max_error_rate * (tally.rows if over else max(tally.rows, rollout.for_requests)):
        why = f": {tally.why}" if tally.why else ""
        reason = f"{tally.failed} of its {tally.rows} rows failed (allowed: {rollout.max_error_rate:.2%}){why}"
        return Verdict(passed=False, reason=reason)
    if tally.compared and (over or tally.compared >= ENOUGH):
        agreement = tally.agreed / tally.compared
        if agreement < rollout.min_agreement:
            return Verdict(passed=False, reason=f"its answers agree by {agreement:.1%} (needed: {rollout.min_agreement:.1%})")
    slowdown = compare_latencies(latencies, base) if over or tally.batches % ENOUGH == 0 else None
    if slowdown is not None and slowdown > rollout.max_slowdown:
        return Verdict(passed=False, reason=f"it takes {slowdown:.1f} times as long (allowed: {rollout.max_slowdown:g})")
    if not over:
        return None
    return Verdict(passed=True, reason=f"{tally.rows} rows in {now - tally.since:.0f} s, {tally.failed} failed")


def compare_latencies(latencies: Latencies, base: Latencies) -> float | None:
    """Compute how many times as long batches take as those of `base`, over the calls of which both have `FEW` times; None without any."""
    ours, theirs = 0.0, 0.0
    for call in latencies.calls:
        count = min(latencies.count(call), base.count(call))
        if count >= FEW:
            ours += count * median(latencies.of(call))
            theirs += count * median(base.of(call))
    return ours / theirs if theirs > 0 else None


def tensor_agreement(answer: Tensors, shadow: Tensors) -> float:
    """Compute how far two answers agree, from 0 to 1: the least of their outputs.

    Integers and bools: the share of equal values. Floats: the Bray-Curtis similarity 1 - sum |a - b| / sum (|a| + |b|), which is 0.9 where
    values differ by about a fifth; times the share of values that are finite in both, or equal. Outputs of other shapes: 0.
    """
    return min(_agreement(answer[name], shadow[name]) for name in answer)


def _agreement(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    if ours.shape != theirs.shape:
        return 0.0
    if ours.dtype.kind != "f" or not ours.size:
        return float((ours == theirs).mean()) if ours.size else 1.0
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    same = finite | (x == y) | (np.isnan(x) & np.isnan(y))
    x, y = x[finite], y[finite]
    total = float(np.abs(x).sum() + np.abs(y).sum())
    return float(same.mean()) * (1 - float(np.abs(x - y).sum()) / total if total else 1.0)


def label_agreement(answer: NDArray[Any], shadow: NDArray[Any], signature: Signature, *, labels: bool) -> float | None:
    """Compute the share of pixels (or images) that two answers give the same label. `labels`: they are labels, not scores.

    None where no class is the answer: such candidates are judged by failures and times alone. The number of classes may differ.
    """
    if not signature.answer.argmax:
        return None
    ours, theirs = (answer, shadow) if labels else (answer.argmax(axis=1), shadow.argmax(axis=1))
    return float((ours == theirs).mean())
