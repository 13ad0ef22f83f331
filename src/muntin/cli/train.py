"""`muntin fit` and `muntin evaluate`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count as count_up
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from muntin.cli.console import (
    notes_once,
    out,
    print_json,
    print_notes,
    print_table,
    refuse_unwritable,
    say,
    say_notes,
    status,
)
from muntin.cli.options import JsonOption, TrustOption
from muntin.cli.start import first_process, prepare_torch, refuse_without_gradients
from muntin.errors import MuntinError, RecipeError
from muntin.progress import progress_bar
from muntin.text import count, number_format

if TYPE_CHECKING:
    from muntin.artifact.answers import Task
    from muntin.training import FitProgress, FitResult, Recipe

Set = Annotated[list[str] | None, typer.Option("--set", help="Replace a value of the recipe, e.g. --set training.steps=200; repeatable.")]


def fit_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A YAML recipe, or a folder of images as `muntin init` takes it: its recipe.yaml, which is written first if it has none."
        ),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; runs/NAME by default.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest checkpoint, refused without one; keys of training (not gate_budget, optimizer) may have "
            "changed, and data.workers and data.cache_mib.",
        ),
    ] = False,
    minutes: Annotated[float | None, typer.Option(help="Short for --set training.minutes=MINUTES.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Short for --set training.steps=STEPS.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Short for --set model.name=MODEL.", show_default=False)] = None,
    set_: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Take two steps on random crops, print their memory and whether it fits, and write nothing."),
    ] = False,
    show_crops: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Write a picture of the first training crops, augmented, with their masks or classes, and train nothing.",
        ),
    ] = None,
    supervise: Annotated[
        bool | None,
        typer.Option(
            help="Train in a child process; if the kernel kills it for lack of memory, go on from the newest checkpoint with less. By "
            "default where training.memory is set. Linux only.",
            show_default=False,
        ),
    ] = None,
    attempt: Annotated[int | None, typer.Option(hidden=True, help="Number of a supervised attempt, from 0.")] = None,
    json: JsonOption = False,
) -> None:
    """Train a model by a recipe, or on a folder of images."""
    refuse_without_gradients(recipe)
    short = {"training.minutes": minutes, "training.steps": steps, "model.name": model}
    changes = [*(set_ or ()), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    survey_notes: Sequence[str] = ()
    if recipe.is_dir():
        recipe, survey_notes = _recipe_of_folder(recipe, writes=not dry_run, quiet=json or attempt is not None)
    if attempt is None and not dry_run and show_crops is None and _supervised(supervise, recipe, changes):
        raise typer.Exit(_supervise(sys.argv[1:]))
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.training import load_recipe
    from muntin.training.checkpoint import checkpoints_in

    loaded = load_recipe(recipe, changes)
    if show_crops is not None:
        _show_crops(loaded, recipe.resolve().parent, show_crops, json=json)
        return
    if dry_run:
        _dry_run(loaded, recipe.resolve().parent, json=json)
        return
    if attempt:
        resume = bool(checkpoints_in((output or Path("runs") / loaded.name) / "checkpoints"))
    begin = notes_once(notes if first_process() and not json else ())
    result = fit_with_progress(loaded, root=recipe.resolve().parent, directory=output, resume=resume, quiet=json, begin=begin)
    if not first_process():
        raise typer.Exit(result.interrupted)
    if json:
        print_json({**asdict(result), "validation": result.validation, "notes": [*survey_notes, *notes, *result.notes]})
    else:
        describe_fit(result)
        if not result.interrupted:
            from muntin.models.trusted_code import is_code

            folder = str(result.directory)
            trusted = ["--trust-code"] if is_code(loaded.model.name) else []
            smaller = shlex.join(["muntin", "compress", folder, *trusted])
            out.print(f"next      `{shlex.join(['muntin', 'export', folder, *trusted])}`, or smaller: `{smaller}`")
    if result.interrupted:
        places = [] if output is None else ["--output", str(output)]
        words = [word for change in changes for word in ("--set", change)]
        again = shlex.join(["muntin", "fit", str(recipe), *places, *words, "--resume"])
        say(f"muntin: interrupted after step {result.step} of {result.steps}; `{again}` goes on")
        raise typer.Exit(1)


def _recipe_of_folder(folder: Path, *, writes: bool, quiet: bool) -> tuple[Path, Sequence[str]]:
    """The recipe of a folder of images, and the notes of its survey. Writes the recipe if there is none, and prints what was found."""
    from muntin.cli.models import describe_survey
    from muntin.data.recipe_wizard import write_recipe
    from muntin.tasks.folders import RECIPE_NAME

    path = folder / RECIPE_NAME
    if path.exists():
        if first_process() and not quiet:
            out.print(f"recipe    {path}, which exists already")
        return path, ()
    advice = f"{folder} has no {RECIPE_NAME}: write one first, by `{shlex.join(['muntin', 'init', str(folder)])}`"
    if not writes:
        raise RecipeError(f"--dry-run writes nothing, and {advice}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(f"several processes cannot write a recipe, and {advice}")
    path, survey = write_recipe(folder)
    if not quiet:
        describe_survey(path, survey)
    return path, survey.notes


def _supervised(requested: bool | None, recipe: Path, changes: Sequence[str]) -> bool:
    """Return True if training gets a parent: on request, or where `training.memory` is set. torchrun's agent is one already.

    Reads the recipe without PyTorch, whose memory the parent saves; mistakes in it are for the child to report.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    if sys.platform != "linux":
        if requested:
            raise RecipeError(f"--supervise: Linux tells why a process was killed, {sys.platform} does not: leave it out")
        return False
    if requested is not None:
        return requested
    import yaml

    given = [value for key, _, value in (change.partition("=") for change in changes) if key == "training.memory"]
    with suppress(OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        training = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("training") or {}
        value = yaml.safe_load(given[-1]) if given else training.get("memory")
        return value is not None
    return False


def _supervise(words: Sequence[str]) -> int:
    """Run `muntin fit` in a child, and again with less memory after each kill for lack of memory. Returns the last one's exit code.

    Ends, because each attempt takes less than the one before, and the least one fails with an error. Raises `MuntinError` for a child that
    was ended by another signal.
    """
    from muntin.runtime.host.supervised_process import run_muntin

    for attempt in count_up():
        end = run_muntin([*words, "--attempt", str(attempt)])
        if not end.for_memory:
            break
        say("muntin: the kernel killed the training for lack of memory: it goes on from the newest checkpoint with less")
    if end.signal is not None:
        reason = ", and the kernel killed no process for lack of memory in this time" if end.signal == "SIGKILL" else ""
        raise MuntinError(f"{end.signal} ended the training{reason}: with a checkpoint, --resume goes on from the newest one")
    return end.code


def _show_crops(recipe: Recipe, root: Path, file: Path, *, json: bool) -> None:
    """Write a picture of the first training crops of a recipe."""
    from muntin.data import open_source
    from muntin.deployment.pictures import write_crops
    from muntin.training.loop import training_crops
    from muntin.training.recipe import settled

    with status("making crops"):
        recipe = settled(recipe, root)
        source = open_source(recipe.data, task=recipe.task, root=root)
        number = write_crops(file, training_crops(recipe, source), source.classes, task=recipe.task)
    if json:
        print_json({"file": file, "crops": number, "augmentation": recipe.data.augmentation.model_dump(), "notes": source.notes})
        return
    out.print(
        f"wrote     {file}: {number} of the {recipe.training.batch_size} crops of the first step (data.augment: {recipe.data.augment})"
    )
    print_notes(source.notes)


def _dry_run(recipe: Recipe, root: Path, *, json: bool) -> None:
    """Print what a step takes of memory. Raises `MuntinError` with one line of advice if it does not fit."""
    from muntin.training.memory.budget import size
    from muntin.training.memory.dry_run import dry_run

    def shown(value: int | None, otherwise: str = "-") -> str:
        return otherwise if value is None else size(value)

    with status("taking steps"):
        result = dry_run(recipe, root=root)
    if json:
        print_json({**asdict(result), "advice": result.advice})
    else:
        table = Table("memory of a process", Column("formula", justify="right"), Column("measured", justify="right"))
        for entry in result.entries:
            table.add_row(entry.name, shown(entry.formula), shown(entry.measured))
        table.add_row("process before a step", "", shown(result.held))
        table.add_row("process at its peak", "", shown(result.peak))
        table.add_row(result.limit_name, "", shown(result.limit, "unknown"))
        print_table(table)
        levers = Table("change", Column("process at its peak", justify="right"), "", "fits")
        words = {None: "unknown", True: "yes", False: "no"}
        levers.add_row(f"none ({result.memory})", shown(result.peak), "measured", words[result.fits])
        for lever in result.levers:
            levers.add_row(lever.name, shown(lever.peak), "measured" if lever.measured else "formula", words[lever.fits])
        print_table(levers)
        out.print(f"computed  in {result.precision}, on {result.device}")
        print_notes(result.notes)
    if result.advice:
        raise MuntinError(result.advice)


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

        return fit(recipe, root=root, directory=directory, resume=resume, progress=show)


@contextmanager
def training_bar(task: Task) -> Iterator[Callable[[str, FitProgress], None]]:
    """Show steps as `training.progress.bar` does. A process that `torchrun` started after the first one shows nothing."""
    if not first_process():
        yield lambda description, progress: None
        return
    from muntin.training.progress.bar import training_display

    with training_display(task) as report:
        yield report


def describe_fit(result: FitResult) -> None:
    """Print the end of a run, without its notes, which were printed before."""
    out.print(f"trained   {result.step} of {result.steps} steps in {result.seconds:.0f} s, {result.precision}")
    if result.waiting is not None:
        out.print(f"input     {100 * result.waiting:.0f} % of the time spent waiting ({count(result.workers, 'worker')})")
    out.print(f"samples   {', '.join(f'{number} {name}' for name, number in result.splits.items())}")
    if (kept := result.result) is not None:
        low = result.precision.split()[0] in ("bf16", "fp16")
        out.print(f"score     {score_words(kept)}{f', in {result.precision.split()[0]}: `evaluate` computes in fp32' if low else ''}")
        best = max(point["score"] for point in result.validation)
        rank = "the best" if kept["score"] == best else f"the last (the best had {best:.4f})"
        out.print(f"weights   of step {kept['step']}, {rank} of {count(len(result.validation), 'validation')}")
    out.print(f"wrote     {result.checkpoint}")


def score_words(point: Mapping[str, Any]) -> str:
    """The score of a validation in words; of restore beside the input's."""
    if "psnr" in point:
        return f"PSNR {point['psnr']:.2f} dB on the validation split, the input has {point['input_psnr']:.2f} dB"
    return f"{point['score']:.4f} on the validation split ({'mean IoU' if 'miou' in point else 'accuracy'})"


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, one of its checkpoints, or an artefact that lies in a run's folder.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    artifact: Annotated[Path | None, typer.Option(help="Evaluate this artefact instead, on the data of the run.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="The artefact's engine: openvino (the default), onnxruntime, onnxruntime-cuda or onnxruntime-tensorrt."),
    ] = None,
    tile: Annotated[int | None, typer.Option(min=1, help="Side of the tiles, pixels; twice the training crop by default.")] = None,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Score a checkpoint, or an artefact exported from it, on a split of its data."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.artifact import open_artifact
    from muntin.artifact.store import MANIFEST
    from muntin.compression import load_model
    from muntin.data.source import SPLITS
    from muntin.deployment.run_artifacts import run_of
    from muntin.errors import ArtifactError
    from muntin.models import TorchSession
    from muntin.reporting.text import METRICS
    from muntin.runtime import load
    from muntin.runtime.options import DEFAULT_ENGINE
    from muntin.runtime.tiles import check_tiles
    from muntin.training import evaluate, read_checkpoint
    from muntin.training.checkpoint import source_of
    from muntin.training.evaluation import tile_of
    from muntin.training.fitting import broken_off

    if split not in SPLITS:
        raise RecipeError(f"split '{split}': give one of {', '.join(SPLITS)}")
    if artifact is None and (checkpoint / MANIFEST).is_file():
        checkpoint, artifact = run_of(checkpoint), checkpoint
    if engine is not None and artifact is None:
        raise RecipeError(f"--engine {engine} is an artefact's, and a checkpoint runs in PyTorch: give --artifact too, or leave it out")
    loaded = read_checkpoint(checkpoint, trust_code=trust_code)
    signature = loaded.signature
    if tile is not None and signature.answer.one:
        raise RecipeError(f"--tile {tile}: the run's task is {signature.task}, and its pictures are taken whole: leave it out")
    source = source_of(loaded)
    session: Any = load(artifact, engine=engine or DEFAULT_ENGINE) if artifact else TorchSession(load_model(loaded), signature)
    if artifact is None and loaded.quantized:
        session.engine += ", simulating integers"
    known = (signature, loaded.recipe.signature(loaded.state.classes))  # before `muntin relabel`, and after it
    if session.signature.model_copy(update={"sizes": signature.sizes}) not in known:
        raise ArtifactError(
            f"{artifact} is not for this run's data (another task, channels or classes): give one that `muntin export {checkpoint}` writes"
        )
    if tile is not None:
        check_tiles(session, tile=tile, overlap=None)
    say_notes(() if json else start)
    with progress_bar(f"evaluating {split}") as advance:
        result = evaluate(session, source.split(split), tile=tile or tile_of(loaded.recipe.data.crop), progress=advance)
    notes = (*broken_off(loaded), *result.notes)
    interval = result.interval
    if json:
        scores = {"score": result.score, "interval": interval, **asdict(result)}
        print_json({"split": split, "engine": session.engine, **scores, "notes": (*start, *notes)})
        return
    metric = METRICS[signature.task]
    numbers = number_format(session.precision, integers=artifact is not None and open_artifact(artifact).manifest.integers)
    samples = count(result.samples, "sample") + ("" if interval is None else f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}")
    out.print(f"{metric.name} {metric.exact(result.score)} on {split} ({samples}), {session.engine}, {numbers}")
    for line in result.lines(signature.scale):
        out.print(f"  {line}")
    if signature.answer.has_classes:
        out.print(f"  {metric.each} of each class:")
    pictures = result.pictures
    for number, (name, value) in enumerate(result.by_class.items()):
        of = f"  of {count(pictures[number], 'picture')}" if pictures else ""
        out.print(f"  {name:<20} {'-' if value is None else f'{value:.4f}'}{of}")
    print_notes(notes)
