"""docs/cli.md says what the command line's own declarations say."""

from __future__ import annotations

import io
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from muntin.cli import COMMANDS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(DOCS / "make_cli_reference.py"), run_name="__main__")
    return printed.getvalue()


def test_committed_page_is_current(page: str) -> None:
    committed = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert committed == page, "write it again: python docs/make_cli_reference.py > docs/cli.md"


def test_every_command_has_a_section(page: str) -> None:
    sections = [line.removeprefix("## muntin ") for line in page.splitlines() if line.startswith("## ")]
    assert sections == list(COMMANDS)


def test_every_row_has_a_label_and_help(page: str) -> None:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    options = [row for row in rows if row[0] not in ("name", "---")]
    assert len(options) > 50
    assert not [row for row in options if len(row) != 4 or len(row[3]) < 5]


def test_names_ranges_and_defaults(page: str) -> None:
    serve = page.partition("## muntin serve\n")[2].partition("\n## ")[0]
    assert "| `--http-port` | whole number from 0 to 65535 | `8000` | HTTP port; 0: any free port. |" in serve
    assert "| `--watch` |  |  | " in serve
    fit = page.partition("## muntin fit\n")[2].partition("\n## ")[0]
    assert "| `--output`, `-o` | path |  | " in fit
    assert "| RECIPE | path | required | " in fit
