"""Output that every command shares: tables, notes, progress, one JSON document."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from textwrap import wrap
from threading import Event, Thread
from time import monotonic
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from muntin.errors import DataError

out = Console(markup=False, highlight=False, soft_wrap=True, emoji=False)
err = Console(markup=False, highlight=False, soft_wrap=True, emoji=False, stderr=True)

SHOWN = 12
"""Maximum number of class names in a line."""
UNBOUNDED = 10_000
"""Width, in columns, of the console that measures a table."""
LINE, INDENT = 100, 10
"""Width of a wrapped sentence, and of the label before it, in columns."""
FIRST_S, EVERY_S = 5.0, 30.0
"""Seconds until the first line of progress in a pipe or a file, and between two lines."""


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


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line on standard error, because standard output holds only results; or on `stream`."""
    if stream is None:
        err.print(text)
    else:
        print(text, file=stream, flush=True)


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
def progress_lines(text: str) -> Iterator[Callable[[str, float | None], None]]:
    """Print what a command does on standard error, where that is no terminal: after `FIRST_S`, then every `EVERY_S` seconds.

    Yields `show(text, left)`, which sets the text of the next line and the seconds left; None prints the seconds since the start instead.
    """
    shown: tuple[str, float | None] = (text, None)
    ended, started = Event(), monotonic()
    stream = sys.stderr  # not that of the moment: PyTorch's exporter is silenced by another one

    def show(text: str, left: float | None) -> None:
        nonlocal shown
        shown = (text, left)

    def print_lines() -> None:
        pause = FIRST_S
        while not ended.wait(pause):
            (text, left), pause = shown, EVERY_S
            line = f"{text}, {_clock(monotonic() - started)} so far" if left is None else f"{text}, {_clock(left)} left"
            with suppress(ValueError):  # it is closed
                say(line, stream)

    thread = Thread(target=print_lines, name="muntin-progress", daemon=True)
    thread.start()
    try:
        yield show
    finally:
        ended.set()
        thread.join()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_bar(description: str, rate: str = "") -> Iterator[Callable[[float, float], None]]:
    """Yield `advance(done, total)`, which moves a bar on a terminal and sets the line that is printed elsewhere (`progress_lines`).

    `rate`: unit of the number done a second, such as "images/s"; empty: it is not shown. Threads may advance it.
    """
    started = monotonic()

    def speed(done: float) -> str:
        number = done / (monotonic() - started)
        return f"{number:.1f} {rate}" if rate and number >= 1 else f"{number:.2g} {rate}" if rate else ""

    if not err.is_terminal:
        with progress_lines(description) as show:

            def set_line(done: float, total: float) -> None:
                number = f"{done:.0f}" if abs(done - round(done)) < 0.01 else f"{done:.1f}"
                text = ", ".join(filter(None, (f"{description}: {number} of {total:.0f}", speed(done))))
                show(text, (monotonic() - started) / done * (total - done) if done else None)

            yield set_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(description, total=None, speed="")
        yield lambda done, total: bar.update(task, completed=done, total=total, speed=speed(done))


@contextmanager
def status(description: str, *, begin: Callable[[], None] = lambda: None) -> Iterator[Callable[[str], None]]:
    """Yield `stage(name)`, which shows a stage on a terminal and sets the line that is printed elsewhere (`progress_lines`).

    `begin` is called at each stage, before it is shown (`notes_once`).
    """
    if not err.is_terminal:
        with progress_lines(description) as show:

            def say_stage(name: str) -> None:
                begin()
                show(f"{description}: {name}", None)

            yield say_stage
        return
    with err.status(Text(description)) as spinner:  # Text, because rich reads "[x]" in a str as markup

        def show_stage(name: str) -> None:
            begin()
            spinner.update(Text(f"{description}: {name}"))

        yield show_stage


def refuse_unwritable(output: Path) -> None:
    """Raise DataError where the folder cannot be created or written into. Called before long work."""
    target = output.resolve()
    parent = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not parent.is_dir():
        raise DataError(f"--output {output}: {parent} is a file: name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--output {output}: nothing may be written in {parent}: change its permissions or name another folder")
