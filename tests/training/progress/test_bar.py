from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from muntin import progress
from muntin.training import FitProgress
from muntin.training.progress import bar
from muntin.training.progress.bar import shown_fit, training_display


@pytest.mark.parametrize(
    ("reported", "line"),
    [
        (FitProgress(kind="check", step=3, steps=9), "checking data: 3 of 9"),
        (FitProgress(kind="prepare", step=0, steps=9), "preparing w4a8"),
        (
            FitProgress(kind="step", step=1, steps=9, loss=0.5, images_per_second=2, waiting=0.031, seconds_left=75),
            "w4a8: step 1 of 9, loss 0.500, 2.0 images/s, waiting for input 3%",
        ),
        (FitProgress(kind="validating", step=1, steps=4), "w4a8, validating: 1 of 4"),
        (FitProgress(kind="validation", step=1, steps=9, score=0.25), "w4a8: step 1 of 9, validation mIoU 0.250"),
        (FitProgress(kind="step", step=8, steps=31, share=0.256), "w4a8: step 8, 26% done"),
        (FitProgress(kind="note", step=1, steps=9, note="a note"), "preparing"),
    ],
)
def test_line_of_a_training(reported: FitProgress, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_S", "EVERY_S"):
        monkeypatch.setattr(progress, name, 0.01)
    pipe = StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    ending = "0:01:15 left" if reported.seconds_left else r"0:00:\d\d so far"
    with training_display("segment") as report:
        report("w4a8", reported)
        while not re.search(f"^{re.escape(line)}, {ending}$", pipe.getvalue(), re.MULTILINE):
            pass


def test_training_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(bar, "stderr_console", lambda: terminal)
    with shown_fit("classify", True) as report:
        report(FitProgress(kind="step", step=1, steps=9, loss=0.5, images_per_second=20, seconds_left=75))
        report(FitProgress(kind="validating", step=1, steps=4))
    assert re.search(r"validating 1/4 .*step 1 of 9.*loss 0.500, 20 images/s", shown.getvalue())
    seen: list[FitProgress] = []
    with shown_fit("classify", seen.append) as report, shown_fit("classify", False) as silent:
        report(FitProgress(kind="check", step=0, steps=9))
        silent(FitProgress(kind="check", step=1, steps=9))
    assert [reported.step for reported in seen] == [0]


def test_run_limited_in_time_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(bar, "stderr_console", lambda: terminal)
    with shown_fit("segment", True) as report:
        report(FitProgress(kind="step", step=2, steps=31, share=0.25))
        report(FitProgress(kind="step", step=9, steps=12, share=0.75))
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.getvalue()).rpartition("training ")[2]
    assert re.match(r"━{30}╺━{9} step 9, 75% done ", last)
