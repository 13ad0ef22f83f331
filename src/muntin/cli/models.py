"""`muntin models` and `muntin init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from muntin.cli.console import SHOWN, out, print_json, print_notes, print_table
from muntin.cli.options import JsonOption
from muntin.progress import progress_bar
from muntin.text import count

if TYPE_CHECKING:
    from muntin.data.recipe_wizard import Survey


def models_command(
    size: Annotated[int, typer.Option(min=1, max=4096, help="Side of the image for which multiply-adds are counted, pixels.")] = 512,
    json: JsonOption = False,
) -> None:
    """List the named models: parameters, multiply-adds, structure."""
    import torch

    from muntin.deployment import image_macs, parameter_count
    from muntin.models import PRESETS, HybridNet, create_model
    from muntin.reporting.text import gmacs

    rows: list[dict[str, Any]] = []
    with progress_bar("counting") as advance:
        for done, name in enumerate(PRESETS, 1):
            model = create_model(name, classes=6)
            assert isinstance(model, HybridNet)
            gmacs_ = image_macs(model, torch.zeros(1, 3, size, size)) / 1e9
            structure = {key: getattr(model.config, key) for key in ("attention", "dims", "depths", "decoder", "finest")}
            rows.append({"name": name, "params": parameter_count(model), "gmacs": gmacs_, **structure})
            advance(done, len(PRESETS))
    if json:
        print_json({"size": size, "models": rows, "others": ["timm:NAME", "torchvision:NAME", "package.module:factory"]})
        return
    table = Table("name", "M params", f"GMACs at {size}²", "attention", "channels", "blocks", "decoder", title="6 classes, 3 channels")
    for row in rows:
        dims, depths = (" + ".join(map(str, row[key])) for key in ("dims", "depths"))
        decoder = f"{row['decoder']} /{row['finest']}"
        table.add_row(row["name"], f"{row['params'] / 1e6:.2f}", gmacs(row["gmacs"]), row["attention"], dims, depths, decoder)
    print_table(table)
    out.print("also timm:NAME, torchvision:NAME and package.module:factory")


def init_command(
    directory: Annotated[
        Path, typer.Argument(help="Your folder: images/ with masks/, a folder of images for each class, .tar shards, or photographs.")
    ],
    task: Annotated[str | None, typer.Option(help="segment or classify, by default inferred from the folder; or restore.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of the recipe, with absolute paths of the images; DIRECTORY/recipe.yaml by default."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a commented recipe for a folder of your own images."""
    from muntin.artifact.answers import ANSWERS
    from muntin.data.recipe_wizard import write_recipe
    from muntin.errors import RecipeError

    if task is not None and task not in ANSWERS:
        *first, last = ANSWERS
        raise RecipeError(f"task '{task}': give {', '.join(first)} or {last}")
    path, survey = write_recipe(directory, task=task, output=output)
    if json:
        shares = {entry.name: share for entry, share in zip(survey.classes.classes, survey.classes.shares, strict=True)}
        numbers = {key: getattr(survey, key) for key in ("counted", "unopened", "opened")}
        print_json({"recipe": path, "shares": shares, **numbers, "notes": survey.notes})
        return
    rename = "rename the classes, " if survey.layout.answer.masks else ""
    describe_survey(path, survey, f": read it, {rename}then `{shlex.join(['muntin', 'fit', str(path)])}`")


def describe_survey(path: Path, survey: Survey, advice: str = "") -> None:
    """Print what was found in a folder, for which the recipe at `path` was written."""
    from muntin.reporting.text import percent
    from muntin.tasks.classes import as_yaml

    classes, segment = survey.classes, survey.layout.answer.masks
    out.print(f"wrote     {path} (task: {survey.layout.task}){advice}")
    if not survey.layout.answer.has_classes:
        made = "made from them by data.degrade" if survey.layout.base.targets is None else "beside clean ones"
        out.print(f"pictures  {survey.counted}, of which {survey.opened} were opened; inputs are {made}")
        print_notes(survey.notes)
        return
    names = [as_yaml(entry.value) if segment else entry.name for entry in classes.classes]
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    ignored = "" if classes.ignore is None else f"; {classes.ignore} in a mask counts as nothing"
    unopened = f"; from {count(survey.counted, 'mask')}, {survey.unopened} more were not opened" if survey.unopened else ""
    out.print(f"classes   {', '.join(names[:SHOWN])}{more}{ignored}{unopened}")
    shown = [f"{name}: {percent(share)}" for name, share in zip(names[:SHOWN], classes.shares, strict=False)]
    nothing = 1 - sum(classes.shares)
    rest = f", nothing: {percent(nothing)}" if nothing > 1e-9 else ""
    opened = f", of which {survey.opened} were opened" if survey.opened < survey.counted else ""
    what = f"the pixels in {count(survey.counted, 'mask')}" if segment else f"{count(survey.counted, 'image')}{opened}"
    out.print(f"shares    {', '.join(shown)}{more}{rest} of {what}")
    print_notes(survey.notes)
