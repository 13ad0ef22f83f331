"""`muntin fit` and `muntin evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from muntin.cli.console import (
    err,
    notes_once,
    out,
    print_json,
    print_notes,
    progress_bar,
    progress_lines,
    refuse_unwritable,
    say,
    say_notes,
)
from muntin.cli.options import JsonOption
from muntin.cli.start import first_process, prepare_torch, refuse_without_gradients
from muntin.text import count, number_format

if TYPE_CHECKING:
    from muntin.training import FitProgress, FitResult, Recipe

Set = Annotated[list[str] | None, typer.Option("--set", help="Replace a value of the recipe, e.g. --set training.steps=200; repeatable.")]


def fit_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; `muntin init DIR` writes one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/NAME by default.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest checkpoint, refused without one; keys of training except gate_budget may have changed.",
        ),
    ] = False,
    set_: Set = None,
    json: JsonOption = False,
) -> None:
    """Train a model by a recipe."""
    refuse_without_gradients(recipe)
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.training import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    begin = notes_once(notes if first_process() and not json else ())
    result = fit_with_progress(loaded, root=recipe.resolve().parent, directory=output, resume=resume, quiet=json, begin=begin)
    if not first_process():
        raise typer.Exit(result.interrupted)
    if json:
        print_json({**asdict(result), "validation": result.validation, "notes": [*notes, *result.notes]})
    else:
        describe_fit(result)
    if result.interrupted:
        places = [] if output is None else ["--output", str(output)]
        changes = [word for change in set_ or () for word in ("--set", change)]
        again = shlex.join(["muntin", "fit", str(recipe), *places, *changes, "--resume"])
        say(f"muntin: interrupted after step {result.step} of {result.steps}; `{again}` goes on")
        raise typer.Exit(1)


def fit_with_progress(
    recipe: Recipe, *, root: Path, directory: Path | None, resume: bool, quiet: bool, begin: Callable[[], None]
) -> FitResult:
    """Run `fit` with a bar on a terminal. Notes are printed at once on standard error, unless `quiet`; the result holds them, too.

    `begin` is called when work begins, after the checks that may refuse it.
    """
    from muntin.training import fit

    refuse_unwritable(directory or Path("runs") / recipe.name)  # before the data are checked, which may take minutes
    with training_bar(recipe.task) as report:

        def show(progress: FitProgress) -> None:
            if progress.kind != "check":
                begin()
            if progress.kind == "note":
                if not quiet:
                    say_notes([progress.note])
            else:
                report("training", progress)

        return fit(recipe, root=root, directory=directory, resume=resume, report=show)


@contextmanager
def training_bar(task: str) -> Iterator[Callable[[str, FitProgress], None]]:
    """Yield `report(description, progress)`, which moves a bar on a terminal and sets the line that is printed elsewhere.

    A process that `torchrun` started after the first one shows nothing.
    """
    if not first_process():
        yield lambda description, progress: None
        return
    if not err.is_terminal:
        with progress_lines("preparing") as show:

            def report(description: str, progress: FitProgress) -> None:
                if progress.kind != "note":
                    show(*_line(description, progress, task))

            yield report
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=err) as bar:
        shown = bar.add_task("preparing", total=None, figures="")

        def move(description: str, progress: FitProgress) -> None:
            if progress.kind == "validating":  # the bar stays at the step
                bar.update(shown, description=f"validating {progress.step}/{progress.steps}")
            elif progress.kind != "note":
                bar.update(shown, description=_label(description, progress), completed=progress.step, total=progress.steps)
            if progress.kind == "step":
                bar.update(shown, figures=_figures(progress, task))

        yield move


def _label(description: str, progress: FitProgress) -> str:
    if progress.kind == "check":
        return "checking data"
    return f"preparing {description}" if progress.kind == "prepare" else description


def _line(description: str, progress: FitProgress, task: str) -> tuple[str, float | None]:
    """Return a line for a pipe or a file, without the time left, and the seconds left if known."""
    if progress.kind == "prepare":
        return _label(description, progress), None
    doing = f"{description}, validating" if progress.kind == "validating" else _label(description, progress)
    figures = _figures(progress, task)
    return f"{doing}: {progress.step} of {progress.steps}{figures and f', {figures}'}", progress.seconds_left


def _figures(progress: FitProgress, task: str) -> str:
    parts = [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
    if (rate := progress.images_per_second) is not None:
        parts.append(f"{rate:.{0 if rate >= 10 else 1}f} images/s")
    if progress.score is not None:
        parts.append(f"validation {'mIoU' if task == 'segment' else 'accuracy'} {progress.score:.3f}")
    return ", ".join(parts)


def describe_fit(result: FitResult) -> None:
    """Print the end of a run, without its notes, which were printed before."""
    out.print(f"trained   {result.step} of {result.steps} steps in {result.seconds:.0f} s, {result.precision}")
    if result.validation:
        last = result.validation[-1]
        out.print(f"score     {last['score']:.4f} on the validation split ({'mean IoU' if 'miou' in last else 'accuracy'})")
    out.print(f"wrote     {result.checkpoint}")


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, one of its checkpoints, or an artefact that lies in a run's folder.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    artifact: Annotated[Path | None, typer.Option(help="Evaluate this artefact instead, on the data of the run.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="The artefact's engine: openvino (the default), onnxruntime, onnxruntime-cuda or onnxruntime-tensorrt."),
    ] = None,
    tile: Annotated[int | None, typer.Option(min=1, help="Side of the tiles, pixels; twice the training crop by default.")] = None,
    json: JsonOption = False,
) -> None:
    """Score a checkpoint, or an artefact exported from it, on a split of its data."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.artifact import open_artifact
    from muntin.artifact.store import MANIFEST
    from muntin.compression import load_model
    from muntin.compression.stages import broken_off
    from muntin.data.source import SPLITS
    from muntin.deployment.run_artifacts import run_of
    from muntin.errors import ArtifactError, RecipeError
    from muntin.models import TorchSession
    from muntin.runtime import load
    from muntin.runtime.options import DEFAULT_ENGINE
    from muntin.runtime.tiles import check_tiles
    from muntin.training import evaluate, read_checkpoint
    from muntin.training.checkpoint import source_of
    from muntin.training.evaluation import tile_of

    if split not in SPLITS:
        raise RecipeError(f"split '{split}': give one of {', '.join(SPLITS)}")
    if artifact is None and (checkpoint / MANIFEST).is_file():
        checkpoint, artifact = run_of(checkpoint), checkpoint
    if engine is not None and artifact is None:
        raise RecipeError(f"--engine {engine} is an artefact's, and a checkpoint runs in PyTorch: give --artifact too, or leave it out")
    loaded = read_checkpoint(checkpoint)
    signature = loaded.signature
    if tile is not None and signature.task == "classify":
        raise RecipeError(f"--tile {tile}: the run's task is classify, and its pictures are taken whole: leave it out")
    source = source_of(loaded)
    session: Any = load(artifact, engine=engine or DEFAULT_ENGINE) if artifact else TorchSession(load_model(loaded), signature)
    if artifact is None and loaded.quantized:
        session.engine += ", simulating integers"
    if session.signature.model_copy(update={"sizes": signature.sizes}) != signature:
        raise ArtifactError(
            f"{artifact} is not for this run's data (another task, channels or classes): give one that `muntin export {checkpoint}` writes"
        )
    if tile is not None:
        check_tiles(session, tile=tile, overlap=None)
    say_notes(() if json else start)
    with progress_bar(f"evaluating {split}") as advance:
        result = evaluate(session, source.split(split), tile=tile or tile_of(loaded.recipe.data.crop), progress=advance)
    notes = (*broken_off(loaded), *result.notes)
    if json:
        print_json({"split": split, "engine": session.engine, "score": result.score, **asdict(result), "notes": (*start, *notes)})
        return
    metric = "mIoU" if result.task == "segment" else "accuracy"
    numbers = number_format(session.precision, integers=artifact is not None and open_artifact(artifact).manifest.integers)
    out.print(f"{metric} {result.score:.4f} on {split} ({count(result.samples, 'sample')}), {session.engine}, {numbers}")
    out.print(f"  {'IoU' if result.task == 'segment' else 'recall'} of each class:")
    for name, value in result.by_class.items():
        out.print(f"  {name:<20} {'-' if value is None else f'{value:.4f}'}")
    print_notes(notes)
