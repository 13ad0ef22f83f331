"""`muntin compress RUN --max-drop`: the search within a budget of accuracy, its progress and its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Column, Table

from muntin.cli.console import notes_once, out, print_json, print_notes, print_table, say, status
from muntin.cli.start import first_process, prepare_torch

if TYPE_CHECKING:
    from muntin.budgeting.pipeline import CompressionResult, Holdout, Progress, SearchProgress
    from muntin.budgeting.trials import Trial
    from muntin.reporting.front import FrontRecord


def compress_within(
    run: Path,
    output: Path | None,
    *,
    max_drop: float,
    objective: str,
    minutes: float | None,
    trials: int | None,
    steps: int | None,
    overrides: Sequence[str],
    json: bool,
) -> None:
    """Search, print the trials and the chosen one. Exits with 1 if no trial keeps the budget."""
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.budgeting import Budget
    from muntin.budgeting.pipeline import TRIALS
    from muntin.budgeting.run import FOLDER, compress_run
    from muntin.cli.compress import compression_recipe
    from muntin.errors import RecipeError
    from muntin.reporting.front import write_front
    from muntin.training import find_checkpoint, read_checkpoint

    if objective not in ("size", "latency"):
        raise RecipeError(f"--objective '{objective}': give size or latency")
    if not first_process():
        raise RecipeError("--max-drop searches in one process: start it without torchrun")
    file = find_checkpoint(run)
    checkpoint = read_checkpoint(file)
    recipe = compression_recipe(checkpoint, overrides)
    checkpoint = replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))
    folder = output or file.parent.parent / FOLDER
    with _shown(notes_once(() if json else notes), quiet=json) as progress:
        result = compress_run(
            checkpoint, Budget(max_drop=max_drop, objective=objective), folder, steps=steps, minutes=minutes,  # type: ignore[arg-type]
            trials=TRIALS if trials is None else trials, progress=progress,
        )  # fmt: skip
    metric = "mIoU" if recipe.task == "segment" else "accuracy"
    page = write_front(folder, front_record(result, title=recipe.name, metric=metric))
    if json:
        print_json({**_document(result), "page": page, "notes": [*notes, *result.notes]})
    else:
        describe_search(result, metric)
        out.print(f"page      {page}")
    if not result.kept:
        raise typer.Exit(1)


@contextmanager
def _shown(begin: Callable[[], None], *, quiet: bool) -> Iterator[Progress]:
    """Show what is tried, and a line for each trial that has ended."""
    told: set[int] = set()
    with status("reference") as stage:

        def show(progress: SearchProgress) -> None:
            begin()
            for trial in progress.trials:
                if trial.number not in told and not quiet:
                    say(f"trial {trial.number:<3} {_words(trial)}")
                told.add(trial.number)
            stage(_stage(progress))

        yield show


def _stage(progress: SearchProgress) -> str:
    kept = [trial.bytes for trial in progress.trials if trial.kept]
    best = f"; smallest so far {min(kept) / 1e6:.3f} MB" if kept else ""
    if progress.stage == "train":
        return f"trial {progress.number}, step {progress.step} of {progress.steps}{best}"
    return {
        "reference": "the FP32 model's artefact", "tables": f"harm and cost of the forms of each layer{best}",
        "trial": f"trial {progress.number}{best}", "holdout": "the held-out data",
    }[progress.stage]  # fmt: skip


def _words(trial: Trial) -> str:
    ending = "kept" if trial.kept else "too much lost"
    return f"{trial.bytes / 1e6:.3f} MB, {trial.ms:.2f} ms, score {trial.score:.4f} ({-trial.drop:+.4f}): {ending}"


def describe_search(result: CompressionResult, metric: str) -> None:
    """Print the trials, the chosen one and its figures."""
    table = Table("", *(Column(name, justify="right") for name in ("width", metric, "change", "MB", "ms")), "budget", "front")
    on_front = {trial.number for trial in result.front}
    for row in result.rows:
        number = row["trial"]
        name = f"trial {number}" if number else "FP32"
        change = f"{-row['drop']:+.4f}" if number else ""
        kept = ("kept" if row["kept"] else "broken") if number else ""
        table.add_row(
            name, f"{row['width']:g}", f"{row['score']:.4f}", change, f"{row['bytes'] / 1e6:.3f}", f"{row['ms']:.2f}", kept,
            "yes" if number in on_front else "",
        )  # fmt: skip
    print_table(table)
    best = result.best
    if best is not None:
        first = result.rows[0]
        ratio = first["bytes"] / best.bytes
        out.print(f"chosen    trial {best.number}: {ratio:.1f} times fewer bytes, {first['ms'] / best.ms:.2f} times the speed of FP32")
    if result.holdout is not None:
        out.print(f"held out  {_figures(result.holdout, metric)}")
    print_notes(result.notes)
    out.print(f"wrote     {result.artifact.path}")


def _figures(held: Holdout, metric: str) -> str:
    within = "" if held.interval is None else f", 95 % interval of the change {-held.interval[1]:+.4f} to {-held.interval[0]:+.4f}"
    return f"{metric} {held.score:.4f}, FP32 {held.reference:.4f} ({-held.drop:+.4f}){within}"


def front_record(result: CompressionResult, *, title: str, metric: str) -> FrontRecord:
    """The values of the page of a search."""
    from importlib.metadata import version

    from muntin.reporting.front import FrontRecord
    from muntin.runtime import describe_hardware

    points = [
        {
            "number": row["trial"], "name": f"trial {row['trial']}" if row["trial"] else "FP32", "width": row["width"],
            "score": row["score"], "drop": row["drop"], "bytes": row["bytes"], "ms": row["ms"], "kept": row["kept"],
            "artifact": Path(row["artifact"]).relative_to(result.folder).as_posix(),
        }
        for row in result.rows
    ]  # fmt: skip
    held = "" if result.holdout is None else f"On held-out data: {_figures(result.holdout, metric)}."
    return FrontRecord.model_validate(
        {
            "muntin": version("muntin"), "created": datetime.now(UTC).isoformat(timespec="seconds"), "title": title, "metric": metric,
            "objective": result.budget.objective, "max_drop": result.budget.max_drop,
            "chosen": None if result.best is None else result.best.number, "held_out": held, "notes": result.notes,
            "hardware": describe_hardware(), "points": points,
        }
    )  # fmt: skip


def _document(result: CompressionResult) -> dict[str, Any]:
    return {
        "outcome": result.outcome, "kept": result.kept, "max_drop": result.budget.max_drop, "objective": result.budget.objective,
        "reference": result.reference, "noise": result.noise, "chosen": None if result.best is None else result.best.number,
        "artifact": result.artifact.path, "folder": result.folder, "rows": result.rows, "front": [trial.number for trial in result.front],
        "holdout": None if result.holdout is None else asdict(result.holdout),
    }  # fmt: skip
