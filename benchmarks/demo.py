"""The demonstration over several seeds: every run's figures, their medians, and the goals beside them.

    python benchmarks/demo.py --seeds 0 1 2 --output runs/benchmark-demo [--json]

Each seed is a process of its own that trains, quantises, exports, verifies and measures (about seven minutes on two cores). A seed
whose report.json is there already is not run again, so an interrupted benchmark goes on. The baseline of every latency, eager FP32
PyTorch of the same network, is measured in the same run as the deployed model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(seed: int, directory: Path) -> dict[str, Any]:
    report = directory / "report.json"
    if not report.is_file():
        command = [sys.executable, "-m", "muntin", "demo", "--output", str(directory), "--set", f"seed={seed}", "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    return json.loads(report.read_text(encoding="utf-8"))


def row(seed: int, report: dict[str, Any]) -> dict[str, Any]:
    first, last = report["steps"][0], report["steps"][-1]
    baseline, deployed = (entry["median_ms"] for entry in (report["latency"]["rows"][0], report["latency"]["rows"][-1]))
    return {
        "seed": seed,
        "fp32_miou": first["miou"],
        "fp32_ocean": first["iou"]["ocean"],
        "deployed_miou": last["miou"],
        "lost": first["miou"] - last["miou"],
        "agreement": report["agreement"],
        "bytes_ratio": first["bytes"] / last["bytes"],
        "eager_ms": baseline,
        "deployed_ms": deployed,
        "speedup": baseline / deployed,
        "train_s": report["seconds"]["train"],
    }


GOALS = {"fp32_miou": 0.62, "fp32_ocean": 0.93, "agreement": 0.995, "bytes_ratio": 3.5, "speedup": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-demo"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    rows, hardware = [], {}
    for seed in arguments.seeds:
        report = run(seed, arguments.output / f"seed-{seed}")
        rows.append(row(seed, report))
        hardware = {"created": report["created"], **report["hardware"]}
    medians = {key: statistics.median(r[key] for r in rows) for key in rows[0] if key != "seed"}
    if arguments.json:
        print(json.dumps({"benchmark": "demo", "hardware": hardware, "rows": rows, "medians": medians, "goals": GOALS}, indent=1))
        return
    keys = list(medians)
    print("seed    " + "".join(f"{key:>15}" for key in keys))
    for r in rows:
        print(f"{r['seed']:<8}" + "".join(f"{r[key]:>15.4f}" for key in keys))
    print("median  " + "".join(f"{medians[key]:>15.4f}" for key in keys))
    print("goal    " + "".join(f"{GOALS.get(key, float('nan')):>15.4f}" if key in GOALS else f"{'':>15}" for key in keys))
    print(f"{hardware.get('cpu')}, {hardware.get('cores')} cores, {hardware.get('created')}")


if __name__ == "__main__":
    main()
