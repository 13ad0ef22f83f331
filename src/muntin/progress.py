"""Progress of long work on standard error: a bar or a spinner on a terminal, elsewhere a line now and then.

A process has one display at a time. Work inside other work, such as an export inside a command, shows nothing of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from threading import Event, Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is imported when something is shown: the processes of a server show nothing
    from rich.console import Console

FIRST_S, EVERY_S = 5.0, 30.0
"""Seconds until the first line of progress in a pipe or a file, and between two lines."""
OnStage = Callable[[str], None]
"""Called with the name of each stage when it begins."""
_display = Lock()


@cache
def stderr_console() -> Console:
    """Return the console of standard error. Notebooks get lines, because a bar would need ipywidgets."""
    from rich.console import Console

    return Console(markup=False, highlight=False, soft_wrap=True, emoji=False, stderr=True, force_jupyter=False)


@contextmanager
def only_display() -> Iterator[bool]:
    """Yield True, and hold the process's display during the block; False inside another such block, also one of another thread."""
    free = _display.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            _display.release()


@contextmanager
def progress_lines(text: str) -> Iterator[Callable[[str, float | None], None]]:
    """Print a line on standard error after `FIRST_S`, then every `EVERY_S` seconds.

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
                print(line, file=stream, flush=True)

    with only_display() as free:
        if not free or stream is None:  # a program without a console has no standard error
            yield show
            return
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

    if not stderr_console().is_terminal:
        with progress_lines(description) as show:

            def set_line(done: float, total: float) -> None:
                number = f"{done:.0f}" if abs(done - round(done)) < 0.01 else f"{done:.1f}"
                text = ", ".join(filter(None, (f"{description}: {number} of {total:.0f}", speed(done))))
                show(text, (monotonic() - started) / done * (total - done) if done else None)

            yield set_line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with only_display() as free, Progress(*columns, console=stderr_console(), transient=True, disable=not free) as bar:
        task = bar.add_task(description, total=None, speed="")
        yield lambda done, total: bar.update(task, completed=done, total=total, speed=speed(done))


@contextmanager
def status(description: str, progress: bool | OnStage = True) -> Iterator[OnStage]:
    """Yield `stage(name)`, which shows a stage on a terminal and sets the line that is printed elsewhere (`progress_lines`).

    `progress`: False shows nothing; a function is called with the name of each stage instead.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda name: None
    elif not stderr_console().is_terminal:
        with progress_lines(description) as show:
            yield lambda name: show(f"{description}: {name}", None)
    else:
        from rich.text import Text

        with only_display() as free:
            if not free:
                yield lambda name: None
                return
            with stderr_console().status(Text(description)) as spinner:  # Text, because rich reads "[x]" in a str as markup
                yield lambda name: spinner.update(Text(f"{description}: {name}"))
