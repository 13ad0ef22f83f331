"""How a new version comes to serve, and what sends it back: bounds, what was counted, and the judgement.

Before the flip a candidate may be tried beside the version that serves: as a canary it answers a share of the requests, in its shadow it
computes a share of those that the other answered again, and its answers are only compared. After the flip the old version stays warm for
a while. Both are judged alike: failures, disagreement and slowness, each as soon as it can be told; a batch that does not come back is a
failure, and what was begun is waited for before a version has passed. Times are compared between batches of one kind, by their medians:
one slow call says nothing. Where no kind is the same, as a canary's batches are smaller, they are compared by their pixels, to its favour:
a smaller batch may take as long as a larger one, a larger one as much longer as it is larger. A trial whose images came in a few large
batches goes on until there are times enough to compare, or its time is up; then those that there are have to do.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, NamedTuple

from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import RecipeError
from muntin.serving.version import Latencies

ENOUGH = 20
"""Batches, or compared images, before slowness or disagreement is told from chance."""
FEW = 3
"""Batches that slowness is told by where the time of a trial is up and there are no more."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Bounds for a new version.

    `canary`: the share, 0 to 1, of requests that a candidate answers before it takes over. `shadow`: the share, of those that the version
    that serves answers, that it computes again after the answer. With neither it takes over as soon as it is verified and warm.
    `for_requests`: images that it is judged by, from 1, before the flip and again after it; more of them, until `ENOUGH` batches can be
    compared with its predecessor's. `for_seconds`: the longest that either takes, but for what is being computed then, which is waited for;
    then it is judged by what came, and passes where nothing came. Where nobody has asked anything for so long, before its trial or in it,
    it does not wait for what would not come. With 0 the old version goes at once, and nothing is tried.
    `max_error_rate`: the share of its images, 0 to 1, that may fail; none may keep its engine for good. `min_agreement`: the share of equal
    labels, 0 to 1, that its shadow needs. `max_slowdown`: how many times as long as its predecessor it may take, from 1.
    """

    canary: float = 0.0
    shadow: float = 0.0
    for_requests: int = 100
    for_seconds: float = 60.0
    max_error_rate: float = 0.0
    min_agreement: float = 0.8
    max_slowdown: float = 3.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("canary", 0, 1),
            ("shadow", 0, 1),
            ("for_requests", 1, inf),
            ("for_seconds", 0, inf),
            ("max_error_rate", 0, 1),
            ("min_agreement", 0, 1),
            ("max_slowdown", 1, inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise RecipeError(f"{name}={value!r}: give a number from {low}" + ("" if high == inf else f" to {high}"))
        if self.tried and not self.for_seconds:
            raise RecipeError("for_seconds=0 with a canary or a shadow: give the seconds that a candidate is tried for")

    @property
    def tried(self) -> bool:
        """Whether a version is tried beside the one that serves before it takes over."""
        return self.canary > 0 or self.shadow > 0


@dataclass(kw_only=True)
class Tally:
    """What was seen of a version since `since`, a time of the slot's clock: `batches`; of their images `rows` computed or failed, `failed`,
    and among these `overdue`, whose batch did not come back; and of those whose labels were compared, `compared` and the sum of their
    shares of equal labels, `agreed`. `enough`: when it had passed but for what was still being computed. `deaths`: of the predecessor's
    engine, before. `why`: what the first image that failed failed with."""

    since: float
    batches: int = 0
    rows: int = 0
    failed: int = 0
    overdue: int = 0
    compared: int = 0
    agreed: float = 0.0
    enough: float = inf
    deaths: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The end of a trial: whether the version passed, and a line that says by what."""

    passed: bool
    reason: str


def judge(rollout: Rollout, tally: Tally, latencies: Latencies, base: Latencies, *, now: float, asked: float = inf) -> Verdict | None:
    """Whether a trial is over and how; None: it goes on. `latencies`: the version's, `base`: its predecessor's.

    `asked`: when a batch was last computed for anybody; before a trial that was `for_seconds` ago, there is nothing to wait for.
    """
    if tally.overdue:  # whatever share of images may fail: every batch that does not come back keeps a thread
        return Verdict(passed=False, reason=f"it does not come back with {tally.overdue} of its images: its engine hangs")
    if asked < tally.since and now - asked >= rollout.for_seconds:
        return Verdict(passed=True, reason=f"untried: nobody asked anything in the last {rollout.for_seconds:g} s")
    over = now - tally.since >= rollout.for_seconds or (tally.rows >= rollout.for_requests and _timed(rollout, latencies, base))
    # Before the end only what all the images still to come could not make good.
    if tally.failed > rollout.max_error_rate * (tally.rows if over else max(tally.rows, rollout.for_requests)):
        why = f": {tally.why}" if tally.why else ""
        return Verdict(
            passed=False, reason=f"{tally.failed} of its {tally.rows} images failed (allowed: {rollout.max_error_rate:.2%}){why}"
        )
    if tally.compared and (over or tally.compared >= ENOUGH):
        agreement = tally.agreed / tally.compared
        if agreement < rollout.min_agreement:
            return Verdict(passed=False, reason=f"it agrees on {agreement:.1%} of the labels (needed: {rollout.min_agreement:.1%})")
    # Now and then: medians take long enough to be missed by requests.
    slowdown = compare_latencies(latencies, base, least=FEW if over else ENOUGH) if over or tally.batches % ENOUGH == 0 else None
    if slowdown is not None and slowdown > rollout.max_slowdown:
        return Verdict(passed=False, reason=f"it takes {slowdown:.1f} times as long (allowed: {rollout.max_slowdown:g})")
    if not over:
        return None
    return Verdict(passed=True, reason=f"{tally.rows} images in {now - tally.since:.0f} s, {tally.failed} failed")


def _timed(rollout: Rollout, latencies: Latencies, base: Latencies) -> bool:
    """Whether no more batches need be timed. A predecessor that nobody asked anything has no times to wait for."""
    return rollout.max_slowdown == inf or not base.kinds or sum(pair.batches for pair in _comparable(latencies, base)) >= ENOUGH


class _Pair(NamedTuple):
    """Kinds of batches that can be compared, `batches` of each: ours may take `factor` times as long as theirs."""

    ours: Hashable
    theirs: Hashable
    batches: int
    factor: float


def _comparable(latencies: Latencies, base: Latencies) -> list[_Pair]:
    """The kinds that both have times of; if there are none, for each of ours the one of theirs that is next to it."""
    pairs = [(kind, kind, 1.0) for kind in latencies.kinds if base.of(kind)]
    if not pairs:
        for ours in latencies.calls:
            others = sorted((other for other in base.calls if other.labels == ours.labels), key=lambda other: other.pixels)
            larger = next((other for other in others if other.pixels >= ours.pixels), None)
            if larger is not None:
                pairs.append((ours, larger, 1.0))
            elif others:
                pairs.append((ours, others[-1], ours.pixels / others[-1].pixels))
    return [_Pair(ours, theirs, min(len(latencies.of(ours)), len(base.of(theirs))), factor) for ours, theirs, factor in pairs]


def compare_latencies(latencies: Latencies, base: Latencies, *, least: int = ENOUGH) -> float | None:
    """How many times as long batches take as those of the same kind took the other; None before `least` batches can be compared. Where no
    kind is the same, at least so many times.

    Below `ENOUGH` it is the median over the batches and not over their seconds: of so few, one slow call may be all that a kind has.
    """
    pairs = [
        (pair.batches, median(latencies.of(pair.ours)), median(base.of(pair.theirs)) * pair.factor) for pair in _comparable(latencies, base)
    ]
    compared = sum(count for count, _, _ in pairs)
    if compared < max(least, 1) or not all(theirs > 0 for _, _, theirs in pairs):
        return None
    if compared < ENOUGH:
        return median([ours / theirs for count, ours, theirs in pairs for _ in range(count)])
    return sum(count * ours for count, ours, _ in pairs) / sum(count * theirs for count, _, theirs in pairs)


def label_agreement(answer: NDArray[Any], shadow: NDArray[Any], signature: Signature, *, labels: bool) -> float | None:
    """The share of pixels (or images) that two answers give the same label. `labels`: they are labels, not scores.

    None for "restore", which has none: of its candidates failures and times alone are judged. The number of classes may differ.
    """
    if signature.task == "restore":
        return None
    ours, theirs = (answer, shadow) if labels else (answer.argmax(axis=1), shadow.argmax(axis=1))
    return float((ours == theirs).mean())
