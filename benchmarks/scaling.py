"""Measure latency and memory against image size: a preset and its dense twin, deployed and in eager PyTorch, up to 4096 x 4096.

    python benchmarks/scaling.py [--model hybrid-s] [--options "stem=[8, 16]" ...] [--answer labels] [--sides 512 1024 2048 4096]

`--options` change the preset, for both, as a recipe's `model.options` do. Every point is a process of its own, so that none inherits memory
of another: the median of three to twenty calls. After a point that takes longer than --limit seconds, or more memory than there is, larger
ones of its kind are not tried. Time on two cores: ten minutes, alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

import muntin
from documents import Column, Document, Goal, Row, crossed
from harness import Benchmark, Options, Run, apart, main, option
from muntin.artifact import open_artifact
from muntin.models import PRESETS, ModelConfig
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.memory import watch_memory
from muntin.runtime.profiling.profile import fill

KINDS = ("hybrid int8", "hybrid bf16", "dense bf16", "dense eager")
SPAN = 1024, 4096
"""Sides between which slopes are."""
DENSE = {"attention": "dense"}
PROTOCOL = 2
"""Version of the measurement. Before 2 the eager twin's labels were computed in training mode, which is slower."""
STEPS = 30
BUDGET_S = 20.0
"""Seconds of one point's timed calls."""


def change(text: str) -> tuple[str, Any]:
    """NAME=VALUE as argparse reads it."""
    name, equals, value = text.partition("=")
    try:
        if equals and name in ModelConfig.model_fields:
            return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    raise argparse.ArgumentTypeError(f"{text}: give NAME=VALUE, a name of {', '.join(ModelConfig.model_fields)}")


class ScalingOptions(Options):
    model: str = option("hybrid-s", "preset", choices=[name for name in PRESETS if name.startswith("hybrid")])
    options: tuple[tuple[str, Any], ...] = option((), "NAME=VALUE: changed in the preset; YAML values", parse=change)
    answer: str = option("labels", "what comes out", choices=("labels", "scores"))
    sides: tuple[int, ...] = option((512, 1024, 2048, 4096), "sides of the image, pixels", least=64, selects=True)
    limit: float = option(180.0, "seconds that a point may take", selects=True)

    def __post_init__(self) -> None:
        _ = self.structure  # wrong values are refused before anything is trained

    @property
    def structure(self) -> Row:
        return ModelConfig(**{**PRESETS[self.model], **dict(self.options)}).model_dump(mode="json")

    @property
    def folder(self) -> Path:
        """A folder below `output` for each preset and change."""
        changed = hashlib.sha256(json.dumps(dict(self.options), sort_keys=True).encode()).hexdigest()[:8]
        return self.output / (f"{self.model}-{changed}" if self.options else self.model)

    def artifact(self, kind: str) -> Path:
        return self.folder / kind.replace(" ", "-")


def prepare(options: ScalingOptions) -> None:
    """Export the three artifacts that are not there yet."""
    from resumed import demo_recipe, float_artifact, integer_artifact, trained

    for name, changes, kinds in (("hybrid", {}, ("hybrid int8", "hybrid bf16")), ("dense", DENSE, ("dense bf16",))):
        length = {"training.steps": STEPS, "training.validate_every": STEPS, "training.checkpoint_every": STEPS}
        recipe = demo_recipe({"model.name": options.model, "model.options": dict(options.options) | changes, **length})
        checkpoint = trained(recipe, options.folder / name)
        for kind in kinds:
            (integer_artifact if kind.endswith("int8") else float_artifact)(checkpoint, options.artifact(kind))


def session_of(options: ScalingOptions, kind: str) -> Any:
    if kind != "dense eager":
        precision = "bf16" if {"avx512_bf16", "amx_bf16"} & set(describe_hardware()["features"]) else "f32"
        return muntin.load(options.artifact(kind), precision=precision, threads=physical_cores(), shapes=(), cache=False)
    import torch

    torch.set_num_threads(physical_cores())
    torch.manual_seed(0)
    signature = open_artifact(options.artifact("dense bf16")).manifest.signature
    model = muntin.create_model(options.model, classes=len(signature.classes), options=dict(options.options) | DENSE)
    return muntin.TorchSession(model, signature)


def point(options: ScalingOptions, kind: str, side: int) -> Row:
    session = session_of(options, kind)
    images = fill(open_artifact(options.artifact("dense bf16")).golden_images()[0][0], (1, side, side))
    compute, times = session if options.answer == "scores" else session.labels, list[float]()
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
    return {"precision": session.precision, "ms": median(times), "mib": peak, "calls": len(times)}


def points(run: Run) -> Iterator[Row]:
    from muntin.deployment.checkpoint_export import REVISION

    options = run.options
    prepare(options)
    settings = {"structure": options.structure, "revision": REVISION, "steps": STEPS, "budget_s": BUDGET_S}
    settings |= {"threads": physical_cores(), "cache": False, "protocol": PROTOCOL}
    memory_gib = (run.hardware["memory_gib"] or 16) * 0.85
    for kind in KINDS:
        for side in sorted(set(options.sides)):
            measured = partial(apart, point, options, kind, side, limit_s=options.limit, memory_gib=memory_gib)
            row = run.row(f"{options.folder.name}/{options.answer}-{kind}-{side}", measured, **settings)
            yield {"kind": kind, "side": side, **row}
            if "cannot" in row:
                break


def slope(rows: list[Row], kind: str, what: str) -> float | None:
    """Of a figure from 1024 x 1024 to 4096 x 4096; None where one of them is missing."""
    values = {row["side"]: row[what] for row in rows if row["kind"] == kind and row.get(what)}
    small, large = SPAN
    return math.log(values[large] / values[small], (large / small) ** 2) if small in values and large in values else None


def slopes(document: Document, kind: str = KINDS[0]) -> dict[str, float | None]:
    return {name: slope(document.rows, kind, what) for name, what in (("time", "ms"), ("memory", "mib"))}


def ratios(rows: list[Row]) -> list[Row]:
    """Points with their times over those of the hybrid in INT8."""
    int8 = {row["side"]: row["ms"] for row in rows if row["kind"] == KINDS[0] and "ms" in row}
    return [row | {"ratio": row["ms"] / int8[row["side"]]} if "ms" in row and row["side"] in int8 else row for row in rows]


def eager_ratio(side: int, document: Document) -> float | None:
    return next((row.get("ratio") for row in ratios(document.rows) if (row["kind"], row["side"]) == ("dense eager", side)), None)


def cell(row: Row) -> str:
    ratio = f", {row['ratio']:.1f} x" if row["kind"].startswith("dense") and "ratio" in row else ""
    return f"{row['ms']:,.{1 if row['ms'] < 100 else 0}f} ms" + ("" if row["mib"] is None else f", {row['mib']:,.0f} MiB") + ratio


def newest(document: Document) -> str:
    return "INT8: " + "; ".join(f"{row['side']}² {cell(row)}" for row in document.rows if row["kind"] == KINDS[0] and "ms" in row)


def variant(document: Document) -> str:
    changes = "".join(f", {name}={json.dumps(value)}" for name, value in document.settings["options"])
    return f"{document.settings['model']}{changes}, {document.settings['answer']} out"


def claim(documents: list[Document]) -> str:
    """Slopes of hybrid-xxs and of its twin, for docs/claims.md."""
    document = next(each for each in reversed(documents) if variant(each) == "hybrid-xxs, labels out")
    int8, bf16, twin, eager = ([f"{value:.2f}" for value in slopes(document, kind).values()] for kind in KINDS)
    return (
        f"hybrid-xxs from 1024² to 4096²: in INT8 a slope of {int8[0]} in time and {int8[1]} in memory, in BF16 {bf16[0]} and {bf16[1]}. "
        f"Its twin with attention over all tokens: in BF16 {twin[0]} and {twin[1]}, in eager FP32 {eager[0]} and {eager[1]} in memory, "
        "since fused attention kernels are linear in memory, too"
    )


BENCHMARK = Benchmark(
    name="scaling",
    options=ScalingOptions,
    measure=points,
    about="""The twin has attention over all tokens; x: its time over that of the hybrid in INT8. Memory is what calls add to what is held
after opening. Goals: slopes of the hybrid in INT8 of 1.05 at most (1: proportional to the pixels); 20 times (512²) and 40 times (1024²) as
fast as its twin in eager FP32 PyTorch. No preset has `stem=[8, 16]`, `pairs=[1]`: its scores are not better.""",
    newest=newest,
    variant=variant,
    tables=(
        crossed(
            "kind", "side", cell, select=ratios, head="{}²",
            more=(
                Column(title="precision", value="precision"),
                Column(title="slope, time", value=lambda line: slope(line["rows"], line["kind"], "ms"), form="{:.3f}"),
                Column(title="memory", value=lambda line: slope(line["rows"], line["kind"], "mib"), form="{:.3f}"),
            ),
        ),
    ),
    goals=(
        Goal(name="slope of the hybrid in INT8", values=slopes, at_most=1.05, form="{:.3f}"),
        Goal(name="times as fast as the eager dense twin at 512²", values=partial(eager_ratio, 512), at_least=20, form="{:.0f}"),
        Goal(name="times as fast as the eager dense twin at 1024²", values=partial(eager_ratio, 1024), at_least=40, form="{:.0f}"),
    ),
    blocks={"M1": claim},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
