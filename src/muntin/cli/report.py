"""`muntin report` and `muntin demo`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.compare import print_artifacts, print_size
from muntin.cli.console import notes_once, out, print_json, print_notes, print_table, refuse_unwritable, say, status
from muntin.cli.options import CheckpointArgument, JsonOption, TrustOption
from muntin.cli.start import prepare_torch

if TYPE_CHECKING:
    from muntin.training import Recipe

REPORT_LOCK = ".report.lock"
"""Name of the lock of `report` and `demo` in the folder of the report. `fit` and `compress` have locks of their own."""


def report_command(
    run: CheckpointArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report; the run's own by default.")] = None,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Quantise, export, verify and measure a run on its test split; write report.html and report.json."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.artifact.file_lock import folder_in_use
    from muntin.training import find_checkpoint, read_checkpoint

    checkpoint = find_checkpoint(run)
    read_checkpoint(checkpoint, check=False, trust_code=trust_code)
    folder = output or checkpoint.parent.parent
    refuse_unwritable(folder)
    with folder_in_use(folder, "muntin report", name=REPORT_LOCK) as locked:
        notes = (*start, *locked)
        _finish(checkpoint, folder, json, notes_once(() if json else notes), before=notes)


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/demo"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace a value of the recipe, e.g. --set seed=1; repeatable.")] = None,
    json: JsonOption = False,
) -> None:
    """Train, compress, export, verify and measure a model of a satellite photograph, and report. Run again, it continues."""
    from muntin.artifact.file_lock import folder_in_use

    start = prepare_torch()  # before PyTorch is imported
    from muntin.training import load_recipe

    with resources.as_file(resources.files("muntin") / "recipes" / "demo.yaml") as path:
        recipe = load_recipe(path, set_ or ())
    refuse_unwritable(output)
    with folder_in_use(output, "muntin demo", name=REPORT_LOCK) as locked:
        notes = (*start, *locked)
        _demo(recipe, output, json, notes)


def _demo(recipe: Recipe, output: Path, json: bool, before: tuple[str, ...]) -> None:
    """Run all steps of the demonstration, in a folder that no other process works in. `before`: notes to print when work begins."""
    from muntin.budgeting.run_budget import FOLDER
    from muntin.cli.compress import search_within, with_recipe
    from muntin.cli.train import describe_fit, fit_with_progress
    from muntin.training import read_checkpoint
    from muntin.training.checkpoint import checkpoints_in

    begun, begin = bool(checkpoints_in(output / "checkpoints")), notes_once(() if json else before)
    fitted = fit_with_progress(recipe, root=Path.cwd(), directory=output, resume=begun, quiet=json, begin=begin)
    if fitted.stop_requested:
        say(f"muntin: interrupted after step {fitted.step} of {fitted.steps}; the same command goes on")
        raise typer.Exit(1)
    if not json:
        describe_fit(fitted)
    found = search_within(with_recipe(read_checkpoint(fitted.checkpoint), recipe), output / FOLDER, (), json=json, quiet=json)
    _finish(fitted.checkpoint, output, json, begin, before=(*before, *fitted.notes, *found.notes))


def _leave_out_damaged_search(report: dict[str, Any]) -> None:
    """Replace the record of a search for a budget by a note, if the file was damaged."""
    from muntin.errors import MuntinError
    from muntin.reporting.front.schema import FORMAT, FrontRecord
    from muntin.reporting.records import parse_record

    if report["search"] is None:
        return
    try:
        parse_record(FrontRecord, report["search"], what="front", newest=FORMAT)
    except MuntinError as error:
        report["search"] = None
        report["notes"].append(f"the picture of the search for a budget is left out: its front.json is damaged: {error}")


def _finish(checkpoint: Path, directory: Path, json: bool, begin: Callable[[], None], *, before: Iterable[str] = ()) -> None:
    """Compare, write and print the report. `begin` is called when work begins. `before`: notes of earlier steps, repeated only in JSON."""
    from muntin.deployment.comparison import compare
    from muntin.reporting import terminal_table, write_report
    from muntin.reporting.text import METRICS, percent
    from muntin.training import read_checkpoint

    with status("assessing", begin=begin) as stage:
        report: dict[str, Any] = compare(read_checkpoint(checkpoint), directory, stage=stage)
    _leave_out_damaged_search(report)
    page = write_report(directory, report)
    if json:
        print_json({"report": page, **report, "notes": list(dict.fromkeys((*before, *report["notes"])))})
        return
    print_table(terminal_table(report))
    artifacts = report["artifacts"]
    if len(artifacts["rows"]) > 2:  # FP32 and one artefact are in the table of steps
        print_artifacts(artifacts, task=report["task"], title="deployed artefacts")
    print_size(artifacts)
    if report["agreement"] is not None:
        same = (
            "of the test labels are the same" if METRICS[report["task"]].same == "labels" else "of the restored values differ by at most 1"
        )
        out.print(f"agreement {percent(report['agreement'], 3)} {same} deployed and in PyTorch")
    print_notes(report["notes"])
    out.print(f"wrote     {page}")
