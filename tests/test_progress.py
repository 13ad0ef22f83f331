"""Progress on a terminal and in a pipe, of one display at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from queue import Queue
from time import sleep

import pytest
from rich.console import Console

from muntin import progress
from muntin.progress import progress_bar, status


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """Standard error as a terminal of 80 columns."""
    shown = StringIO()
    console = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return shown


class Lines(StringIO):
    """Standard error in a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue[str] = Queue()

    def write(self, text: str) -> int:
        self.queue.put(text)
        return len(text)

    def wait_for(self, pattern: str) -> None:
        while not re.fullmatch(pattern, self.queue.get(timeout=60)):
            pass


def lines_at_once(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Return what replaces standard error, on which lines come at once. No fixture, after which pytest would set standard error anew."""
    for name in ("FIRST_S", "EVERY_S"):
        monkeypatch.setattr(progress, name, 0.01)
    pipe = Lines()
    monkeypatch.setattr("sys.stderr", pipe)
    return pipe


def test_status_with_a_path_like_markup(terminal: StringIO) -> None:
    with status("loading runs/[final]/a[/b]") as stage:
        stage("[red]")
    assert "loading runs/[final]/a[/b]" in terminal.getvalue()


def test_short_work_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as advance:
        advance(1, 2)
    with status("thinking") as stage:
        stage("hard")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_lines_beside_silenced_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.01)
    shown, silenced = StringIO(), StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    with status("exporting"), redirect_stderr(silenced):
        while not shown.getvalue():
            sleep(0.01)
    assert shown.getvalue().startswith("exporting, 0:00:0") and not silenced.getvalue()


def test_lines_of_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_at_once(monkeypatch)
    with progress_bar("working") as advance:
        lines.wait_for(r"working, \d:\d\d:\d\d so far")
        advance(1, 2)
        lines.wait_for(r"working: 1 of 2, \d:\d\d:\d\d left")
    with progress_bar("predicting", "images/s") as advance:
        advance(3, 4)
        lines.wait_for(r"predicting: 3 of 4, \d+\.\d images/s, \d:\d\d:\d\d left")
        advance(0.25, 1)
        lines.wait_for(r"predicting: 0.2 of 1, \d+(\.\d+)? images/s, \d:\d\d:\d\d left")
    with status("thinking") as stage:
        stage("hard")
        lines.wait_for(r"thinking: hard, \d:\d\d:\d\d so far")


@contextmanager
def both() -> Iterator[None]:
    with status("outer"), status("inner") as inner, progress_bar("bar") as advance:
        inner("stage")
        advance(1, 2)
        yield


def test_work_inside_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_at_once(monkeypatch)
    with both():
        lines.wait_for("outer, .* so far")
        lines.wait_for("outer, .* so far")
    seen = [lines.queue.get() for _ in range(lines.queue.qsize())]
    assert not [text for text in seen if text.startswith(("inner", "bar"))]
    with status("next"):  # the display is free again
        lines.wait_for("next, .* so far")


def test_work_inside_other_work_on_a_terminal(terminal: StringIO) -> None:
    with both():
        pass
    assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()
    with progress_bar("next") as advance:
        advance(1, 2)
    assert "next" in terminal.getvalue()


def test_progress_by_a_function_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_at_once(monkeypatch)
    stages: list[str] = []
    with status("exporting", stages.append) as stage, status("silent", False) as silent:
        stage("one")
        silent("two")
        sleep(0.05)
    assert stages == ["one"] and lines.queue.empty()
