"""`muntin compress` and `muntin quantize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from muntin.cli.console import notes_once, out, print_json, print_notes, print_table, say, status
from muntin.cli.options import JsonOption, TrustOption
from muntin.cli.start import alone, prepare_torch, refuse_without_gradients

if TYPE_CHECKING:
    from muntin.budgeting.result import CompressionResult, Holdout
    from muntin.reporting.front.schema import FrontRecord
    from muntin.training import Checkpoint, Recipe

QUANTIZATION = ("quantization.calibration_images", "quantization.keep")
"""Keys of a recipe's `quantization` that compression uses."""


def compress_command(
    run: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints, trained by `muntin fit`.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the trials; RUN/compressed by default.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Replace a value, e.g. --set compression.distillation=0.5; repeatable.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The most that the model may lose of the validation metric: of mIoU or accuracy (0.01 by default), or for restore dB of "
            "PSNR (0.1). Another value judges the trials again.",
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(help="Quantity to minimise: size (the default) or latency.")] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Certainty, from 0.5 to below 1, with which a trial that is called kept stays within the budget on other data, too; 0.95 "
            "by default. Another value judges the trials again."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Time limit of this call, tables and held-out scores included. It is exceeded by at most one export, one scoring, or the "
            "preparation of tables or of a candidate. The same command goes on.",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=0, help="Most models to try beside plain INT8; 12 by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps of each; by default half of the run's.")] = None,
    course: Annotated[
        str | None,
        typer.Option(help="Training of each: direct, with its ranks and bits; or stages: its ranks, then 4 bits a weight, then its bits."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Search for the smallest or fastest form of a trained model that keeps its accuracy.

    Ranks, channels and bits are chosen together, and each candidate is trained, exported and scored as an artifact. Plain INT8 is tried
    first. The same command goes on with an interrupted search. Exit code 1 if no trial is within the budget on the validation data; if that
    is not certain on other data, a note says so.
    """
    refuse_without_gradients(run)
    given = {
        "max_drop": max_drop, "objective": objective, "confidence": confidence, "minutes": minutes, "trials": trials, "steps": steps,
        "course": course,
    }  # fmt: skip
    changes = [*(set_ or ()), *(f"compression.{name}={value}" for name, value in given.items() if value is not None)]
    notes = prepare_torch()  # before PyTorch is imported
    from muntin.budgeting.display import plan_lines
    from muntin.budgeting.result import SearchProgress
    from muntin.budgeting.run_budget import FOLDER, budget_of, forecast_run
    from muntin.errors import RecipeError
    from muntin.training import find_checkpoint, read_checkpoint

    if not alone():
        raise RecipeError("muntin compress searches in one process: start it without torchrun")
    file = find_checkpoint(run)
    checkpoint = read_checkpoint(file, trust_code=trust_code)
    checkpoint = with_recipe(checkpoint, compression_recipe(checkpoint, changes))
    folder = output or file.parent.parent / FOLDER
    if dry_run:
        plan, budget = forecast_run(checkpoint, folder), budget_of(checkpoint.recipe)
        if json:
            print_json({"folder": folder, "max_drop": budget.max_drop, "objective": budget.objective, "plan": asdict(plan)})
        else:
            for line in plan_lines(SearchProgress(stage="plan", forecast=plan)):
                out.print(line)
        return
    if not search_within(checkpoint, folder, notes, json=json).kept:
        raise typer.Exit(1)


def with_recipe(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with another recipe."""
    return replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))


def compression_recipe(checkpoint: Checkpoint, overrides: Sequence[str]) -> Recipe:
    """The recipe of a checkpoint with values of its compression replaced. Raises RecipeError for other values."""
    from muntin.errors import RecipeError
    from muntin.training.recipe import override_recipe

    allowed = ("compression.", *(f"{key}=" for key in QUANTIZATION))
    other = next((override for override in overrides if not override.startswith(allowed)), None)
    if other is not None:
        keys = ", ".join(("compression.KEY=VALUE", *QUANTIZATION))
        raise RecipeError(f"'{other}': the model is trained already; what can be set is {keys}")
    return override_recipe(checkpoint.recipe, overrides)


def search_within(checkpoint: Checkpoint, folder: Path, notes: Sequence[str], *, json: bool, quiet: bool = False) -> CompressionResult:
    """Search by a checkpoint's recipe, and print the trials and the chosen one, unless `quiet`. `notes`: to print when work begins.

    Exits with 1 after an interruption.
    """
    from muntin.artifact import open_artifact
    from muntin.budgeting.display import shown_search
    from muntin.budgeting.run_budget import budget_of, compress_run
    from muntin.reporting.front.page import write_front
    from muntin.reporting.text import METRICS
    from muntin.training.fitting import broken_off
    from muntin.updating.drift.training_pictures import with_training_reference

    recipe = checkpoint.recipe
    try:
        with shown_search(budget_of(recipe).objective, not json, begin=notes_once(() if json else notes)) as progress:
            result = compress_run(checkpoint, folder=folder, progress=progress)
    except KeyboardInterrupt as error:
        say("muntin: interrupted; the same command goes on")
        raise typer.Exit(1) from error
    _, drift_notes = with_training_reference(open_artifact(result.artifact.path), checkpoint)
    metric = METRICS[recipe.task].name + METRICS[recipe.task].unit_after
    page = write_front(folder, front_record(result, title=recipe.name, weights=checkpoint.state.weights, metric=metric))
    if quiet:
        return result
    if json:
        print_json({**_document(result), "page": page, "notes": [*notes, *broken_off(checkpoint), *result.notes, *drift_notes]})
    else:
        describe_search(result, metric)
        out.print(f"size      ms are of one image of {recipe.data.crop}x{recipe.data.crop}, as in training")
        print_notes((*broken_off(checkpoint), *drift_notes))
        out.print(f"page      {page}")
    return result


def describe_search(result: CompressionResult, metric: str) -> None:
    """Print the trials, the chosen one and its figures."""
    table = Table(
        "",
        *(Column(name, justify="right", no_wrap=True) for name in ("width", metric, "change", "at worst", "MB", "ms")),
        "budget",
        "front",
    )
    from muntin.budgeting.display import VERDICTS
    from muntin.budgeting.result import trial_name

    on_front = {trial.number for trial in result.front}
    for row in result.rows:
        number = row["trial"]
        best = "yes" if number in on_front else ""
        if row.get("failed"):
            table.add_row(trial_name(number), f"{row['width']:g}", *[""] * 5, "failed", best)
            continue
        change, worst = ("" if number is None else f"{-row[key]:+.4f}" for key in ("drop", "bound"))
        verdict = "" if number is None else row["verdict"]
        table.add_row(
            trial_name(number), f"{row['width']:g}", f"{row['score']:.4f}", change, worst, f"{row['bytes'] / 1e6:.3f}",
            f"{row['ms']:.2f}", verdict, best,
        )  # fmt: skip
    print_table(table)
    best_trial = result.best
    if best_trial is not None:
        first = result.rows[0]
        ratio, speed = first["bytes"] / best_trial.bytes, first["ms"] / best_trial.ms
        state = VERDICTS[best_trial.verdict]
        beside = f"{ratio:.1f} times smaller and {speed:.2f} times as fast as FP32's artifact"
        out.print(f"chosen    {trial_name(best_trial.number)}: {beside}; {state}")
    if result.holdout is not None:
        out.print(f"held out  {_figures(result.holdout, metric)}")
    print_notes(result.notes)
    out.print(f"wrote     {result.artifact.path}")


def _figures(held: Holdout, metric: str) -> str:
    within = "" if held.interval is None else f", 95 % interval of the change {_signed(-held.interval[1])} to {_signed(-held.interval[0])}"
    return f"{metric} {held.score:.4f}, FP32 {held.reference:.4f} ({_signed(-held.drop)}){within}"


def _signed(change: float) -> str:
    return f"{round(change, 4) + 0.0:+.4f}"  # no -0.0000


def front_record(result: CompressionResult, *, title: str, weights: str, metric: str) -> FrontRecord:
    """The values of the page of a search."""
    from importlib.metadata import version

    from muntin.budgeting.result import trial_name
    from muntin.reporting.front.schema import FrontRecord
    from muntin.runtime import describe_hardware

    measured = [row for row in result.rows if not row.get("failed")]
    points = [
        {
            "number": index, "name": trial_name(row["trial"]), "width": row["width"], "score": row["score"], "drop": row["drop"],
            "bound": row["bound"], "bytes": row["bytes"], "ms": row["ms"], "kept": row["kept"],
            "verdict": "" if row["trial"] is None else row["verdict"],
            "artifact": Path(row["artifact"]).relative_to(result.folder).as_posix(),
        }
        for index, row in enumerate(measured)
    ]  # fmt: skip
    numbers = [row["trial"] for row in measured]
    held = "" if result.holdout is None else f"On held-out data: {_figures(result.holdout, metric)}."
    return FrontRecord.model_validate(
        {
            "muntin": version("muntin"), "created": datetime.now(UTC).isoformat(timespec="seconds"), "title": title,
            "weights": weights, "metric": metric,
            "objective": result.budget.objective, "max_drop": result.budget.max_drop,
            "chosen": None if result.best is None else numbers.index(result.best.number), "held_out": held, "notes": result.notes,
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
