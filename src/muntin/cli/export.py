"""`muntin export` and `muntin relabel`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.console import notes_once, out, print_json, print_notes, status
from muntin.cli.options import JsonOption, TrustOption
from muntin.cli.start import prepare_torch
from muntin.errors import RecipeError

if TYPE_CHECKING:
    from muntin.artifact import Artifact


def export_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run's folder or one of its checkpoints; with --standalone also an artefact's folder. Or a model: a float ONNX file, "
            "timm:NAME, torchvision:NAME, smp:CLASS:ENCODER, hf:FOLDER, package.module:function."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the artefact; by default RUN/artifact, or FILE-artifact of FILE.onnx. Other models need it."
        ),
    ] = None,
    floating: Annotated[
        bool, typer.Option("--float", help="Do not quantise: keep all layers in floating point. Refused for a quantised checkpoint.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help=r"Replace a value, e.g. --set quantization.keep=\[head.conv]; repeatable.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Heights and widths that the artefact takes: any, fixed (the training crop's), multiple=32,min=64,max=1024, or widest: "
            "as many as the model takes. By default widest, of a classifier fixed; an artefact of the same weights is kept with its sizes."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="What the quantisation of a model needs: a folder of typical pictures. For an ONNX file, typical inputs: a .npz file with "
            "an array for each input by name, or the .npy array of the only input."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="For an ONNX file: rows that are computed at a time, where their number is free; 8 by default."),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="For an ONNX file: a node that stays in floats; repeatable.")] = None,
    standalone: Annotated[
        Path | None, typer.Option(help="Also write the model to this .onnx file, which other tools read: all weights are in it.")
    ] = None,
    trust_code: TrustOption = False,
    json: JsonOption = False,
    weights: Annotated[
        Path | None, typer.Option(help="Of a model: .safetensors file, or a state_dict that torch.save wrote; random by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of a model: side of its pictures, or HEIGHTxWIDTH, in pixels; by default the model's own.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Names of the classes: a file with a name on each line, or a YAML or JSON list of names or of entries with name and "
            "color. Of a run, in place of its own; of a model, also their number."
        ),
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Of a model: channels of its pictures.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of a model: mean of each channel in its training, of pixels from 0 to 1: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Of a model: standard deviation of each channel, like --mean.")] = None,
) -> None:
    """Quantise a checkpoint, a model of PyTorch or an ONNX file to INT8 and write it as an artefact that runs without PyTorch."""
    from muntin.artifact import check_standalone, write_standalone
    from muntin.artifact.store import MANIFEST

    if standalone is not None:
        check_standalone(standalone)
    of_model: dict[str, Any] = {
        "calibration": calibration,
        "weights": weights,
        "size": size,
        "classes": classes,
        "channels": channels,
        "mean": mean,
        "std": std,
    }
    of_source = {key: value for key, value in of_model.items() if key != "calibration" and value is not None}
    if checkpoint.suffix.lower() == ".onnx":
        if set_ or sizes or of_source or calibration is None or (floating and keep):
            wrong = "it takes --keep or --float" if floating and keep else "without inputs"
            if others := [*(["set"] if set_ else []), *(["sizes"] if sizes else []), *of_source]:
                wrong = f"--{' and --'.join(others)} {'is' if len(others) == 1 else 'are'} for other models"
            raise RecipeError(f"{checkpoint} is an ONNX file, {wrong}: give --calibration inputs.npz, and --float or --keep NODE")
        _export_onnx(
            checkpoint, calibration, output, floating=floating, batch=batch or 8, keep=keep or (), standalone=standalone, json=json
        )
        return
    if keep or batch is not None:
        raise RecipeError(f"--keep and --batch are for ONNX files, and {checkpoint} is none: --set quantization.keep=NAMES names layers")
    if str(checkpoint).find(":") > 1 and not checkpoint.exists():  # not a drive's colon
        of_model["overrides"] = set_ or ()
        _export_source(str(checkpoint), output, of_model, floating=floating, sizes=sizes, standalone=standalone, json=json)
        return
    if given := [f"--{key}" for key, value in of_model.items() if value is not None and key != "classes"]:
        raise RecipeError(f"{', '.join(given)}: for a model, as timm:NAME; {checkpoint} is taken for a run, which has its own")
    if (checkpoint / MANIFEST).is_file():
        if classes is not None:
            raise RecipeError(f"{checkpoint} is an artefact already: `muntin relabel {checkpoint} --classes {classes}` renames its classes")
        if standalone is None or output is not None or floating or set_ or sizes:
            raise RecipeError(f"{checkpoint} is an artefact already: give it --standalone FILE.onnx alone, or name a run to export anew")
        _write_standalone(checkpoint, standalone, json=json)
        return
    start = prepare_torch()  # before PyTorch is imported
    from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, exported, other_artifact, quantized_by
    from muntin.tasks.classes import renamed_by
    from muntin.training import find_checkpoint, read_checkpoint
    from muntin.training.fitting import broken_off
    from muntin.updating.drift.training_pictures import with_training_reference

    if floating and set_:
        raise RecipeError("--set says how to quantise, and --float that nothing is: give one of them")
    file = find_checkpoint(checkpoint)
    target = output or file.parent.parent / ARTIFACT
    with status("exporting") as stage:
        trained = quantized_by(read_checkpoint(file, trust_code=trust_code), set_ or ())
        if output is None and trained.trial:
            raise RecipeError(f"{target} is the artefact that the search measured: give another place, --output")
        if classes is not None:
            trained = replace(trained, classes=renamed_by(Path(classes), trained.classes))
        replaced = other_artifact(trained, target, integer=not floating)
        existing = exported(trained, target, integer=not floating, sizes=sizes)
        reused = existing is not None and existing.picture.classes == trained.classes
        begin = notes_once(() if json else start)
        artifact = export_checkpoint(trained, target, integer=not floating, sizes=sizes, begin=begin)
        stage("the drift reference")
        artifact, drift_notes = with_training_reference(artifact, trained)
        if standalone is not None:
            write_standalone(artifact, standalone)
    recorded_notes = artifact.manifest.measured.get("notes")
    notes = [*broken_off(trained), *(recorded_notes if isinstance(recorded_notes, list) else []), *drift_notes]
    notes = [*start, *notes] if json else notes
    _print_result(artifact, target, standalone, notes, reused=reused, replaced=replaced, floating=floating, json=json)


def relabel_command(
    path: Annotated[Path, typer.Argument(help="A run's folder, or an artefact.")],
    classes: Annotated[
        Path,
        typer.Option(
            help="The new names, in the order of the classes: a file with a name on each line, or a YAML or JSON list of names or of "
            "entries with name and color. A class without a colour keeps its own."
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Change names and colours of classes after training. Weights stay as they are.

    A run reads its data by the old names and shows the new ones; `muntin export RUN` gives them to its artefact. An artefact gets a new
    manifest, and so another digest.
    """
    from muntin.artifact import open_artifact
    from muntin.artifact.classes import write_renamed
    from muntin.artifact.store import MANIFEST
    from muntin.tasks.classes import relabel_artifact, renamed_by

    if (path / MANIFEST).is_file():
        artifact = open_artifact(path)
        old = artifact.picture.classes
        new = renamed_by(classes, old)
        relabel_artifact(artifact, new)
    else:
        from muntin.training import read_checkpoint

        checkpoint = read_checkpoint(path)
        run, old = checkpoint.path.parent.parent, checkpoint.classes
        new = renamed_by(classes, old)
        write_renamed(run, checkpoint.state.classes, new)
    if json:
        print_json({"path": path, "classes": [entry.model_dump() for entry in new]})
        return
    for number, (before, after) in enumerate(zip(old, new, strict=True)):
        out.print(f"class     {number}: {before.name} -> {after.name}, color {list(after.color)}")
    if not (path / MANIFEST).is_file():
        out.print(f"next      `muntin export {path}` gives these names to its artefact")


def _export_source(
    source: str, output: Path | None, options: dict[str, Any], *, floating: bool, sizes: str | None, standalone: Path | None, json: bool
) -> None:
    """Export a model that `muntin.open_model` opens, and print what was written."""
    from muntin.artifact import write_standalone

    start = prepare_torch()  # before PyTorch is imported
    from muntin.deployment.sources.source_export import SourceOptions, export_source, replaced_artifact

    with status("exporting"):
        replaced = None if output is None else replaced_artifact(output)
        begin = notes_once(() if json else start)
        artifact, notes = export_source(source, output, SourceOptions(**options), integer=not floating, sizes=sizes, begin=begin)
        if standalone is not None:
            write_standalone(artifact, standalone)
    notes = (*start, *notes) if json else notes
    _print_result(artifact, artifact.path, standalone, notes, replaced=replaced, floating=floating, json=json)


def _print_result(
    artifact: Artifact,
    target: Path,
    standalone: Path | None,
    notes: Sequence[object],
    *,
    floating: bool,
    json: bool,
    reused: bool = False,
    replaced: str | None = None,
) -> None:
    """Print what was exported, what it replaced, and the layers that were not quantised with the reason; as lines or as JSON."""
    manifest, images = artifact.manifest, artifact.manifest.named is None
    kept = {layer.name: layer.note for layer in manifest.layers if layer.activation_bits is None}
    if floating and not images:
        kept = {}
    rounding: Any = {} if images else manifest.measured.get("rounding", {})
    if json:
        document = {"artifact": target, "bytes": artifact.bytes, "replaced": replaced, "written": not reused, "standalone": standalone}
        kind = {"sizes": artifact.picture.sizes.model_dump()} if images else {"signature": manifest.signature.model_dump()}
        document |= kind | {"precision": manifest.precision, "int8_layers": _integer_layers(artifact), "rounding": rounding}
        print_json(document | {"integer_coverage": manifest.measured.get("integer_coverage"), "kept": kept, "notes": notes})
        return
    share = manifest.measured.get("integer_coverage")
    coverage = f" ({share:.0%} of the multiply-adds)" if isinstance(share, float) and share else ""
    layers = f"{_integer_layers(artifact)} of {len(manifest.layers)} layers in INT8{coverage}, others in {manifest.precision}"
    out.print(f"{'exists already' if reused else 'wrote    '} {target}: {artifact.bytes / 1e6:.2f} MB, {layers}")
    if images:
        out.print(f"sizes     {artifact.picture.sizes.text}")
    else:
        for kind_, infos in (("input", manifest.signature.tensors.inputs), ("output", manifest.signature.tensors.outputs)):
            for info in infos:
                out.print(f"{kind_:<9} {info.name}: {info.text}")
    for name, change in rounding.items():
        out.print(f"integers  {name}: {_moved(change)}")
    if replaced is not None:
        out.print(f"replaced  what was there, {replaced}")
    for name, reason in () if floating else kept.items():
        out.print(f"kept      {name}: {reason or 'not quantised'}")
    if standalone is not None:
        out.print(_written(standalone))
    print_notes(notes)


def _export_onnx(
    model: Path,
    calibration: Path,
    output: Path | None,
    *,
    floating: bool,
    batch: int,
    keep: Collection[str],
    standalone: Path | None,
    json: bool,
) -> None:
    """Write an ONNX file as an artefact with named inputs and outputs, and print what was done."""
    from muntin.artifact import write_standalone
    from muntin.graph import export_onnx
    from muntin.graph.calibration_file import read_calibration
    from muntin.graph.onnx_file import read_float_model

    target = output or model.with_name(f"{model.stem}-artifact")
    proto = read_float_model(model)
    batches = read_calibration(calibration, proto, batch)
    with status("exporting"):
        artifact = export_onnx(
            proto, target, calibration=None if floating else batches, example=batches[0] if floating else None, keep=keep
        )
        if standalone is not None:
            write_standalone(artifact, standalone)
    notes = artifact.manifest.measured["notes"]
    _print_result(artifact, target, standalone, notes if isinstance(notes, list) else [], floating=floating, json=json)


def _moved(change: Any) -> str:
    """Say what integers change in an output."""
    if change["rms_error"] is None:
        return f"{change['equal']:.1%} of its values are those of the float model"
    cosine = "" if change["cosine"] is None else f", least cosine of a row {change['cosine']:.4f}"
    return f"{change['rms_error']:.2g} standard deviations from the float model in the mean{cosine}"


def _write_standalone(artifact: Path, file: Path, *, json: bool) -> None:
    """Write an artefact as one ONNX file, and print that."""
    from muntin.artifact import write_standalone

    written = write_standalone(artifact, file)
    if json:
        print_json({"artifact": artifact, "standalone": written})
    else:
        out.print(_written(written))


def _integer_layers(artifact: Artifact) -> int:
    return sum(layer.activation_bits == 8 for layer in artifact.manifest.layers)


def _written(file: Path) -> str:
    return f"wrote     {file}: {file.stat().st_size / 1e6:.2f} MB, plain ONNX"
