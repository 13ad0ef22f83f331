"""The demonstration over several seeds, each a process of its own that trains, compresses, exports, verifies and measures.

    python benchmarks/demo.py --seeds 0 1 2 [--reference]

`--reference` also trains FP32 alone for as many steps as it and a candidate have together. Time: six to twelve minutes a seed on two cores.
Run it alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import muntin
from documents import Document, Goal, Row, Table, columns, grid, median, seeds_of, values_of
from engines import agreement, labels_of, simulated
from harness import Benchmark, Options, Run, main, option, seeds_option
from measures import score
from muntin.compression import load_model
from muntin.training import read_checkpoint
from muntin.training.recipe import recipe_text
from resumed import demo_recipe, trained


class DemoOptions(Options):
    seeds: tuple[int, ...] = seeds_option(0, 1, 2)
    reference: bool = option(False, "train FP32 alone for all the steps, too", selects=True)


def measure(seed: int, directory: Path) -> Row:
    command = [sys.executable, "-m", "muntin", "demo", "--output", str(directory), "--set", f"seed={seed}", "--json"]
    begun, started = directory.exists(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    seconds = None if begun else time.perf_counter() - started
    report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    (first, *_, last), compared, checkpoint = report["steps"], report["artifacts"], read_checkpoint(directory)
    path = next(Path(row["path"]) for row in compared["rows"] if row["name"] == compared["take"])
    sessions = muntin.TorchSession(simulated(checkpoint, path), checkpoint.signature), muntin.load(path)
    return {
        "seed": seed,
        **{f"{step['name']}_{end}": step[key] for step in report["steps"] for end, key in (("miou", "miou"), ("ms", "latency_ms"))},
        "fp32_ocean": first["iou"]["ocean"],
        "took": compared["take"],
        "parameters": last["params"] / first["params"],
        "agreement": agreement(checkpoint, *(labels_of(checkpoint, one)[1] for one in sessions)),
        "fp32_labels": report["agreement"],
        "bytes_ratio": first["bytes"] / last["bytes"],
        "eager_ms": first["latency_ms"],
        "speedup": first["latency_ms"] / last["latency_ms"],
        "seconds": seconds,
        "steps": [{key: step.get(key) for key in ("name", "miou", "iou", "params", "bytes")} for step in report["steps"]],
    }


def reference(seed: int, directory: Path) -> Row:
    """Test score of the FP32 model after as many steps as the demonstration's training and that of a candidate have together."""
    recipe = demo_recipe({"seed": seed})
    made = recipe.compression
    steps = recipe.training.steps + sum(round(stage.share * recipe.training.steps) for stage in (made.recover, made.quantize, made.mix))
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})
    checkpoint = trained(longer, directory)
    return {"reference_miou": score(checkpoint, load_model(checkpoint))}


def rows(run: Run) -> Iterator[Row]:
    for seed in run.options.seeds:
        recipe = yaml.safe_load(recipe_text(demo_recipe({"seed": seed})))
        row = run.row(f"seed-{seed}", measure, seed, run.folder / f"seed-{seed}-run", recipe=recipe)
        if run.options.reference:
            row = run.row(f"reference-{seed}", reference, seed, run.folder / f"reference-{seed}-run", recipe=recipe) | row
        yield row


def with_median(found: list[Row]) -> list[Row]:
    numbers = [key for key, value in found[0].items() if isinstance(value, float)]
    return [*found, {"seed": "median", **{key: median(found, key) for key in numbers}}]


def ratios(document: Document) -> str:
    smaller, faster = (median(document.rows, key) for key in ("bytes_ratio", "speedup"))
    return f"{smaller:.1f}× smaller, {faster:.1f}× faster"


def newest(document: Document) -> str:
    scores = {key: ", ".join(f"{row[f'{key}_miou']:.3f}" for row in document.rows) for key in ("fp32", "deployed")}
    return f"FP32 {scores['fp32']}, deployed {scores['deployed']}; {ratios(document)}"


def front(documents: list[Document]) -> str:
    newest = documents[-1]
    deployed, floats = (median(newest.rows, f"{key}_miou") for key in ("deployed", "fp32"))
    return f"**{ratios(newest)}**, mIoU {deployed:.3f} (FP32: {floats:.3f})"


def span(documents: list[Document], key: str, form: str = "{:.1f}") -> str:
    """Lowest to highest of the newest document's seeds."""
    values = values_of(documents[-1].rows, key)
    return f"{form.format(min(values))} to {form.format(max(values))}"


def whole(documents: list[Document]) -> str:
    """The claim on the whole demonstration, for docs/claims.md."""
    faster = "; ".join(f"{span([run], 'speedup')} times ({run.where})" for run in documents)
    floats, deployed = (median(documents[-1].rows, f"{key}_miou") for key in ("fp32", "deployed"))
    worst = min(row["deployed_miou"] - row["fp32_miou"] for row in documents[-1].rows)
    lost = f"one seed loses {-worst:.3f}" if worst < 0 else "no seed loses"
    return f"{span(documents, 'bytes_ratio')} times smaller; faster {faster}; medians {floats:.3f} and {deployed:.3f}, {lost}"


def steps(documents: list[Document]) -> str:
    """Test mIoU after each step, for docs/demo.md."""
    found, lines = documents[-1].rows, [["step", "test mIoU", "latency at 512²"]]
    # of earlier documents: low rank, W4A8, mixed precision
    names = {"fp32": "FP32, eager PyTorch", "low_rank": "low rank, fine-tuned", "w4a8": "W4A8, simulated in PyTorch"}
    names |= {"mixed": "mixed precision, simulated", "int8": "plain INT8 in OpenVINO", "deployed": "**deployed in OpenVINO**"}
    for key, name in names.items():
        miou, ms = median(found, f"{key}_miou"), median(found, "eager_ms" if key == "fp32" else f"{key}_ms")
        if miou is not None:
            lines.append([name, f"{miou:.3f} ({span(documents, f'{key}_miou', '{:.3f}')})", f"{ms:.1f} ms" if ms else "–"])
    return (
        f"\n{grid(lines)}\n\nMedians of {documents[-1].n} (lowest and highest), {documents[-1].where}. Deployed: {ratios(documents[-1])}.\n"
    )


BENCHMARK = Benchmark(
    name="demo",
    options=DemoOptions,
    measure=rows,
    about="hybrid-s on one satellite photograph, test mIoU after each step. Smaller than the FP32 checkpoint, faster than eager FP32.",
    newest=newest,
    n=seeds_of,
    variant=lambda document: "with a longer FP32 training" if any("reference_miou" in row for row in document.rows) else "",
    tables=(
        Table(
            columns=columns(
                "seed, FP32=fp32_miou:.3f, ocean=fp32_ocean:.3f, low rank=low_rank_miou:.3f, W4A8=w4a8_miou:.3f, mixed=mixed_miou:.3f, "
                "INT8=int8_miou:.3f, deployed=deployed_miou:.3f, took, longer FP32=reference_miou:.3f, parameters:.1%, "
                "equal labels=agreement:.2%, FP32's labels=fp32_labels:.2%, smaller=bytes_ratio:.1f, eager ms=eager_ms:.1f, "
                "deployed ms=deployed_ms:.1f, faster=speedup:.1f, s=seconds:.0f"
            ),
            rows=with_median,
        ),
    ),
    goals=(
        Goal(name="FP32 mIoU", values="fp32_miou", case="seed {seed}", at_least=0.62),
        Goal(name="IoU of the ocean", values="fp32_ocean", case="seed {seed}", at_least=0.93),
        Goal(name="share of the parameters", values="parameters", case="seed {seed}", at_most=0.35, form="{:.1%}"),
        Goal(name="equal labels", values="agreement", case="seed {seed}", at_least=0.995, form="{:.2%}"),
        Goal(name="times smaller", values="bytes_ratio", case="seed {seed}", at_least=12, form="{:.1f}"),
        Goal(name="times faster than eager FP32", values="speedup", case="seed {seed}", at_least=6, form="{:.1f}"),
        Goal(name="seconds of the whole demonstration", values="seconds", case="seed {seed}", at_most=720, form="{:.0f}"),
    ),
    blocks={
        "front": front,
        "steps": steps,
        "whole": whole,
        "labels": lambda documents: f"{span(documents, 'agreement', '{:.2%}')} equal labels",
    },
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
