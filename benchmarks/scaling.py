"""Latency and memory against image size: hybrid-s and its dense twin, deployed and in eager PyTorch, up to 4096 x 4096.

    python benchmarks/scaling.py [--output runs/benchmark-scaling] [--sides 512 1024 2048 4096] [--limit 180] [--json]

Every point is a process of its own, so that no point inherits memory of another: it opens the model, computes one small image (64 x 64),
notes what is resident, then computes images of the point's size.
    ms       median of a call, after one that does not count (three to twenty calls, fewer where they take long)
    MiB      resident memory at the most during these calls, beyond what was held before (the 24 bytes a pixel of float32 scores included)
A point that does not end within --limit seconds, or for which memory does not suffice, is "cannot run", and larger ones of that kind are
not tried; the next time it is tried again. Nothing that the engine compiles is taken from a cache, or the second time would take less
memory than the first. Both are trained for 30 steps (speed does not depend on the weights, but an artefact of a random network is refused).
Images are crops of the demonstration's photograph.

    hybrid int8, hybrid bf16, dense bf16    deployed in OpenVINO (16-bit floats where the CPU has them, else FP32)
    dense eager                             the twin in eager FP32 PyTorch, fused attention: what a user starts from

`slope`: of the logarithm, between 1024 x 1024 and the largest: 1 is proportional to the pixels. A point that is there already is not
measured again; one of other settings, or of another machine, is refused. Time on two cores: about ten minutes. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import muntin
from kept import Row, kept_row, now
from muntin.artifact import open_artifact
from muntin.runtime import describe_hardware
from muntin.runtime.memory import watch_memory
from muntin.runtime.profile import fill

KINDS = ("hybrid int8", "hybrid bf16", "dense bf16", "dense eager")
GOALS = {"slope": 1.05, "eager_over_hybrid_512": 20, "eager_over_hybrid_1024": 40}
STEPS = 30
BUDGET_S = 20.0
"""Of one point's timed calls."""


def prepare(output: Path) -> None:
    """Exports the three artefacts, where they are not there yet."""
    from resumed import demo_recipe, float_artifact, integer_artifact, trained

    for name, kinds in (("hybrid-s", ("hybrid int8", "hybrid bf16")), ("dense-s", ("dense bf16",))):
        length = {"training.steps": STEPS, "training.validate_every": STEPS, "training.checkpoint_every": STEPS}
        checkpoint = trained(demo_recipe({"model.name": name, **length}), output / name)
        for kind in kinds:
            (integer_artifact if kind.endswith("int8") else float_artifact)(checkpoint, artifact_of(output, kind))


def artifact_of(output: Path, kind: str) -> Path:
    return output / kind.replace(" ", "-")


def session_of(output: Path, kind: str) -> Any:
    if kind != "dense eager":
        precision = "bf16" if "avx512_bf16" in (features := describe_hardware()["features"]) or "amx_bf16" in features else "f32"
        return muntin.load(artifact_of(output, kind), precision=precision, shapes=[(1, 64, 64)], cache=False)
    import torch

    torch.manual_seed(0)
    signature = open_artifact(artifact_of(output, "dense bf16")).manifest.signature
    session = muntin.TorchSession(muntin.create_model("dense-s", classes=6), signature)
    session(np.zeros((1, 64, 64, 3), np.uint8))
    return session


def point(output: Path, kind: str, side: int) -> dict[str, Any]:
    session = session_of(output, kind)
    images = fill(open_artifact(artifact_of(output, "dense bf16")).golden()[0][0], (1, side, side))
    times: list[float] = []
    with watch_memory() as watch:
        session(images)
        while len(times) < 3 or (sum(times) < BUDGET_S * 1e3 and len(times) < 20):
            started = time.perf_counter()
            session(images)
            times.append((time.perf_counter() - started) * 1e3)
            if sum(times) > 4 * BUDGET_S * 1e3:
                break
    peak = None if watch.peak is None else watch.peak / 2**20
    return {"kind": kind, "side": side, "precision": session.precision, "ms": median(times), "mib": peak, "calls": len(times)}


def measured(output: Path, kind: str, side: int, limit: float, hardware: Row) -> Row:
    """The point that is there, or a new one."""
    settings = {"steps": STEPS, "budget_s": BUDGET_S, "cache": False}
    path = output / f"{kind.replace(' ', '-')}-{side}.json"
    return kept_row(path, settings, partial(measure, output, kind, side, limit, hardware["memory_gib"]), hardware=hardware)


def measure(output: Path, kind: str, side: int, limit: float, memory_gib: float | None) -> Row:
    """The point, measured in a new process with at most the machine's free memory; or why it cannot run."""
    command = [sys.executable, __file__, "--output", str(output), "--point", kind, str(side)]
    memory = int((memory_gib or 16) * 0.85 * 2**30)

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # an error in this process, not the system's killing of another

    row: Row = {"kind": kind, "side": side}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, preexec_fn=bounded, check=False)  # noqa: S603
        if ran.returncode == 0:
            return dict(json.loads(ran.stdout.splitlines()[-1]))
        row["cannot"] = ([line for line in ran.stderr.splitlines() if line.strip()] or [f"exit {ran.returncode}"])[-1][:200]
    except subprocess.TimeoutExpired:
        row["cannot"] = f"not within {limit:g} s"
    return row


def slope(rows: list[dict[str, Any]], kind: str, what: str) -> float | None:
    mine = {row["side"]: row[what] for row in rows if row["kind"] == kind and row.get(what) and row["side"] >= 1024}
    if len(mine) < 2:
        return None
    small, large = min(mine), max(mine)
    return math.log(mine[large] / mine[small]) / math.log((large / small) ** 2)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ms = {(row["kind"], row["side"]): row["ms"] for row in rows if "ms" in row}
    over = {
        f"{kind} over hybrid int8, {side}": ms[kind, side] / ms["hybrid int8", side]
        for kind, side in ms
        if kind.startswith("dense") and ("hybrid int8", side) in ms
    }
    slopes = {f"{kind}, {what}": found for kind in KINDS for what in ("ms", "mib") if (found := slope(rows, kind, what)) is not None}
    return {"slopes": slopes, "ratios": over}


def print_tables(rows: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    print(f"{'':<14}{'side':>6}{'precision':>11}{'ms':>11}{'MiB':>9}")
    for row in rows:
        if "cannot" in row:
            print(f"{row['kind']:<14}{row['side']:>6}  cannot run: {row['cannot']}")
            continue
        mib = "–" if row["mib"] is None else f"{row['mib']:,.0f}"
        print(f"{row['kind']:<14}{row['side']:>6}{row['precision']:>11}{row['ms']:>11,.1f}{mib:>9}")
    for title, values in summary(rows).items():
        print(f"\n{title}")
        for name, value in values.items():
            print(f"  {name:<36}{value:>8.2f}")
    print(f"\n{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-scaling"))
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a point may take")
    parser.add_argument("--point", nargs=2, metavar=("KIND", "SIDE"), help="measure one point in this process and print it")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(point(arguments.output, arguments.point[0], int(arguments.point[1]))))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    prepare(arguments.output)
    machine = describe_hardware()
    rows: list[Row] = []
    for kind in KINDS:
        for side in sorted(arguments.sides):
            rows.append(measured(arguments.output, kind, side, arguments.limit, machine))
            if "cannot" in rows[-1]:
                break
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "scaling", "hardware": hardware, "rows": rows, **summary(rows), "goals": GOALS}, indent=1))
    else:
        print_tables(rows, hardware)


if __name__ == "__main__":
    main()
