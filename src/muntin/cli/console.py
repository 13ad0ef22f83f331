"""Output that every command shares: tables, notes, progress, one JSON document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table

from muntin import progress
from muntin.errors import DataError

out = Console(markup=False, highlight=False, soft_wrap=True, emoji=False)
err = progress.stderr_console()

SHOWN = 12
"""Maximum number of class names in a line."""
UNBOUNDED = 10_000
"""Width, in columns, of the console that measures a table."""
LINE, INDENT = 100, 10
"""Width of a wrapped sentence, and of the label before it, in columns."""


def print_json(document: Any) -> None:
    """Print one JSON document on standard output. Raises ValueError for numbers that are not finite (see `finite`).

    ASCII only where the output's encoding lacks a character, such as an escaped byte of a file name that is not UTF-8.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=1, allow_nan=False, default=str)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """Return the value with None for each number that is not finite, also inside dictionaries and lists."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def accept_any_name() -> None:
    """Let both outputs escape characters that their encoding lacks instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_table(table: Table) -> None:
    """Print a table on standard output: its cells fold on a terminal; in a pipe it is as wide as its contents, without padding."""
    for column in table.columns:
        if not column.no_wrap:
            column.overflow = "fold"
    if out.file.isatty():
        out.print(table)
        return
    wide = Console(file=out.file, width=UNBOUNDED, markup=False, highlight=False, emoji=False)
    with wide.capture() as captured:
        wide.print(table, width=wide.measure(table).maximum)
    for line in filter(None, map(str.rstrip, captured.get().splitlines())):
        out.print(line)


def print_wrapped(text: str) -> None:
    """Print a sentence after a label of `INDENT` columns on standard output, in lines of at most `LINE` columns."""
    for line in wrap(text, LINE, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False):
        out.print(line)


def print_notes(notes: Iterable[object]) -> None:
    """Print a line for each note on standard output."""
    for note in notes:
        out.print(f"note      {note}")


def say(text: str) -> None:
    """Print a line on standard error, because standard output holds only results."""
    err.print(text)


def say_notes(notes: Iterable[object]) -> None:
    """Print a line for each note on standard error, at once: a command's results come later."""
    for note in notes:
        say(f"note      {note}")


def notes_once(notes: Iterable[object]) -> Callable[[], None]:
    """Return a function whose first call prints the notes on standard error: when work begins, after the checks that may refuse it."""
    left = list(notes)

    def begin() -> None:
        say_notes(left)
        left.clear()

    return begin


@contextmanager
def status(description: str, *, begin: Callable[[], None] = lambda: None) -> Iterator[Callable[[str], None]]:
    """Show stages as `progress.status` does. `begin` is called at each stage, before it is shown (`notes_once`)."""
    with progress.status(description) as show:

        def stage(name: str) -> None:
            begin()
            show(name)

        yield stage


def refuse_unwritable(output: Path) -> None:
    """Raise DataError where the folder cannot be created or written into. Called before long work."""
    target = output.resolve()
    parent = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not parent.is_dir():
        raise DataError(f"--output {output}: {parent} is a file: name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--output {output}: nothing may be written in {parent}: change its permissions or name another folder")
