from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from muntin import progress
from muntin.budgeting import display
from muntin.budgeting.budget import Objective
from muntin.budgeting.display import shown_search, stage_text
from muntin.budgeting.forms.plans import Plan
from muntin.budgeting.result import SearchProgress
from muntin.budgeting.trials import Trial


@pytest.mark.parametrize(("objective", "least"), [("size", "smallest so far 0.100 MB"), ("latency", "fastest so far 2.00 ms")])
def test_search_on_a_terminal(monkeypatch: pytest.MonkeyPatch, objective: Objective, least: str) -> None:
    measured = [(0.3, 90_000, 1.0, False), (0.9, 300_000, 4.0, True), (0.5, 100_000, 3.0, True), (0.8, 200_000, 2.0, True)]
    trials = tuple(
        Trial(
            number=number,
            plan=Plan(),
            limit=0,
            score=score,
            drop=0,
            bound=0,
            bytes=size,
            ms=ms,
            verdict="kept" if kept else "broken",
            accepted=kept,
            seconds=1,
            folder=Path(),
        )
        for number, (score, size, ms, kept) in enumerate(measured, start=1)
    )
    terminal = Console(file=StringIO(), force_terminal=True, width=200, markup=False, highlight=False)
    for module in (progress, display):
        monkeypatch.setattr(module, "stderr_console", lambda: terminal)
    with shown_search(objective) as show:
        show(SearchProgress(stage="trial", trials=trials[:2], number=3))
        show(SearchProgress(stage="trial", trials=trials, number=5))
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    fronts = [line.partition("front so far: ")[2].strip() for line in text.splitlines() if "front so far" in line]
    assert fronts == (["1", "1, 2", "1, 3, 2", "1, 3, 4, 2"] if objective == "size" else ["1", "1, 2", "1, 3, 2", "1, 4, 2"])
    assert stage_text(SearchProgress(stage="trial", trials=trials, number=5), objective) == f"trial 5; {least}"


def test_search_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[SearchProgress] = []
    state = SearchProgress(stage="note", note="150 samples")
    with shown_search("size") as show, shown_search("size", seen.append) as called:
        show(state)
        called(state)
    assert capsys.readouterr().err == "note      150 samples\n" and seen == [state]
