"""`muntin search`: the command and its progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from muntin.cli.console import err, notes_once, out, print_json, refuse_unwritable, say, status
from muntin.cli.options import JsonOption
from muntin.cli.search.description import amount, choices, describe_architectures, duration, plan_lines, search_record
from muntin.cli.start import first_process, prepare_torch, refuse_without_gradients
from muntin.progress import only_display

if TYPE_CHECKING:
    from muntin.searching import SearchSettings
    from muntin.searching.architecture_search import SearchStage, SearchStageReport

FOLDER = "search"
"""Folder of a search beside the run's name: runs/NAME-search."""
STAGES = {
    "data": "checking data: {done} of {total}",
    "plan": "the plan",
    "study": "candidates: {done} of {total}{text}",
    "train": "trained alone: {done} of {total}, now {text}",
}


def search_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; its model gives the fields that the space does not name.")],
    space: Annotated[Path | None, typer.Option(help="A YAML file of choices, each with a list of values; by default the task's.")] = None,
    objective: Annotated[str, typer.Option(help="What to make least: latency (measured in INT8), size or memory.")] = "latency",
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of this call, latencies included, above 0; unset: each training has the recipe's steps."),
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Networks to try by short trainings; a search goes on with more.")] = 40,
    finalists: Annotated[int, typer.Option(min=1, help="Architectures of the front to train alone and to deploy.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the search; runs/NAME-search by default.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a value of the recipe; repeatable.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing; without --minutes three steps are timed.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Search a network for a recipe's data and this machine, and train and deploy the best few.

    Networks are tried by short trainings of the very recipe, of which the best third goes on, and by the latency of the deployed network,
    its size or its memory; the presets come first. A search that was interrupted, or that its minutes ended, goes on with the same command.
    """
    refuse_without_gradients(recipe)
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.errors import RecipeError
    from muntin.reporting.front.search_page import write_search
    from muntin.reporting.text import METRICS
    from muntin.searching import SearchPlan, SearchSettings, load_space, plan_search, search_architectures
    from muntin.searching.architecture_search import document
    from muntin.training import load_recipe

    if not first_process():
        raise RecipeError("muntin search works in one process: start it without torchrun")
    loaded = load_recipe(recipe, set_ or ())
    settings = SearchSettings(
        objective=objective, minutes=minutes, candidates=candidates, finalists=finalists,  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = None if space is None else load_space(space)
    folder = output or Path("runs") / f"{loaded.name}-{FOLDER}"
    root = recipe.resolve().parent
    if dry_run:
        with _shown(notes_once(() if json else notes), objective) as report:
            plan = plan_search(loaded, chosen, folder=folder, root=root, settings=settings, report=report)
        if json:
            print_json(plan.row())
        else:
            out.print("\n".join(plan_lines(plan)))
        return
    refuse_unwritable(folder)

    def show_plan(plan: SearchPlan) -> None:
        if not json:
            say("\n".join(plan_lines(plan)))

    with _shown(notes_once(() if json else notes), objective) as report:
        result = search_architectures(
            loaded, chosen, folder=folder, root=root, settings=settings, report=report, planned=show_plan
        )  # fmt: skip
    metric = METRICS[loaded.task].name + METRICS[loaded.task].unit_after
    page = write_search(folder, search_record(result, title=f"{loaded.name}: search", metric=metric)) if result.finished else None
    if json:
        print_json({**document(result), "page": page, "notes": [*notes, *result.notes]})
    else:
        describe_architectures(result, metric)
        if page is not None:
            out.print(f"page      {page}")
    if not result.finished:
        reason = "the minutes ended before a network was trained" if result.out_of_time else "interrupted"
        say(f"muntin: {reason}; `{_same_command(recipe, space, settings, output, set_ or ())}` goes on")
        raise typer.Exit(1)


def _same_command(recipe: Path, space: Path | None, settings: SearchSettings, output: Path | None, changes: Sequence[str]) -> str:
    """The command of a search, without options that have their default."""
    options = {"space": space, "output": output, **asdict(settings)}
    usual = {"space": None, "output": None, **asdict(type(settings)())}
    given = [word for name, value in options.items() if value != usual[name] for word in (f"--{name}", str(value))]
    return shlex.join(["muntin", "search", str(recipe), *given, *(word for change in changes for word in ("--set", change))])


@contextmanager
def _shown(begin: Callable[[], None], objective: str) -> Iterator[SearchStageReport]:
    """Show the stage, and on a terminal the front as it grows; in a pipe a line now and then."""
    if not err.is_terminal:
        with status("search") as stage:

            def say_stage(progress: SearchStage) -> None:
                begin()
                stage(_words(progress))

            yield say_stage
        return
    with only_display(), Live(console=err, transient=True, auto_refresh=False) as live:

        def show(progress: SearchStage) -> None:
            begin()
            parts: list[Text | Table] = [Text(f"search: {_words(progress)}")]
            if progress.front:
                parts.append(_front_table(progress, objective))
            live.update(Group(*parts), refresh=True)

        yield show


def _words(progress: SearchStage) -> str:
    words = STAGES[progress.stage].format(done=progress.done, total=progress.total, text=progress.text)
    return words if progress.left is None else f"{words}, about {duration(progress.left)} left"


def _front_table(progress: SearchStage, objective: str) -> Table:
    table = Table("network", "score, short training", objective, "choices")
    for point in progress.front:
        table.add_row(f"{point.number + 1:03d}", f"{point.score:.4f}", amount(point.cost, objective), choices(point.chosen))
    return table
