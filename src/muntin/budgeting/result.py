"""Result of a search within a budget: the chosen model, the trials as plain rows, and notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from muntin.artifact import Artifact
from muntin.budgeting.budget import Budget, TrialVerdict
from muntin.budgeting.forecast import SearchForecast
from muntin.budgeting.scores import Score, least_certain_drop, samples_to_certify
from muntin.budgeting.search import front
from muntin.budgeting.trials import Trial
from muntin.models.compression_record import Change

SearchOutcome = Literal["kept", "uncertain", "not reachable", "not tried"]
FP32, INT8 = "FP32", "INT8"
"""Names of the reference and of trial 0."""


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """State of a search.

    `trials`: those so far; `number`: of the trial; `what`: part of the tables that is measured; `loss`: of the step; `forecast`: at the
    start; `note`: what the evaluation data can certify.
    """

    stage: Literal["plan", "reference", "tables", "trial", "train", "holdout", "note"]
    trials: tuple[Trial, ...] = ()
    number: int = 0
    what: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    forecast: SearchForecast | None = None
    note: str = ""


SearchReport = Callable[[SearchProgress], None]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """The figures to report, on data that the search has not seen: scores, and the `interval` of the drop (95 %), None without samples."""

    reference: float
    score: float
    drop: float
    interval: tuple[float, float] | None
    samples: int | None


@dataclass(frozen=True, kw_only=True, repr=False)
class CompressionResult:
    """The result of `muntin.compress`.

    `model`: for PyTorch, in integers; a copy of the FP32 model if nothing was tried. `artifact`: the chosen one, or the reference's.
    `kept`: True if its measured drop is within the budget; `outcome` "kept": with the certainty of `Budget.confidence` on other data, too,
    "uncertain": on the samples of `evaluate` only. `best`: the chosen trial. `rows`: plain values of the reference and each trial.
    `changes`: what the passes did to the model. `noise`: by how much two calls of `evaluate` differ.
    """

    model: nn.Module
    artifact: Artifact
    kept: bool
    outcome: SearchOutcome
    budget: Budget
    reference: float
    noise: float
    best: Trial | None
    trials: tuple[Trial, ...]
    rows: tuple[dict[str, Any], ...]
    holdout: Holdout | None
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    folder: Path

    def __repr__(self) -> str:
        """Outcome and chosen artifact in one line: the model alone would be hundreds."""
        drop = "" if self.best is None else f" drop {self.best.drop:.4f}, at most {self.budget.max_drop:g},"
        return f"<CompressionResult: {self.outcome},{drop} {self.artifact.bytes:,} bytes, {self.artifact.path}>"

    @property
    def front(self) -> tuple[Trial, ...]:
        return tuple(front(self.trials, self.budget.objective))


def trial_name(number: int | None) -> str:
    """Return the name of a row: FP32 without a number, INT8 for trial 0."""
    return FP32 if number is None else INT8 if number == 0 else f"trial {number}"


def rows_of(reference: Mapping[str, Any], artifact: Path, trials: Iterable[Trial]) -> tuple[dict[str, Any], ...]:
    """Return plain values of the reference, whose `trial` is None, and of each trial; measurements of a failed one are None."""
    measured = {key: reference[key] for key in ("score", "bytes", "ms")}
    first = {"trial": None, "width": 1.0, "drop": 0.0, "bound": 0.0, **measured, "kept": True, "verdict": "kept", "artifact": str(artifact)}
    return (first, *map(_row, trials))


def _row(trial: Trial) -> dict[str, Any]:
    plan = trial.plan
    common: dict[str, Any] = {"trial": trial.number, "width": plan.width, "limit": trial.limit, "harm": plan.harm, "cost": plan.cost}
    common |= {"kept": trial.within, "verdict": trial.verdict}
    if trial.failed:
        return {**common, **dict.fromkeys(("score", "drop", "bound", "bytes", "ms", "artifact")), "failed": trial.failed}
    measured = {"score": trial.score, "drop": trial.drop, "bound": trial.bound, "bytes": trial.bytes, "ms": trial.ms}
    return {**common, **measured, "artifact": str(trial.artifact)}


def outcome_of(best: Trial | None) -> SearchOutcome:
    """Return the outcome of a search by its best trial."""
    if best is None:
        return "not tried"
    outcomes: dict[TrialVerdict, SearchOutcome] = {"kept": "kept", "uncertain": "uncertain"}
    return outcomes.get(best.verdict, "not reachable")


def certainty_note(reference: Score, budget: Budget, int8: Trial | None = None) -> str:
    """Return which drop the samples of `evaluate` can certify, and what to do if that is more than the budget.

    Samples of 0 and 1 tell it before anything is compressed; of others, the margin of plain INT8 does. Empty without a statement.
    """
    samples, confidence = reference.samples, budget.confidence
    if confidence is None:
        return ""
    if samples is None or len(samples) < 2:
        got = "one number" if samples is None else "one sample"
        return f"evaluate returned {got}: the measured drop counts as it is, without a margin for data that it has not seen"
    percent = f"{100 * confidence:g}"
    least = least_certain_drop(samples, confidence)
    if least is not None:
        text = f"{len(samples)} samples certify no drop below {least:.2g} ({percent} % certainty)"
        if least > budget.max_drop > 0:
            needed = samples_to_certify(budget.max_drop, confidence)
            text += f"; for {budget.max_drop:g} give at least {needed} samples, a greater drop or a smaller confidence"
        return text
    if int8 is None or int8.failed:
        return ""
    margin = int8.bound - int8.drop
    text = f"{len(samples)} blocks or images tell INT8's drop to within {margin:.2g} ({percent} % certainty)"
    if margin > budget.max_drop:
        text += f": no drop of {budget.max_drop:g} is certain: give more images, a greater drop or a smaller confidence"
    return text


def outcome_notes(trials: Iterable[Trial], best: Trial | None, budget: Budget, *, unreachable: bool) -> list[str]:
    """Return notes on a budget that is not kept, or not with certainty."""
    trials = list(trials)
    failed = [trial for trial in trials if trial.failed]
    notes = [f"{trial_name(trial.number)} failed: {trial.failed}" for trial in failed]
    if best is None:
        return notes
    if best.verdict == "broken":
        what = "the least harmful plan loses more, too" if unreachable else f"none of {len(trials)} trials keeps it"
        notes.append(f"a drop of at most {budget.max_drop:g} was not reached: {what}; the result is the trial with the least drop")
    elif best.verdict == "uncertain":
        text = (
            f"{trial_name(best.number)} keeps the budget on the samples of evaluate, but not with a certainty of {budget.confidence} on "
            f"others, where it may lose {best.bound:.4f}"
        )
        certain = [trial for trial in trials if trial.verdict == "kept"]
        if certain:
            cheapest = min(certain, key=lambda trial: trial.cost(budget.objective))
            text += f"; {trial_name(cheapest.number)} keeps it with that certainty ({cheapest.bytes / 1e6:.3f} MB, {cheapest.ms:.2f} ms)"
        notes.append(text)
    return notes
