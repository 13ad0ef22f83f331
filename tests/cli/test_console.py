from __future__ import annotations

import re
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from queue import Queue
from time import sleep

import pytest
from rich.console import Console
from rich.table import Table

from muntin.cli import console
from muntin.cli.console import print_json, print_table, progress_bar, say, status
from muntin.cli.train import training_bar
from muntin.training import FitProgress


def test_say_prints_markup_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """No markup, no emoji, no wrapping: paths and class names are the user's."""
    line = f"[red]x[/red] :smile: {'long ' * 60}[/] \\[a]"
    say(line)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{line}\n")


def test_print_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"path": Path("a/b"), "name": "über", "none": None})
    assert capsys.readouterr().out == '{\n "path": "a/b",\n "name": "über",\n "none": null\n}\n'
    print_json({"name": "\udcffü"})
    assert capsys.readouterr().out == '{\n "name": "\\udcff\\u00fc"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"x": float("nan")})


def test_status_with_a_path_like_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("muntin.cli.console.err", terminal)
    with status("loading runs/[final]/a[/b]") as stage:
        stage("[red]")
    assert isinstance(terminal.file, StringIO)
    assert "loading runs/[final]/a[/b]" in terminal.file.getvalue()


def test_progress_of_short_work_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as advance, status("thinking") as stage:
        advance(1, 2)
        stage("hard")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_beside_silenced_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "FIRST_S", 0.01)
    shown, silenced = StringIO(), StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with status("exporting"), redirect_stderr(silenced):
        while not shown.getvalue():
            sleep(0.01)
    assert shown.getvalue().startswith("exporting, 0:00:0") and not silenced.getvalue()


def test_progress_of_long_work_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Queue[str] = Queue()
    for name, value in (("FIRST_S", 0.01), ("EVERY_S", 0.01), ("say", lambda text, stream: lines.put(text))):
        monkeypatch.setattr(console, name, value)

    def await_line(pattern: str) -> None:
        while not re.fullmatch(pattern, lines.get(timeout=60)):
            pass

    with progress_bar("working") as advance:
        await_line(r"working, \d:\d\d:\d\d so far")
        advance(1, 2)
        await_line(r"working: 1 of 2, \d:\d\d:\d\d left")
    with progress_bar("predicting", "images/s") as advance:
        advance(3, 4)
        await_line(r"predicting: 3 of 4, \d+\.\d images/s, \d:\d\d:\d\d left")
        advance(0.25, 1)
        await_line(r"predicting: 0.2 of 1, \d+(\.\d+)? images/s, \d:\d\d:\d\d left")
    with status("thinking") as stage:
        stage("hard")
        await_line(r"thinking: hard, \d:\d\d:\d\d so far")
    with training_bar("segment") as report:
        for progress, line in (
            (FitProgress(kind="check", step=3, steps=9), r"checking data: 3 of 9, .* so far"),
            (FitProgress(kind="prepare", step=0, steps=9), r"preparing w4a8, .* so far"),
            (
                FitProgress(kind="step", step=1, steps=9, loss=0.5, images_per_second=2, waiting=0.031, seconds_left=75),
                r"w4a8: step 1 of 9, loss 0.500, 2.0 images/s, waiting for input 3%, 0:01:15 left",
            ),
            (FitProgress(kind="validating", step=1, steps=4), r"w4a8, validating: 1 of 4, .* so far"),
            (FitProgress(kind="validation", step=1, steps=9, score=0.25), r"w4a8: step 1 of 9, validation mIoU 0.250, .* so far"),
            (FitProgress(kind="step", step=8, steps=31, share=0.256), r"w4a8: step 8, 26% done, .* so far"),
        ):
            report("w4a8", progress)
            await_line(line)


def test_training_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("muntin.cli.train.err", terminal)
    with training_bar("classify") as report:
        report("training", FitProgress(kind="step", step=1, steps=9, loss=0.5, images_per_second=20, seconds_left=75))
        report("training", FitProgress(kind="validating", step=1, steps=4))
    assert isinstance(terminal.file, StringIO)
    assert re.search(r"validating 1/4 .*step 1 of 9.*loss 0.500, 20 images/s", terminal.file.getvalue())


def test_run_limited_in_time_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr("muntin.cli.train.err", terminal)
    with training_bar("segment") as report:
        report("training", FitProgress(kind="step", step=2, steps=31, share=0.25))
        report("training", FitProgress(kind="step", step=9, steps=12, share=0.75))
    assert isinstance(terminal.file, StringIO)
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.file.getvalue()).rpartition("training ")[2]
    assert re.match(r"━{30}╺━{9} step 9, 75% done ", last)


def test_table_width_in_a_pipe_and_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "figure")
    table.add_row("n" * 90, "f" * 40)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert any("n" * 90 in line and "f" * 40 in line for line in lines)

    class Window(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Console(file=Window(), force_terminal=True, width=80)
    monkeypatch.setattr("muntin.cli.console.out", terminal)
    print_table(table)
    assert isinstance(terminal.file, StringIO)
    shown = terminal.file.getvalue()
    assert (shown.count("n"), shown.count("f"), "…" in shown) == (91, 41, False)
