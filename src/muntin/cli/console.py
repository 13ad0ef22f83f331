"""What every command shares: progress on a terminal, one JSON document where asked, one line and an exit code for a mistake."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from muntin.errors import DataError

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last output.")]
SHOWN = 12
"""Classes that are named in a line."""
UNBOUNDED = 10_000
"""Columns that no table has."""


def print_json(document: Any) -> None:
    """One JSON document on standard output; in ASCII where it holds what the output's encoding does not, as a name that is no UTF-8."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=1, allow_nan=False, default=str)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def memory_advice(error: BaseException) -> str:
    """What to do where memory is out; numpy says how much it wanted, PyTorch too."""
    wanted = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
    return (
        f"not enough memory{wanted}: choose a smaller --tile, --size or --batch where the command has it, a smaller training.batch_size or "
        "data.crop to train, or a machine with more"
    )


def accept_any_name() -> None:
    """Lets both outputs write names that their encoding does not have: by the numbers of their bytes, where it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_table(table: Table) -> None:
    """A table on standard output: in a pipe as wide as it is, since nobody's window cuts it there; on a terminal its cells fold."""
    for column in table.columns:
        if not column.no_wrap:
            column.overflow = "fold"
    if out.file.isatty():
        out.print(table)
        return
    wide = Console(file=out.file, width=UNBOUNDED, highlight=False, emoji=False)
    wide.print(table, width=wide.measure(table).maximum)


def say(text: str) -> None:
    """A line for a person, on standard error, so that standard output stays what was asked for."""
    err.print(text, markup=False)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """`advance(done, total)` for a bar on a terminal; in a pipe it shows nothing."""
    if not err.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(description: str) -> Iterator[Callable[[str], None]]:
    """`stage(name)` for work that has named stages and no count; in a pipe it shows nothing."""
    if not err.is_terminal:
        yield lambda name: None
        return
    with err.status(Text(description)) as spinner:  # as it is: a path may look like markup
        yield lambda name: spinner.update(Text(f"{description}: {name}"))


def refuse_unwritable(output: Path) -> None:
    """Raises DataError where no folder can be made, or nothing written into it: before the work, not after it."""
    target = output.resolve()
    there = next(path for path in (target, *target.parents) if os.path.lexists(path))  # what is missing below it will be made
    if not there.is_dir():
        raise DataError(f"--output {output}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"--output {output}: nothing may be written in {there}: change its permissions or name another folder")
