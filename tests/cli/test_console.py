from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from muntin.cli.console import print_json, print_table, progress_bar, say, status


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


def test_progress_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as advance, status("thinking") as stage:
        advance(1, 2)
        stage("hard")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


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
