"""`muntin compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.console import notes_once, out, print_json, print_notes, print_table, print_wrapped, status
from muntin.cli.options import CheckpointArgument, JsonOption, TrustOption
from muntin.cli.start import prepare_torch

if TYPE_CHECKING:
    from muntin.artifact.answers import Task


def compare_command(
    run: CheckpointArgument,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Timed calls of each artefact.")] = 30,
    trust_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Compare all artefacts of a run with each other and with PyTorch FP32, and say which one to take and which are missing."""
    start = prepare_torch()  # before PyTorch is imported
    from muntin.deployment.artifact_comparison import compare_run
    from muntin.training import read_checkpoint

    with status("comparing", begin=notes_once(() if json else start)) as stage:
        compared = compare_run(read_checkpoint(run, trust_code=trust_code), rounds=rounds, stage=stage)
    if json:
        print_json(compared | {"notes": [*start, *compared["notes"]]})
        return
    print_artifacts(compared["artifacts"], task=compared["task"], title=compared["title"])
    for entry in compared["missing"]:
        out.print(f"missing   {entry['name']}: `{entry['command']}`")
    print_size(compared["artifacts"])
    out.print("memory    added by opening and a first call, in a process of its own")
    print_notes(compared["notes"])


def print_artifacts(artifacts: Mapping[str, Any], *, task: Task, title: str) -> None:
    """Print the table of a run's artefacts and which one to take."""
    from muntin.reporting import artifacts_table
    from muntin.runtime.profiling.contention import BUSY

    print_table(artifacts_table(artifacts, task=task, title=title))
    path = next(row["path"] for row in artifacts["rows"] if row["name"] == artifacts["take"])
    beside = "; but latencies were measured beside other work: measure again, alone" if (artifacts["others"] or 0.0) >= BUSY else ""
    print_wrapped(f"take      {artifacts['take']} ({path}): {artifacts['rule']}{beside}")


def print_size(artifacts: Mapping[str, Any]) -> None:
    """Print the size that artefacts were timed at, and why."""
    samples = ", ".join(f"{split} {number}" for split, number in artifacts["samples"].items())
    out.print(f"size      latency at {artifacts['height']}x{artifacts['width']}: {artifacts['size_reason']}; pictures: {samples}")
