"""`muntin bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated

import typer

from muntin.cli.console import out, print_json, print_notes, say_notes
from muntin.cli.options import EngineOption, JsonOption, PrecisionOption, TrustOption
from muntin.cli.profile import parse_dims, parse_size
from muntin.cli.start import prepare_torch
from muntin.errors import DataError
from muntin.progress import progress_bar
from muntin.text import count, number_format

if TYPE_CHECKING:
    from muntin.runtime.profiling.bench import Bench
    from muntin.runtime.profiling.cold_start import Candidate

LETTERS = ascii_uppercase
"""Names of the candidates in the table."""
CACHED = {True: "yes", False: "no", None: "-"}


def bench_command(
    candidates: Annotated[
        list[Path],
        typer.Argument(
            help="Artefacts, and runs or checkpoints (PyTorch FP32, on a GPU if present; needs the extra `train`): measured in turns, and "
            "compared with the first unless task or classes differ."
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width in pixels, 512 or 512x768; the size of the first artefact's export by default, of each for other tasks."
        ),
    ] = None,
    dims: Annotated[
        str | None, typer.Option(help="Sizes of free dimensions of named tensors, tokens=128,NAME=NUMBER; those of the export by default.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images, or rows, a call; several values separated by commas.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Threads; several values separated by commas; the usable physical cores by default.")
    ] = None,
    streams: Annotated[
        str, typer.Option(help="Calls computed at the same time: 1 for latency, the number of threads for throughput.")
    ] = "1",
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Timed calls a row.")] = 50,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the models of runs by torch.compile.")] = False,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure latency, throughput, memory and loading time of artefacts and runs, one after the other in turns."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.artifact.store import MANIFEST
    from muntin.runtime.profiling.bench import bench

    if len(candidates) > len(LETTERS):
        raise DataError(f"{len(candidates)} candidates: give at most {len(LETTERS)}")
    if compile and all((path / MANIFEST).is_file() for path in candidates):
        raise DataError("--compile is for runs, which compute in PyTorch, and all of these are artefacts: leave it out")
    opened = [_candidate(path, compile, engine, precision, trust_code) for path in candidates]
    say_notes(() if json else start)
    with progress_bar("measuring") as advance:
        result = bench(
            opened,
            batches=_numbers("--batch", batch),
            threads=[None] if threads is None else _numbers("--threads", threads),
            streams=_numbers("--streams", streams),
            size=None if size is None else parse_size(size),
            dims=None if dims is None else parse_dims(dims),
            rounds=rounds,
            report=advance,
        )
    if json:
        print_json(asdict(result))
        return
    _print(result)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise DataError(f"{option} {text}: give whole numbers from 1, separated by commas, as in 1,4")
    return numbers


def _candidate(path: Path, compile: bool, engine: str, precision: str, trust_code: bool) -> Candidate:
    from muntin.artifact.store import MANIFEST
    from muntin.runtime.profiling.cold_start import ArtifactCandidate

    if not path.exists():
        raise DataError(f"{path} does not exist: name an artefact, a run or a checkpoint")
    if (path / MANIFEST).is_file():
        return ArtifactCandidate(path=str(path), engine=engine, precision=precision)
    from muntin.training import read_checkpoint

    read_checkpoint(path, trust_code=trust_code)  # raises before anything is measured
    from muntin.deployment.checkpoint_candidate import CheckpointCandidate

    return CheckpointCandidate(path=str(path), compile=compile)


def _print(result: Bench) -> None:
    names = list(dict.fromkeys(row.name for row in result.rows))
    letters = dict(zip(names, LETTERS, strict=False))
    for name, letter in letters.items():
        row = next(row for row in result.rows if row.name == name)
        out.print(f"{letter}  {name}: {row.engine}, {number_format(row.precision, integers=row.integers)}")
    for line in table_lines(result, letters):
        out.print(line)
    out.print("images/s (or rows): all streams busy. load s, MiB: opening and a first call of every batch, in a process of its own")
    option = "dims" if all(row.shape is None for row in result.rows) else "size"
    out.print(f"size: {result.size_reason}" + ("" if result.size_reason == "as given" else f"; --{option} measures another"))
    if any(row.ratio is not None for row in result.rows):
        out.print("faster: the median of A over that of the row")
    out.print("cached: whether what the engine compiled came from an earlier run, which loads faster; - where none is kept")
    hardware = result.hardware
    cores = count(hardware["cores"], "core")
    out.print(f"{hardware['cpu']}, {cores}, {', '.join(hardware['features'])}; {result.created}")
    print_notes(result.notes)


def table_lines(result: Bench, letters: Mapping[str, str]) -> list[str]:
    """Return a heading and a line for each row, in aligned columns."""
    headings = ["", "batch", "size", "threads", "streams", "median ms", "p90", "p99", "images/s", "load s", "cached", "MiB"]
    compared = any(row.ratio is not None for row in result.rows)
    lines = [headings + (["faster"] if compared else [])]
    for row in result.rows:
        latency = row.latency
        cells = [
            letters[row.name], f"{row.batch}", row.size, f"{row.threads}", f"{row.streams}", f"{latency.median_ms:.2f}",
            f"{latency.p90_ms:.2f}", f"{latency.p99_ms:.2f}", f"{row.images_per_s:.1f}", f"{row.load_s:.2f}", CACHED[row.cached],
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        ]  # fmt: skip
        lines.append(cells + ([] if not compared else ["-" if row.ratio is None else f"{row.ratio:.2f}x"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
