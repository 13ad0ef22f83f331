"""Count how often muntin.compress keeps a budget on data that it has not seen: random budgets, objectives and small networks.

    python benchmarks/budget_runs.py --packages FOLDER [--runs 20] [--first 0] [--trials 6] [--steps 60]

Each run draws a network (convolutions, an MLP or a vision transformer), trains it on digits before photographs for `--fit` steps, and
compresses it: budgets from 0.3 to 5 points of accuracy, log-uniform; size or latency. `evaluate` sees the validation images, `holdout` the
test images, one score for each image; candidates are distilled on training images for `--steps` steps. `packages`: with mlxtend and the
photographs, as for `quantizers.py`. About a minute a run on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from documents import Column, Document, Goal, Row, Table, columns
from harness import Benchmark, Run, main, option
from quantizer_peers.data import SIDE, PackagesOptions, digits_before_photographs, pixels
from quantizer_peers.networks import train, with_pixels

KINDS = ("convolutions", "perceptron", "vision transformer")
BUDGETS = (0.003, 0.05)
CALIBRATION, LESSONS, BATCH, CLASSES = 128, 1024, 64, 10
RATE, FIT_RATE = 5e-4, 2e-3


def draw_network(kind: str, draw: np.random.Generator) -> nn.Module:
    """A network of random depth and width: raw pixels `(B, 3, 64, 64)` to scores `(B, 10)`."""
    torch.manual_seed(int(draw.integers(2**31)))
    layers: list[nn.Module]
    if kind == "vision transformer":
        import timm

        heads = int(draw.integers(2, 5))
        shape: dict[str, Any] = {"embed_dim": 32 * heads, "depth": int(draw.integers(1, 4)), "num_heads": heads}
        layers = [timm.models.VisionTransformer(img_size=SIDE, patch_size=16, num_classes=CLASSES, **shape)]
    elif kind == "perceptron":
        width = int(draw.integers(64, 257))
        layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * (SIDE // 4) ** 2, width), nn.GELU()]
        for _ in range(int(draw.integers(0, 3))):
            layers += [nn.Linear(width, width), nn.GELU()]
        layers.append(nn.Linear(width, CLASSES))
    else:
        width, channels, layers = int(draw.integers(8, 33)), 3, []
        for _ in range(int(draw.integers(3, 5))):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels, width = width, 2 * width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return with_pixels(nn.Sequential(*layers) if len(layers) > 1 else layers[0])


@dataclass(frozen=True, kw_only=True)
class BudgetRunsOptions(PackagesOptions):
    runs: int = option(20, "number of runs", least=1, selects=True)
    first: int = option(0, "number of the first run, which draws all that is random in it", least=0, selects=True)
    fit: int = option(250, "training steps of a network", least=1)
    trials: int = option(6, "most candidates of a run", least=1)
    steps: int = option(60, "steps of distillation of a candidate", least=1)


def measure(number: int, given: BudgetRunsOptions) -> Row:
    """Train and compress one network."""
    draw = np.random.default_rng([7, number])
    kind, objective = KINDS[number % len(KINDS)], str(draw.choice(["size", "size", "latency"]))
    max_drop = round(float(np.exp(draw.uniform(*np.log(BUDGETS)))), 4)
    data = digits_before_photographs(given.packages.resolve())
    model = train(draw_network(kind, draw), *data["train"], steps=given.fit, rate=FIT_RATE, seed=number)
    images, _ = data["train"]
    lessons = pixels(images[draw.permutation(len(images))[:LESSONS]]).split(BATCH)

    def right(part: str, called: Callable[..., Any]) -> NDArray[np.bool_]:
        images, labels = data[part]
        return np.asarray(np.concatenate([called(batch).argmax(1).numpy() for batch in pixels(images).split(BATCH)]) == labels)

    result = muntin.compress(
        model, calibration=lessons[: CALIBRATION // BATCH], evaluate=partial(right, "validation"), holdout=partial(right, "test"),
        budget=muntin.Budget(max_drop=max_drop, objective=objective), finetune=lessons, folder=(given.output / f"{number}").resolve(),
        seed=number, recipe={"trials": given.trials, "steps": given.steps, "learning_rate": RATE},
    )  # fmt: skip
    best, held = result.best, result.holdout
    assert best is not None and held is not None and held.interval is not None
    return {
        "kind": kind, "parameters": sum(one.numel() for one in model.parameters()), "objective": objective, "max_drop": max_drop,
        "accuracy": held.reference, "outcome": result.outcome, "drop": best.drop, "bound": best.bound, "held": held.drop,
        "interval": held.interval, "smaller": result.rows[0]["bytes"] / best.bytes, "faster": result.rows[0]["ms"] / best.ms,
    }  # fmt: skip


def rows(run: Run) -> Iterator[Row]:
    for number in range(run.options.first, run.options.first + run.options.runs):
        yield {"run": number, **run.row(str(number), partial(measure, number, run.options))}


def verdict(row: Row) -> str:
    if row["outcome"] != "kept":
        return str(row["outcome"])
    if row["held"] <= row["max_drop"]:
        return "kept"
    return "broken for certain" if row["interval"][0] > row["max_drop"] else "broken"


def figures(document: Document) -> tuple[int, int, float]:
    """Runs that keep the budget on held-out images, runs that found an artifact within it, and the median of their times fewer bytes."""
    found = [row for row in document.rows if row["outcome"] == "kept"]
    return sum(verdict(row) == "kept" for row in found), len(found), statistics.median(row["smaller"] for row in found)


def newest(document: Document) -> str:
    kept, found, smaller = figures(document)
    excess = [100 * (row["held"] - row["max_drop"]) for row in document.rows if verdict(row).startswith("broken")]
    return (
        f"of {len(document.rows)} runs {found} found an artifact within the budget: {kept} of them keep it ({100 * kept / found:.1f} %), "
        f"median {smaller:.1f} times fewer bytes" + (f"; the largest loss is {max(excess):.1f} points too much" if excess else "")
    )


def headline(documents: list[Document]) -> str:
    kept, found, smaller = figures(documents[-1])
    return f"**{smaller:.1f}× smaller** (median of {found} runs); {kept} of {found} kept the budget on unseen data"


def limits(documents: list[Document]) -> str:
    kept, found, _ = figures(documents[-1])
    return f"An accuracy budget was broken on held-out data in {found - kept} of {found} runs"


BENCHMARK = Benchmark(
    name="budget_runs", options=BudgetRunsOptions, measure=rows, newest=newest, n=lambda found: f"{len(found)} runs",
    about="""Networks of random depth and width, trained on digits before photographs. Drop and its bound with 95 % certainty on 1,500
validation images, drop on 3,750 other images (held out), bytes and latency beside the FP32 artifact. *Kept*: the drop on the held-out
images is within the budget. *Broken for certain*: its whole 95 % interval is above it. A budget that is not reached counts as neither.""",
    tables=(
        Table(
            columns=(
                *columns("network=kind, params=parameters, FP32=accuracy:.3f, objective, budget=max_drop:.4f, drop:.4f, bound:.4f"),
                *columns("held out=held:.4f, smaller:.1f, faster:.2f"), Column(title="verdict", value=verdict),
            )
        ),
    ),
    goals=(
        Goal(
            name="runs that keep the budget on held-out data", values=lambda document: truediv(*figures(document)[:2]), at_least=0.95,
            form="{:.1%}",
        ),
    ),
    blocks={"claims": lambda documents: newest(documents[-1]), "README": headline, "limits": limits},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
