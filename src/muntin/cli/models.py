"""`muntin models` and `muntin init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from muntin.cli.console import SHOWN, Json, out, print_json, print_table, progress_bar


def models_command(
    size: Annotated[int, typer.Option(min=1, max=4096, help="Side of the image that multiply-adds are counted at, pixels.")] = 512,
    json: Json = False,
) -> None:
    """The named models: parameters, multiply-adds, structure."""
    import torch

    from muntin.deployment import image_macs, parameter_count
    from muntin.models import PRESETS, HybridNet, create_model
    from muntin.reporting.text import gmacs

    rows = []
    with progress_bar("counting") as advance:
        for done, name in enumerate(PRESETS, 1):
            model = create_model(name, classes=6)
            assert isinstance(model, HybridNet)
            config = model.config
            macs = image_macs(model, torch.zeros(1, 3, size, size))
            rows.append(
                {
                    "name": name,
                    "params": parameter_count(model),
                    "gmacs": macs / 1e9,
                    "attention": config.attention,
                    "dims": config.dims,
                    "depths": config.depths,
                    "decoder": config.decoder,
                    "finest": config.finest,
                }
            )
            advance(done, len(PRESETS))
    if json:
        print_json({"size": size, "models": rows, "others": ["timm:NAME", "torchvision:NAME", "package.module:factory"]})
        return
    table = Table("name", "M params", f"GMACs at {size}²", "attention", "channels", "blocks", "decoder", title="6 classes, 3 channels")
    for row in rows:
        lists = [" + ".join(str(v) for v in row[key]) for key in ("dims", "depths")]  # type: ignore[attr-defined]
        lists.append(f"{row['decoder']} /{row['finest']}")
        table.add_row(str(row["name"]), f"{row['params'] / 1e6:.2f}", gmacs(row["gmacs"]), str(row["attention"]), *lists)  # type: ignore[operator,arg-type]
    print_table(table)
    out.print("also timm:NAME, torchvision:NAME and package.module:factory", markup=False)


def init_command(
    directory: Annotated[Path, typer.Argument(help="Your folder: images/ with masks/, or a folder of images for each class.")],
    task: Annotated[str | None, typer.Option(help="segment or classify; found out by default.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of the recipe, which then names their whole path; recipe.yaml beside them by default."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a commented recipe for a folder of your own images."""
    import yaml

    from muntin.data.inspection import examined_masks
    from muntin.data.recipe_wizard import remarks, write_recipe
    from muntin.errors import RecipeError

    if task not in (None, "segment", "classify"):
        raise RecipeError(f"task '{task}': give segment or classify")
    path = write_recipe(directory, task=task, output=output)  # type: ignore[arg-type]
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    images, masks = (None if (folder := recipe["data"].get(name)) is None else directory / folder for name in ("images", "masks"))
    notes = remarks(directory if images is None else images, masks)
    if json:
        print_json({"recipe": path, "notes": notes})
        return
    found, classes = recipe["task"], recipe["data"]["classes"]
    # a classifier's classes are the folders, and go by their names
    names = "rename the classes, " if found == "segment" else ""
    out.print(f"wrote     {path} (task: {found}): read it, {names}then `{shlex.join(['muntin', 'fit', str(path)])}`", markup=False)
    told = [str(entry["name"] if found == "classify" else entry["value"]) for entry in classes]
    shown = ", ".join(told[:SHOWN]) + (f", ... ({len(told)} in all)" if len(told) > SHOWN else "")
    ignored = "" if recipe["data"].get("ignore") is None else f"; {recipe['data']['ignore']} in a mask counts as nothing"
    looked = examined_masks(masks)
    seen = "" if looked is None else f"; seen in {looked[0]} of {looked[1]} masks"
    out.print(f"classes   {shown}{ignored}{seen}", markup=False)
    for note in notes:
        out.print(f"note      {note}", markup=False)
