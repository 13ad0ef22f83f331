"""The demonstration over several seeds: every run's figures, their medians, and the goals beside them.

    python benchmarks/demo.py --seeds 0 1 2 --output runs/benchmark-demo [--reference] [--json]

Each seed is a process of its own that trains, compresses, exports, verifies and measures (six to twelve minutes on two cores). A seed
whose report.json is there already is not run again, so an interrupted benchmark goes on; one of another recipe, or of another machine, is
refused. The baseline of every latency, eager FP32 PyTorch of the same network, is measured in the same run as the deployed model.
`--reference` also trains the FP32 model alone for as many steps as all stages have together (one more training for each seed). The
deployed model's score is compared with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import muntin
from kept import Row, refuse_other
from muntin.compression import load_model
from muntin.runtime import describe_hardware
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, recipe_text
from resumed import demo_recipe, trained


def run(seed: int, directory: Path, hardware: Row) -> dict[str, Any]:
    path = directory / "report.json"
    if not path.is_file():
        command = [sys.executable, "-m", "muntin", "demo", "--output", str(directory), "--set", f"seed={seed}", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    row = {"settings": {"recipe": yaml.safe_load(report.get("recipe", ""))}, "hardware": report["hardware"]}
    refuse_other(path, row, {"recipe": yaml.safe_load(recipe_text(recipe_of(seed)))}, hardware)
    return report


def recipe_of(seed: int) -> Recipe:
    return demo_recipe({"seed": seed})


def reference(seed: int, directory: Path) -> float:
    """Test score of the FP32 model after as many steps as the demonstration's stages have together."""
    recipe = recipe_of(seed)
    made = recipe.compression
    steps = recipe.training.steps + sum(round(stage.share * recipe.training.steps) for stage in (made.recover, made.quantize, made.mix))
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})
    checkpoint = trained(longer, directory)
    source = source_of(checkpoint)
    session = muntin.TorchSession(load_model(checkpoint), longer.signature(source.classes))
    return muntin.evaluate(session, source.split("test"), tile=tile_of(longer.data.crop)).score


def row(seed: int, report: dict[str, Any]) -> dict[str, Any]:
    steps = {step["name"]: step for step in report["steps"]}
    first, last = report["steps"][0], report["steps"][-1]
    baseline, deployed = (entry["median_ms"] for entry in (report["latency"]["rows"][0], report["latency"]["rows"][-1]))
    return {
        "seed": seed,
        "created": report["created"],
        "fp32_miou": first["miou"],
        "fp32_ocean": first["iou"]["ocean"],
        "low_rank_miou": steps["low-rank"]["miou"],
        "w4a8_miou": steps["w4a8"]["miou"],
        "mixed_miou": steps["mixed"]["miou"],
        "deployed_miou": last["miou"],
        "parameters": steps["low-rank"]["params"] / first["params"],
        "agreement": report["agreement"],
        "bytes_ratio": first["bytes"] / last["bytes"],
        "eager_ms": baseline,
        "deployed_ms": deployed,
        "speedup": baseline / deployed,
        "train_s": sum(seconds for name, seconds in report["seconds"].items() if name.startswith("train")),
    }


GOALS = {"fp32_miou": 0.62, "fp32_ocean": 0.93, "parameters": 0.35, "agreement": 0.995, "bytes_ratio": 12.0, "speedup": 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-demo"))
    parser.add_argument("--reference", action="store_true", help="train FP32 alone for all the steps, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    rows, hardware = [], {}
    for seed in arguments.seeds:
        report = run(seed, arguments.output / f"seed-{seed}", machine)
        rows.append(row(seed, report))
        if arguments.reference:
            rows[-1]["reference_miou"] = reference(seed, arguments.output / f"reference-{seed}")
        hardware = {"created": report["created"], **report["hardware"]}
    medians = {key: statistics.median(r[key] for r in rows) for key in rows[0] if key not in ("seed", "created")}
    if arguments.json:
        print(json.dumps({"benchmark": "demo", "hardware": hardware, "rows": rows, "medians": medians, "goals": GOALS}, indent=1))
        return
    print(f"{'':<16}" + "".join(f"{'seed ' + str(r['seed']):>10}" for r in rows) + f"{'median':>10}{'goal':>10}")
    for key, median in medians.items():
        goal = f"{GOALS[key]:>10.4g}" if key in GOALS else ""
        print(f"{key:<16}" + "".join(f"{r[key]:>10.4f}" for r in rows) + f"{median:>10.4f}{goal}")
    print(f"{hardware.get('cpu')}, {hardware.get('cores')} cores, {hardware.get('created')}")


if __name__ == "__main__":
    main()
