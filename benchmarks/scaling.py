"""Latency and memory against image size: a preset and its dense twin, deployed and in eager PyTorch, up to 4096 x 4096.

    python benchmarks/scaling.py [--model hybrid-s] [--options NAME=VALUE ...] [--answer labels] [--sides 512 1024 2048 4096] [--limit 180]
                                 [--output runs/benchmark-scaling] [--json]

The twin is the same network with attention over all tokens (`attention: dense`). `--options` change the preset, for both, as a recipe's
`model.options` do (values are YAML: "stem=[8, 16]"). Pixels go in; each pixel's class comes out, or with `--answer scores` float32 scores,
24 bytes a pixel.

Every point is a process of its own, so that no point inherits memory of another: it opens the model, computes one small image (64 x 64),
reads its resident memory, then computes images of the point's size.
    ms       median of a call, after one that does not count (three to twenty calls, fewer where they take long)
    MiB      largest resident memory during these calls, beyond the memory before them
A point that does not end within --limit seconds, or for which memory does not suffice, is "cannot run", and larger ones of that kind are
not tried; the next time it is tried again. Nothing that the engine compiles is taken from a cache, or the second time would take less
memory than the first. Both are trained for 30 steps (speed does not depend on the weights, but an artefact of a random network is refused).
Images are crops of the demonstration's photograph.

    hybrid int8, hybrid bf16, dense bf16    deployed in OpenVINO (16-bit floats where the CPU has them, else FP32)
    dense eager                             the twin in eager FP32 PyTorch with fused attention: a user's starting point

`slope`: of the logarithm, between 1024 x 1024 and 4096 x 4096: 1 is proportional to the pixels. A point that is there already is not
measured again; one of other settings, or of another machine, is refused. Time on two cores: about ten minutes. Run it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

import muntin
from kept import Row, kept_row, now
from muntin.artifact import open_artifact
from muntin.models import PRESETS, ModelConfig
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.memory import watch_memory
from muntin.runtime.profiling.profile import fill

KINDS = ("hybrid int8", "hybrid bf16", "dense bf16", "dense eager")
SPAN = 1024, 4096
"""Sides between which slopes are."""
SLOPE = 1.05
"""Largest slope of time and memory that meets the goal."""
RATIOS = {512: 20.0, 1024: 40.0}
"""Goals: so many times as fast as the twin in eager FP32, by the image's side."""
DENSE = {"attention": "dense"}
PROTOCOL = 2
"""Version of the measurement. Before 2 the eager twin's labels were computed in training mode, which is slower."""
STEPS = 30
BUDGET_S = 20.0
"""Seconds of one point's timed calls."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A preset and what is changed in it; the dense twin has the same changes."""

    preset: str
    options: Row

    @property
    def name(self) -> str:
        return self.preset + "".join(f", {key}={json.dumps(value)}" for key, value in self.options.items())

    @property
    def structure(self) -> Row:
        return ModelConfig(**{**PRESETS[self.preset], **self.options}).model_dump(mode="json")

    def folder(self, output: Path) -> Path:
        """Below `output`: of its own for all that differ."""
        changed = json.dumps(self.options, sort_keys=True).encode()
        return output / (self.preset + (f"-{hashlib.sha256(changed).hexdigest()[:8]}" if self.options else ""))


def prepare(output: Path, network: Network) -> None:
    """Exports the three artefacts, where they are not there yet."""
    from resumed import demo_recipe, float_artifact, integer_artifact, trained

    for name, changes, kinds in (("hybrid", {}, ("hybrid int8", "hybrid bf16")), ("dense", DENSE, ("dense bf16",))):
        length = {"training.steps": STEPS, "training.validate_every": STEPS, "training.checkpoint_every": STEPS}
        checkpoint = trained(
            demo_recipe({"model.name": network.preset, "model.options": network.options | changes, **length}), output / name
        )
        for kind in kinds:
            (integer_artifact if kind.endswith("int8") else float_artifact)(checkpoint, artifact_of(output, kind))


def artifact_of(output: Path, kind: str) -> Path:
    return output / kind.replace(" ", "-")


def session_of(output: Path, network: Network, kind: str) -> Any:
    if kind != "dense eager":
        precision = "bf16" if "avx512_bf16" in (features := describe_hardware()["features"]) or "amx_bf16" in features else "f32"
        return muntin.load(artifact_of(output, kind), precision=precision, threads=physical_cores(), shapes=(), cache=False)
    import torch

    torch.set_num_threads(physical_cores())
    torch.manual_seed(0)
    signature = open_artifact(artifact_of(output, "dense bf16")).manifest.signature
    return muntin.TorchSession(
        muntin.create_model(network.preset, classes=len(signature.classes), options=network.options | DENSE), signature
    )


def point(output: Path, network: Network, answer: str, kind: str, side: int) -> Row:
    session = session_of(output, network, kind)
    images = fill(open_artifact(artifact_of(output, "dense bf16")).golden()[0][0], (1, side, side))
    compute, times = session if answer == "scores" else session.labels, list[float]()
    compute(np.zeros((1, 64, 64, 3), np.uint8))
    with watch_memory() as watch:
        compute(images)
        while len(times) < 3 or (sum(times) < BUDGET_S * 1e3 and len(times) < 20):
            started = time.perf_counter()
            compute(images)
            times.append((time.perf_counter() - started) * 1e3)
            if sum(times) > 4 * BUDGET_S * 1e3:
                break
    peak = None if watch.peak is None else watch.peak / 2**20
    return {"kind": kind, "side": side, "precision": session.precision, "ms": median(times), "mib": peak, "calls": len(times)}


def measured(output: Path, network: Network, answer: str, kind: str, side: int, limit: float, hardware: Row) -> Row:
    """The point that is there, or a new one."""
    from muntin.deployment.checkpoint_export import REVISION

    timing = {"revision": REVISION, "budget_s": BUDGET_S, "threads": physical_cores(), "cache": False, "protocol": PROTOCOL}
    settings = {"model": network.preset, "structure": network.structure, "answer": answer, "steps": STEPS, **timing}
    path = output / f"{answer}-{kind.replace(' ', '-')}-{side}.json"
    return kept_row(path, settings, partial(measure, output, network, answer, kind, side, limit, hardware["memory_gib"]), hardware=hardware)


def measure(output: Path, network: Network, answer: str, kind: str, side: int, limit: float, memory_gib: float | None) -> Row:
    """The point, measured in a new process with at most 85 % of the machine's memory; or why it cannot run."""
    command = [sys.executable, __file__, "--output", str(output.parent), "--model", network.preset, "--answer", answer]
    command += ["--options", *(f"{key}={json.dumps(value)}" for key, value in network.options.items()), "--point", kind, str(side)]
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
    """From 1024 x 1024 to 4096 x 4096; None where one of them is missing."""
    mine = {row["side"]: row[what] for row in rows if row["kind"] == kind and row.get(what)}
    small, large = SPAN
    if small not in mine or large not in mine:
        return None
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


def judge(found: dict[str, Any]) -> list[Row]:
    """Each goal, what was found and whether it is met; a figure that is not there judges nothing."""
    slopes, ratios = found["slopes"], found["ratios"]
    wanted = [(f"slope of hybrid int8, {what}", slopes.get(f"hybrid int8, {what}"), SLOPE, False) for what in ("ms", "mib")]
    for side, least in RATIOS.items():
        name = f"dense eager over hybrid int8, {side}"
        wanted.append((name, ratios.get(name), least, True))
    return [
        {"goal": name, "found": value, "wanted": limit, "met": None if value is None else (value >= limit if least else value <= limit)}
        for name, value, limit, least in wanted
    ]


def print_tables(name: str, answer: str, rows: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    print(f"{name} and its dense twin, pixels in and {answer} out")
    print(f"{'':<14}{'side':>6}{'precision':>11}{'ms':>11}{'MiB':>9}")
    for row in rows:
        if "cannot" in row:
            print(f"{row['kind']:<14}{row['side']:>6}  cannot run: {row['cannot']}")
            continue
        mib = "–" if row["mib"] is None else f"{row['mib']:,.0f}"
        print(f"{row['kind']:<14}{row['side']:>6}{row['precision']:>11}{row['ms']:>11,.1f}{mib:>9}")
    found = summary(rows)
    for title, values in found.items():
        print(f"\n{title}")
        for name, value in values.items():
            print(f"  {name:<36}{value:>8.2f}")
    print()
    for goal in judge(found):
        told = "not measured" if goal["found"] is None else f"{goal['found']:.3f}"
        print(f"{ {True: 'met', False: 'MISSED', None: '–'}[goal['met']]:<8}{goal['goal']}: {told} (goal {goal['wanted']:g})")
    print(f"\n{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE as argparse reads it."""
    name, equals, value = text.partition("=")
    if not equals or name not in ModelConfig.model_fields:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=VALUE, a name of {', '.join(ModelConfig.model_fields)}")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in PRESETS if name.startswith("hybrid")], default="hybrid-s")
    parser.add_argument("--options", type=option, nargs="*", default=[], metavar="NAME=VALUE", help="changed in the preset; YAML values")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-scaling"))
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a point may take")
    parser.add_argument("--answer", choices=["labels", "scores"], default="labels")
    parser.add_argument("--point", nargs=2, metavar=("KIND", "SIDE"), help="measure one point in this process and print it")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    given = parser.parse_args()
    network = Network(preset=given.model, options=dict(given.options))
    try:
        network.structure  # noqa: B018 - what it cannot be is said before anything is trained
    except ValueError as error:
        parser.error(f"--options: {error}")
    output = network.folder(given.output)
    if given.point:
        print(json.dumps(point(output, network, given.answer, given.point[0], int(given.point[1]))))
        return
    output.mkdir(parents=True, exist_ok=True)
    prepare(output, network)
    machine = describe_hardware()
    rows: list[Row] = []
    for kind in KINDS:
        for side in sorted(set(given.sides)):
            rows.append(measured(output, network, given.answer, kind, side, given.limit, machine))
            if "cannot" in rows[-1]:
                break
    hardware = {**machine, "created": now()}
    if given.json:
        found = summary(rows)
        document = {
            "model": given.model,
            "options": network.options,
            "answer": given.answer,
            "hardware": hardware,
            "rows": rows,
            **found,
            "goals": judge(found),
        }
        print(json.dumps({"benchmark": "scaling", **document}, indent=1))
    else:
        print_tables(network.name, given.answer, rows, hardware)


if __name__ == "__main__":
    main()
