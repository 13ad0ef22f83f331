"""`muntin compress` and `muntin quantize`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muntin.cli.console import notes_once, out, print_json, print_notes, say, status
from muntin.cli.options import JsonOption
from muntin.cli.start import first_process, prepare_torch, refuse_without_gradients
from muntin.cli.train import training_bar

if TYPE_CHECKING:
    from muntin.compression.stages import CompressionRun
    from muntin.models.compression_record import Stage
    from muntin.training import Checkpoint, FitProgress, Recipe

QUANTIZATION = ("quantization.calibration_images", "quantization.keep")
"""Keys of a recipe's `quantization` that compression uses."""


def compress_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints, trained by `muntin fit`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the stages, RUN/compressed by default, or of the trials, RUN/budget.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the stages in the folder.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value, e.g. --set compression.average_bits=5; repeatable.")
    ] = None,
    until: Annotated[str, typer.Option(help="The last stage to run: low-rank, w4a8 or mixed.")] = "mixed",
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Instead of the stages, search for the smallest model that loses at most this much of the validation metric, e.g. 0.01; "
            "a search that was interrupted goes on.",
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(help="With --max-drop: what to make least, size or latency.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="With --max-drop: no trial begins that would end later.")] = None,
    trials: Annotated[int | None, typer.Option(min=0, help="With --max-drop: most models to try; 12 by default.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="With --max-drop: training steps of each; by default those of the recipe's stages together.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a trained model small: within a budget of accuracy (--max-drop), or in three stages of the recipe.

    The stages are low rank, 4-bit training and mixed precision. With --max-drop, ranks, channels and bits are chosen together, and each
    candidate is trained, exported and scored as an artefact; exit code 1 if none keeps the budget.
    """
    refuse_without_gradients(checkpoint)
    own = {"--objective": objective, "--minutes": minutes, "--trials": trials, "--steps": steps}
    if max_drop is not None:
        if resume or until != "mixed":
            raise typer.BadParameter("--resume and --until are of the stages: leave them out with --max-drop, which goes on by itself")
        from muntin.cli.budget import compress_within

        compress_within(
            checkpoint, output, max_drop=max_drop, objective=objective or "size", minutes=minutes, trials=trials, steps=steps,
            overrides=set_ or (), json=json,
        )  # fmt: skip
        return
    if given := [name for name, value in own.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(given)}: give --max-drop too, such as --max-drop 0.01")
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.compression.stages import FOLDER
    from muntin.errors import RecipeError
    from muntin.models.compression_record import STAGES
    from muntin.training import find_checkpoint, read_checkpoint

    if until not in STAGES:
        raise RecipeError(f"--until '{until}': give one of {', '.join(STAGES)}")

    file = find_checkpoint(checkpoint)
    directory = output or file.parent.parent / FOLDER
    trained = read_checkpoint(file)
    begin = notes_once(notes if first_process() and not json else ())
    run = compress_with_progress(trained, directory, until=until, resume=resume, overrides=set_ or (), begin=begin)
    if not first_process():
        raise typer.Exit(run.interrupted)
    if json:
        document = {"directory": run.directory, "interrupted": run.interrupted, "checkpoint": run.checkpoint}
        print_json(document | {"stages": [asdict(stage) for stage in run.stages], "notes": [*notes, *run.notes]})
    else:
        describe_compression(run)
    if run.interrupted:
        changes = [word for change in set_ or () for word in ("--set", change)]
        places = [*(() if output is None else ("--output", str(output))), *(() if until == "mixed" else ("--until", until))]
        say(f"muntin: interrupted; `{shlex.join(['muntin', 'compress', str(checkpoint), *places, *changes, '--resume'])}` goes on")
        raise typer.Exit(1)


def compress_with_progress(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    until: Stage = "mixed",
    resume: bool,
    overrides: Sequence[str] = (),
    begin: Callable[[], None],
) -> CompressionRun:
    """Run `compress_checkpoint` and show its progress. `begin` is called when work begins, after the checks that may refuse it."""
    from muntin.compression.stages import compress_checkpoint

    recipe = compression_recipe(checkpoint, overrides)
    with training_bar(recipe.task) as report:

        def show(stage: str, progress: FitProgress) -> None:
            begin()
            report(stage, progress)

        return compress_checkpoint(
            checkpoint, directory, config=recipe.compression, quantization=recipe.quantization, until=until, resume=resume, report=show
        )


def compression_recipe(checkpoint: Checkpoint, overrides: Sequence[str]) -> Recipe:
    """The recipe of a checkpoint with values of its compression replaced. Raises RecipeError for other values."""
    from muntin.errors import RecipeError
    from muntin.training.recipe import override_recipe

    allowed = ("compression.", *(f"{key}=" for key in QUANTIZATION))
    other = next((override for override in overrides if not override.startswith(allowed)), None)
    if other is not None:
        raise RecipeError(
            f"'{other}': the model is trained already; only compression.KEY=VALUE can be set here, and {' and '.join(QUANTIZATION)}"
        )
    return override_recipe(checkpoint.recipe, overrides)


def describe_compression(run: CompressionRun) -> None:
    """Print the stages, ranks and bits of a compression."""
    from muntin.training import read_checkpoint

    for stage in run.stages:
        score = "" if stage.score is None else f", {stage.score:.4f} on the validation split"
        out.print(f"{stage.stage:<9} {stage.step} of {stage.steps} steps in {stage.seconds:.0f} s{score}")
    changes = read_checkpoint(run.checkpoint).changes
    kept = [change.kept for change in changes if change.pass_ == "low_rank"]
    if kept:
        out.print(f"ranks     {kept.count(False)} of {len(kept)} layers are factored")
    bits = [change.done for change in changes if change.pass_ == "mix"]
    if bits:
        out.print("bits      " + ", ".join(f"{bits.count(kind)} layers {kind}" for kind in sorted(set(bits))))
    print_notes(run.notes)
    out.print(f"wrote     {run.checkpoint}")


def quantize_command(
    model: Annotated[Path, typer.Argument(help="A float ONNX file of any model.")],
    calibration: Annotated[
        Path,
        typer.Option(help="Typical inputs: a .npz file with an array for each input by its name, or the .npy array of the only input."),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The ONNX file to write; MODEL-int8.onnx by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are computed at a time, where the model leaves their number free.")] = 8,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="A node that stays in floats; repeatable.")] = None,
    min_sqnr_db: Annotated[float, typer.Option(help="A product whose own rounding leaves less signal over noise stays in floats.")] = 15.0,
    json: JsonOption = False,
) -> None:
    """Quantise an ONNX file of any model to static INT8 without training; the result is an ONNX file, not an artefact."""
    from muntin.errors import ExportError
    from muntin.graph import quantize_onnx
    from muntin.graph.calibration_file import read_calibration
    from muntin.graph.onnx_file import read_float_model

    target = output or model.with_name(f"{model.stem}-int8.onnx")
    if target.resolve() in (model.resolve(), calibration.resolve()):
        raise ExportError(f"--output {target} would replace what is read: give another file")
    proto = read_float_model(model)
    batches = read_calibration(calibration, proto, batch)
    with status("quantising"):
        result = quantize_onnx(proto, batches, keep=keep or (), min_sqnr_db=min_sqnr_db)
    result.save(target)
    if json:
        document = {"output": target, "bytes": target.stat().st_size, "coverage": result.coverage, "notes": result.notes}
        print_json(document | {"products": [asdict(record) for record in result.products]})
        return
    integers = sum(record.bits == 8 for record in result.products)
    out.print(
        f"wrote     {target}: {target.stat().st_size / 1e6:.2f} MB (floats: {model.stat().st_size / 1e6:.2f}), {integers} of "
        f"{len(result.products)} products and {result.coverage:.1%} of the multiply-adds in INT8"
    )
    for record in result.products:
        if record.reason:
            out.print(f"kept      {record.name}: {record.reason}")
    print_notes(result.notes)
