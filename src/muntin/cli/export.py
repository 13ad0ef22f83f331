"""`muntin export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muntin.cli.console import out, print_json, print_notes, say_notes, status
from muntin.cli.options import CheckpointArgument, JsonOption
from muntin.cli.start import prepare_torch
from muntin.errors import RecipeError


def export_command(
    checkpoint: CheckpointArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the artefact; RUN/artifact by default.")] = None,
    floating: Annotated[
        bool, typer.Option("--float", help="Do not quantise: keep all layers in floating point. Refused for a quantised checkpoint.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help=r"Replace a value, e.g. --set quantization.keep=\[head.conv]; repeatable.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Quantise a checkpoint to INT8 and write it as an artefact that runs without PyTorch."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.compression.stages import broken_off
    from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, exported, other_artifact, quantized_by
    from muntin.training import find_checkpoint, read_checkpoint

    if floating and set_:
        raise RecipeError("--set says how to quantise, and --float that nothing is: give one of them")
    file = find_checkpoint(checkpoint)
    target = output or file.parent.parent / ARTIFACT
    say_notes(() if json else start)
    with status("exporting"):
        trained = quantized_by(read_checkpoint(file), set_ or ())
        replaced = other_artifact(trained, target, integer=not floating)
        reused = exported(trained, target, integer=not floating) is not None
        artifact = export_checkpoint(trained, target, integer=not floating)
    manifest = artifact.manifest
    integer_layers = sum(layer.activation_bits == 8 for layer in manifest.layers)
    kept = {layer.name: layer.note for layer in manifest.layers if layer.activation_bits is None}
    recorded_notes = manifest.measured.get("notes")
    notes = [*broken_off(trained), *(recorded_notes if isinstance(recorded_notes, list) else [])]
    if json:
        document = {"artifact": target, "bytes": artifact.bytes, "replaced": replaced, "written": not reused}
        print_json(document | {"precision": manifest.precision, "int8_layers": integer_layers, "kept": kept, "notes": [*start, *notes]})
        return
    done = "is there " if reused else "wrote    "
    out.print(f"{done} {target}: {artifact.bytes / 1e6:.2f} MB, {integer_layers} layers in INT8, others in {manifest.precision}")
    if replaced is not None:
        out.print(f"replaced  what was there, {replaced}")
    for name, reason in {}.items() if floating else kept.items():
        out.print(f"kept      {name}: {reason or 'not quantised'}")
    print_notes(notes)
