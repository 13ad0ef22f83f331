"""`muntin profile`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from muntin.cli.console import out, print_json, print_notes, print_table, refuse_unwritable, say_notes, status
from muntin.cli.options import JsonOption, PrecisionOption, ThreadsOption, TrustOption
from muntin.cli.start import prepare_torch
from muntin.errors import DataError
from muntin.text import count, number_format

WINS = 3
TOP = 12
"""Maximum number of rows in the table of kernels; the files hold all."""
TRACE = "trace.json"


def profile_command(
    artifact: Annotated[
        Path, typer.Argument(help="An artefact's folder, written by `muntin export`; or a run, whose model is profiled in PyTorch.")
    ],
    size: Annotated[
        str | None,
        typer.Option(help="Size of the image in pixels: HxW, or N for a square; by default the size of the export."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images, or rows, a call.")] = None,
    dims: Annotated[
        str | None, typer.Option(help="Sizes of free dimensions of named tensors, tokens=128,NAME=NUMBER; those of the export by default.")
    ] = None,
    precision: PrecisionOption = "recorded",
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Timed calls.")] = 30,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results; ARTIFACT-profile beside the artefact by default.")
    ] = None,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show where an artefact's time goes: every kernel that the engine executes, compared with the limits of this machine."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.artifact.store import MANIFEST
    from muntin.reporting import write_profile
    from muntin.reporting.profile_page import HTML_NAME, JSON_NAME, PICTURE_NAME
    from muntin.runtime.options import SessionOptions
    from muntin.runtime.profiling.profile import default_size_reason, profile
    from muntin.runtime.profiling.profile_document import profile_dict

    target = _target(artifact, output)
    refuse_unwritable(target)
    say_notes(() if json else start)
    if artifact.is_dir() and not (artifact / MANIFEST).exists():
        if precision != "recorded":
            raise DataError(f"{artifact} is no artefact but a run, whose live model has no --precision: leave it out")
        if dims is not None:
            raise DataError(f"--dims {dims}: {artifact} is a run, whose model takes images: give --size")
        _profile_run(artifact, target, size=size, batch=batch, threads=threads, rounds=rounds, trust_code=trust_code, json=json)
        return
    sized = _sizes(artifact, size, batch, dims)
    with status("profiling"):
        measured = profile(artifact, SessionOptions(precision=precision, threads=threads), **sized, rounds=rounds)
    document = profile_dict(measured)
    page = write_profile(target, document)
    if json:
        print_json(document | {"files": sorted(str(target / name) for name in (JSON_NAME, HTML_NAME, PICTURE_NAME))})
        return
    manifest = measured.artifact.manifest
    reason = default_size_reason(manifest) if size is None and dims is None else None
    _print(document, measured.size, integers=manifest.integers, size_reason=reason, option="--size" if measured.dims is None else "--dims")
    out.print(f"wrote     {page}")


def _profile_run(
    run: Path, target: Path, *, size: str | None, batch: int | None, threads: int | None, rounds: int, trust_code: bool, json: bool
) -> None:
    """Profile the model of a run's newest checkpoint layer by layer in PyTorch (NVTX ranges on CUDA)."""
    from dataclasses import asdict

    import torch

    from muntin.deployment.checkpoint_candidate import checkpoint_session
    from muntin.deployment.checkpoint_export import SIZE_REASON, export_side
    from muntin.deployment.torch_profile import profile_torch
    from muntin.runtime.host.hardware import physical_cores
    from muntin.runtime.profiling.profile import fill
    from muntin.training import read_checkpoint
    from muntin.training.checkpoint import source_of

    checkpoint = read_checkpoint(run, trust_code=trust_code)
    torch.set_num_threads(threads or physical_cores())
    side = export_side(checkpoint.recipe)
    H, W = (side, side) if size is None else parse_size(size)
    images = fill(source_of(checkpoint).split("train")[0].corner[None], (batch or 1, H, W))
    with status("profiling"):
        measured = profile_torch(checkpoint_session(checkpoint), images, target / TRACE, rounds=rounds)
    if json:
        print_json(asdict(measured))
        return
    out.print(
        f"whole     {measured.whole_ms:.2f} ms for {batch or 1} x {H} x {W} in {measured.engine}, {measured.precision}, "
        f"{count(measured.threads, 'thread')}, the profiler on (median of {count(rounds, 'call')})",
    )
    _print_size(SIZE_REASON if size is None else None)
    rows = [[layer.name, layer.kind, f"{layer.ms:.2f}", f"{layer.ms / measured.whole_ms:.0%}"] for layer in measured.layers[:TOP]]
    title = f"the longest {len(rows)} of {len(measured.layers)} layers"
    print_table(_table(title, ("layer", "kind", "ms", "share"), rows))
    out.print(f"wrote     {measured.trace} for chrome://tracing or ui.perfetto.dev")


def _target(artifact: Path, output: Path | None) -> Path:
    from muntin.artifact.store import MANIFEST

    folder = artifact.resolve()
    target = output if output is not None else folder.parent / f"{folder.name}-profile"
    if (folder / MANIFEST).exists() and folder in (target.resolve(), *target.resolve().parents):
        raise DataError(f"--output {target}: that is in the artefact, which holds its own files only: name a folder elsewhere")
    return target


def _sizes(artifact: Path, size: str | None, batch: int | None, dims: str | None) -> dict[str, Any]:
    """Return the `shape` of images or the `dims` of named tensors, with the artefact's values for missing options."""
    from muntin.artifact import open_artifact
    from muntin.runtime.profiling.profile import default_shape

    if size is None and batch is None and dims is None:
        return {}
    opened = open_artifact(artifact)
    if opened.manifest.named is not None:
        signature = opened.manifest.signature.tensors
        if size is not None:
            raise DataError(f"--size {size}: {artifact} takes named tensors: give --dims ({', '.join(signature.dims) or 'it has none'})")
        if batch is not None and signature.batch is None:
            raise DataError(f"--batch {batch}: {artifact} has no dimension of independent rows: leave it out")
        return {"dims": ({} if dims is None else parse_dims(dims)) | ({} if batch is None else {str(signature.batch): batch})}
    if dims is not None:
        raise DataError(f"--dims {dims}: {artifact} takes images: give --size")
    B, H, W = default_shape(opened)
    if size is not None:
        H, W = parse_size(size)
    return {"shape": (B if batch is None else batch, H, W)}


def parse_dims(text: str) -> dict[str, int]:
    """Return the sizes in "tokens=128,width=64". Raises DataError for any other text."""
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(name.strip() and number.strip().isdecimal() and int(number) for name, _, number in pairs):
        raise DataError(f"--dims {text}: give whole numbers from 1 by the names of dimensions, as in tokens=128,width=64")
    return {name.strip(): int(number) for name, _, number in pairs}


def parse_size(size: str, option: str = "--size") -> tuple[int, int]:
    """Return (H, W) of "HxW", or of "N" for a square. Raises DataError for any other text."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", size)
    if match is None:
        raise DataError(f"{option} {size}: give rows x columns in pixels as in 512x768, or one number for a square")
    return int(match[1]), int(match[2] or match[1])


def _print_size(reason: str | None, option: str = "--size") -> None:
    if reason is not None:
        out.print(f"size      {reason}; {option} measures another")


def _print(document: Mapping[str, Any], size: str, *, integers: bool, size_reason: str | None, option: str) -> None:
    numbers = number_format(document["precision"], integers=integers)
    out.print(
        f"whole     {document['whole_ms']:.2f} ms for {size} in {document['engine']}, {numbers}, "
        f"{count(document['threads'], 'thread')} (median of {count(document['rounds'], 'call')})",
    )
    _print_size(size_reason, option)
    wins = [finding for finding in document["findings"] if finding["saves_ms"] is not None]
    for number, finding in enumerate(wins[:WINS], 1):
        out.print(f"win {number}     up to {finding['saves_ms']:.2f} ms: {finding['words']}")
    if not wins:
        out.print("win       none: no part of it is far from what this machine can reach")
    for finding in document["findings"]:
        if finding["saves_ms"] is None:
            out.print(f"mind      {finding['words']}")
    print_notes(document["notes"])
    print_table(kinds_table(document))
    print_table(kernels_table(document))


def kinds_table(document: Mapping[str, Any]) -> Table:
    """Return the table of time by kind of kernel."""
    rows = [[row["kind"], f"{row['ms']:.2f}", f"{row['share']:.0%}", str(row["count"] or "")] for row in document["kinds"]]
    return _table("by kind", ("kind", "ms", "share", "kernels"), rows)


def kernels_table(document: Mapping[str, Any]) -> Table:
    """Return the table of the slowest kernels, with the share of its ceiling that each reaches and its precision."""
    longest = sorted(document["kernels"], key=lambda kernel: -kernel["ms"])[:TOP]
    rows = [
        [
            kernel["layer"] or kernel["name"],
            f"{kernel['ms']:.2f}",
            f"{kernel['share']:.0%}",
            "" if kernel["ceiling_share"] is None else f"{kernel['ceiling_share']:.0%}",
            kernel["precision"],
        ]
        for kernel in longest
    ]
    return _table(f"the longest {len(rows)} of {len(document['kernels'])} kernels", ("kernel", "ms", "share", "ceiling", "in"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
