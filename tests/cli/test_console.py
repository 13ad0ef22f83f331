from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from muntin.cli.console import notes_once, print_json, print_table, say, status


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


def test_notes_before_the_first_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with status("exporting", begin=notes_once(["other programs use this machine"])) as stage:
        assert not capsys.readouterr().err
        stage("a")
        stage("b")
    assert capsys.readouterr().err == "note      other programs use this machine\n"
