"""The bar of a run on a terminal, and its lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from muntin.artifact.answers import ANSWERS, Task
from muntin.progress import only_display, progress_lines, stderr_console
from muntin.training.progress.report import FitProgress, FitReport


@contextmanager
def shown_fit(task: Task, progress: bool | FitReport) -> Iterator[FitReport]:
    """Yield the report of a training: a bar, or lines; `progress` itself if it is a function; silence if it is False."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda progress: None
    else:
        with training_display(task) as report:
            yield lambda progress: report("training", progress)


@contextmanager
def training_display(task: Task) -> Iterator[Callable[[str, FitProgress], None]]:
    """Yield `report(description, progress)`, which moves a bar on a terminal and sets the line that is printed elsewhere."""
    if not stderr_console().is_terminal:
        with progress_lines("preparing") as show:

            def report(description: str, progress: FitProgress) -> None:
                if progress.kind != "note":
                    show(*_line(description, progress, task))

            yield report
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # only where it is shown

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[position]}"),
        TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with only_display() as free, Progress(*columns, console=stderr_console(), disable=not free) as bar:
        shown = bar.add_task("preparing", total=None, position="", figures="")

        def move(description: str, progress: FitProgress) -> None:
            if progress.kind == "validating":  # the bar stays at the step
                bar.update(shown, description=f"validating {progress.step}/{progress.steps}")
            elif progress.kind != "note":
                done, total = (progress.step, progress.steps) if progress.share is None else (progress.share, 1)
                bar.update(shown, description=_label(description, progress), completed=done, total=total, position=_position(progress))
            if progress.kind == "step":
                bar.update(shown, figures=_figures(progress, task))

        yield move


def _label(description: str, progress: FitProgress) -> str:
    if progress.kind == "check":
        return "checking data"
    return progress.note or f"preparing {description}" if progress.kind == "prepare" else description


def _line(description: str, progress: FitProgress, task: Task) -> tuple[str, float | None]:
    """Return a line for a pipe or a file, without the time left, and the seconds left if known."""
    if progress.kind == "prepare":
        return _label(description, progress), None
    doing = f"{description}, validating" if progress.kind == "validating" else _label(description, progress)
    figures = _figures(progress, task)
    return f"{doing}: {_position(progress)}{figures and f', {figures}'}", progress.seconds_left


def _position(progress: FitProgress) -> str:
    return progress.position if progress.kind in ("step", "validation") else f"{progress.step} of {progress.steps}"


def _figures(progress: FitProgress, task: Task) -> str:
    parts = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
    if (rate := progress.images_per_second) is not None:
        parts.append(f"{rate:.{0 if rate >= 10 else 1}f} images/s")
    if progress.waiting is not None:
        parts.append(f"waiting for input {progress.waiting:.0%}")
    if progress.score is not None:
        parts.append(f"validation {ANSWERS[task].score.name} {ANSWERS[task].score(progress.score)}")
    return ", ".join(parts)
