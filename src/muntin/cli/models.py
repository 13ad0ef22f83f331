"""`muntin models` and `muntin init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from muntin.cli.console import SHOWN, out, print_json, print_notes, print_table, progress_bar
from muntin.cli.options import JsonOption


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
    directory: Annotated[Path, typer.Argument(help="Your folder: images/ with masks/, or a folder of images for each class.")],
    task: Annotated[str | None, typer.Option(help="segment or classify; by default inferred from the folder.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of the recipe, with absolute paths of the images; DIRECTORY/recipe.yaml by default."),
    ] = None,
    json: JsonOption = False,
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
    inferred, classes = recipe["task"], recipe["data"]["classes"]
    rename = "rename the classes, " if inferred == "segment" else ""
    out.print(f"wrote     {path} (task: {inferred}): read it, {rename}then `{shlex.join(['muntin', 'fit', str(path)])}`")
    names = [str(entry["name"] if inferred == "classify" else entry["value"]) for entry in classes]
    shown = ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")
    ignored = "" if recipe["data"].get("ignore") is None else f"; {recipe['data']['ignore']} in a mask counts as nothing"
    examined = examined_masks(masks)
    seen = "" if examined is None else f"; seen in {examined[0]} of {examined[1]} masks"
    out.print(f"classes   {shown}{ignored}{seen}")
    print_notes(notes)
