"""Progress of a search on standard error: its plan, what the data can certify, each trial, and the work in progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from muntin.budgeting.budget import Objective
from muntin.budgeting.result import SearchProgress, SearchReport, trial_name
from muntin.budgeting.search import front
from muntin.budgeting.trials import Trial
from muntin.progress import status, stderr_console

VERDICTS = {
    "kept": "kept", "uncertain": "kept on these samples, not certain on others", "broken": "too much lost", "failed": "failed",
}  # fmt: skip
"""Verdicts on trials in words."""


@contextmanager
def shown_search(
    objective: Objective, progress: bool | SearchReport = True, *, begin: Callable[[], None] = lambda: None
) -> Iterator[SearchReport]:
    """Yield the report of a search: lines for its plan and notes, on a terminal one for each trial, and the work in progress.

    `progress`: False shows the work in progress only; a function is called instead. `begin`: called before anything is shown.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    told: set[int] = set()
    with status("compressing") as stage:

        def show(state: SearchProgress) -> None:
            begin()
            if progress:
                _print_lines(state, objective, told)
            if text := stage_text(state, objective):
                stage(text)

        yield show


def plan_lines(state: SearchProgress) -> list[str]:
    """Return what a search is going to do, with a label before the first line."""
    lines = [] if state.forecast is None else state.forecast.text.splitlines()
    return [f"{'' if index else 'plan':<10}{line}" for index, line in enumerate(lines)]


def _print_lines(state: SearchProgress, objective: Objective, told: set[int]) -> None:
    console = stderr_console()
    for line in (*plan_lines(state), *([f"{'note':<10}{state.note}"] if state.note else [])):
        console.print(line)
    for index, trial in enumerate(state.trials, start=1):
        if trial.number not in told and console.is_terminal:
            points = ", ".join(map(str, (point.number for point in front(state.trials[:index], objective))))
            console.print(f"{trial_name(trial.number):<10}{trial_text(trial)}; front so far: {points}")
        told.add(trial.number)


def stage_text(state: SearchProgress, objective: Objective) -> str:
    """Return the work in progress, and the best trial so far; empty for a plan and a note."""
    costs, best = [trial.cost(objective) for trial in state.trials if trial.within], ""
    if costs:
        best = f"; smallest so far {min(costs) / 1e6:.3f} MB" if objective == "size" else f"; fastest so far {min(costs):.2f} ms"
    name = f"trial {state.number}" if state.number else "plain INT8"
    if state.stage == "train":
        return f"{name}, step {state.step} of {state.steps}{best}"
    if state.stage == "tables":
        return f"tables: {state.what} {state.step} of {state.steps}{best}"
    return {"reference": "the FP32 model's artifact", "trial": f"{name}{best}", "holdout": "the held-out data"}.get(state.stage, "")


def trial_text(trial: Trial) -> str:
    """Return size, latency, score and verdict of a trial, or why it failed."""
    if trial.failed:
        return f"failed: {trial.failed}"
    return f"{trial.bytes / 1e6:.3f} MB, {trial.ms:.2f} ms, score {trial.score:.4f} ({-trial.drop:+.4f}): {VERDICTS[trial.verdict]}"
