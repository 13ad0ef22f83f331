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

from muntin.cli.console import err, out, print_json, print_notes, progress_bar, refuse_unwritable, say
from muntin.cli.options import JsonOption
from muntin.text import count, number_format

if TYPE_CHECKING:
    from muntin.training import FitProgress, FitResult, Recipe

Set = Annotated[list[str] | None, typer.Option("--set", help="Replace a value of the recipe, e.g. --set training.steps=200; repeatable.")]


def fit_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; `muntin init DIR` writes one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/NAME by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint; keys of training except gate_budget may have changed.")
    ] = False,
    set_: Set = None,
    json: JsonOption = False,
) -> None:
    """Train a model by a recipe."""
    from muntin.training import load_recipe

    result = fit_with_progress(load_recipe(recipe, set_ or ()), root=recipe.resolve().parent, directory=output, resume=resume, quiet=json)
    if json:
        print_json({**asdict(result), "validation": result.validation})
    else:
        describe_fit(result)
    if result.interrupted:
        places = [] if output is None else ["--output", str(output)]
        changes = [word for change in set_ or () for word in ("--set", change)]
        again = shlex.join(["muntin", "fit", str(recipe), *places, *changes, "--resume"])
        say(f"muntin: interrupted after step {result.step} of {result.steps}; `{again}` goes on")
        raise typer.Exit(1)


def fit_with_progress(recipe: Recipe, *, root: Path, directory: Path | None, resume: bool, quiet: bool) -> FitResult:
    """Run `fit` with a bar on a terminal. Notes are printed at once on standard error, unless `quiet`; the result holds them, too."""
    from muntin.training import fit

    refuse_unwritable(directory or Path("runs") / recipe.name)  # before the data are checked, which may take minutes
    with training_bar(recipe.task) as report:

        def show(progress: FitProgress) -> None:
            if progress.kind == "note":
                if not quiet:
                    say(f"note      {progress.note}")
            else:
                report("training", progress)

        return fit(recipe, root=root, directory=directory, resume=resume, report=show)


@contextmanager
def training_bar(task: str) -> Iterator[Callable[[str, FitProgress], None]]:
    """Yield `report(description, progress)`, which moves a bar on a terminal and does nothing in a pipe."""
    if not err.is_terminal:
        yield lambda description, progress: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=err) as bar:
        shown = bar.add_task("", total=None, figures="")

        def report(description: str, progress: FitProgress) -> None:
            label = "checking data" if progress.kind == "check" else description
            bar.update(shown, description=label, completed=progress.step, total=progress.steps)
            if progress.kind == "step":
                bar.update(shown, figures=_figures(progress, task))

        yield report


def _figures(progress: FitProgress, task: str) -> str:
    metric = "mIoU" if task == "segment" else "accuracy"
    score = "" if progress.score is None else f"  validation {metric} {progress.score:.3f}"
    return f"loss {progress.loss:.3f}  {progress.images_per_second:.0f} images/s{score}"


def describe_fit(result: FitResult) -> None:
    """Print the end of a run, without its notes, which were printed before."""
    out.print(f"trained   {result.step} of {result.steps} steps in {result.seconds:.0f} s, {result.precision}")
    if result.validation:
        out.print(f"score     {result.validation[-1]['score']:.4f} on the validation split")
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
    if session.signature != signature:
        raise ArtifactError(
            f"{artifact} is not for this run's data (another task, channels or classes): give one that `muntin export {checkpoint}` writes"
        )
    with progress_bar(f"evaluating {split}") as advance:
        result = evaluate(session, source.split(split), tile=tile or tile_of(loaded.recipe.data.crop), progress=advance)
    notes = (*broken_off(loaded), *result.notes)
    if json:
        print_json({"split": split, "engine": session.engine, "score": result.score, **asdict(result), "notes": notes})
        return
    metric = "mIoU" if result.task == "segment" else "accuracy"
    numbers = number_format(session.precision, integers=artifact is not None and open_artifact(artifact).manifest.integers)
    out.print(f"{metric} {result.score:.4f} on {split} ({count(result.samples, 'sample')}), {session.engine}, {numbers}")
    out.print(f"  {'IoU' if result.task == 'segment' else 'recall'} of each class:")
    for name, value in result.by_class.items():
        out.print(f"  {name:<20} {'-' if value is None else f'{value:.4f}'}")
    print_notes(notes)
