"""Compare three criteria for low rank: accuracy against parameters before and after training, and the time that a factored layer saves.

    python benchmarks/lowrank.py --seeds 0 [--shares 0.5 0.35 0.2]

From one FP32 model a seed (the demonstration's, hybrid-s on earth), for each share of parameters and each criterion, the score at once and
after the recovery stage. Criteria: the same share of Σσ of every weight (`cumulative`, the usual one), of Σσ² (`energy`), and muntin's
default, the least loss of the output on calibration images (`activation`). Then each kind of layer alone in an INT8 artifact in OpenVINO,
dense and factored, in turns. Time on two cores: about four minutes of FP32 training a seed, then one a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import muntin
from documents import Document, Row, Table, columns, grouped, seeds_of
from harness import Benchmark, Options, Run, main, option, seeds_option
from measures import ms_in_turns, score
from muntin.budgeting.candidate import CourseStage
from muntin.compression import load_model
from muntin.compression.low_rank.factored_layers import full_ranks
from muntin.compression.low_rank.factorization import factorize, low_rank
from muntin.deployment.counting import parameter_count
from muntin.training import Checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.distributed.stored_tensors import AVERAGE
from resumed import demo_recipe, train_stage, trained

ROUNDS = 40
CRITERIA = ("cumulative", "energy", "activation")
LAYERS: dict[str, tuple[nn.Linear | nn.Conv2d, tuple[int, int], tuple[int, ...]]] = {
    "1x1 conv 256 -> 256 at 32², rank 64": (nn.Conv2d(256, 256, 1), (256, 32), (64,)),
    "1x1 conv 256 -> 1024 at 32², rank 64": (nn.Conv2d(256, 1024, 1), (256, 32), (64,)),
    "3x3 conv 64 -> 64 at 128², ranks 32, 32": (nn.Conv2d(64, 64, 3, padding=1), (64, 128), (32, 32)),
    "3x3 conv 64 -> 64 at 128², ranks 16, 16": (nn.Conv2d(64, 64, 3, padding=1), (64, 128), (16, 16)),
    "3x3 conv 256 -> 256 at 32², ranks 96, 96": (nn.Conv2d(256, 256, 3, padding=1), (256, 32), (96, 96)),
    "7x7 conv 64 -> 64 at 64², rank 64": (nn.Conv2d(64, 64, 7, padding=3), (64, 64), (64,)),
}
"""Layer, (channels, side) of its input, ranks."""


def measure(checkpoint: Checkpoint, criterion: Any, share: float, folder: Path) -> Row:
    model, config = load_model(checkpoint), checkpoint.recipe.compression
    before = parameter_count(model)
    low_rank(model, calibration_of(checkpoint, source_of(checkpoint)), criterion=criterion, parameters=share)
    kept, at_once = parameter_count(model) / before, score(checkpoint, model)
    steps = round(config.recover.share * checkpoint.trained_steps)
    stage = CourseStage(name="low-rank", steps=steps, learning_rate=config.recover.learning_rate)
    train_stage(checkpoint, config.model_copy(update={"steps": steps}), folder, stage, model)
    kind = {"part": "score", "seed": checkpoint.recipe.seed, "criterion": criterion, "share": share}
    return kind | {"parameters": kept, "at_once": at_once, "trained": score(checkpoint, model)}


def layer_rows(folder: Path) -> Iterator[Row]:
    """Each layer between two pixel-wise ones, dense and factored: the difference is the layer's."""
    torch.manual_seed(0)
    for name, (layer, (channels, side), ranks) in LAYERS.items():
        example = torch.randint(0, 256, (1, 3, side, side))
        ends = nn.Conv2d(3, channels, 1), nn.Conv2d(layer.weight.shape[0], 4, 1)
        sessions = {}
        for kind, middle in (("dense", layer), ("factored", factorize(layer, ranks))):
            model = nn.Sequential(ends[0], nn.ReLU(), middle, nn.ReLU(), ends[1]).eval()
            sessions[kind] = muntin.load(muntin.export(model, example, folder / f"layer-{kind}", calibration=[example]).path)
        ms = ms_in_turns(sessions, example.permute(0, 2, 3, 1).to(torch.uint8).numpy(), ROUNDS)
        times = {f"{kind}_ms": each for kind, each in ms.items()} | {"gain": ms["dense"] / ms["factored"]}
        yield {"part": "layer", "layer": name, "full": full_ranks(layer), "ranks": ranks, **times}


@dataclass(frozen=True, kw_only=True)
class LowRankBenchmarkOptions(Options):
    seeds: tuple[int, ...] = seeds_option(0)
    shares: tuple[float, ...] = option((0.5, 0.35, 0.2), "shares of the parameters", selects=True)


def rows(run: Run) -> Iterator[Row]:
    for seed in run.options.seeds:
        folder = run.folder / f"seed-{seed}"
        checkpoint = trained(demo_recipe({"seed": seed}), folder)
        floats = score(checkpoint, load_model(checkpoint))
        yield {"part": "score", "seed": seed, "criterion": "none", "share": 1.0, "parameters": 1.0, "at_once": floats}
        for share in run.options.shares:
            for criterion in CRITERIA:
                compression, name = checkpoint.recipe.compression.model_dump(mode="json"), f"{criterion}-{share}"
                settings = {"weights": checkpoint.state.sha256[AVERAGE], "compression": compression}
                yield run.row(f"seed-{seed}/{name}", partial(measure, checkpoint, criterion, share, folder / name), **settings)
    yield from layer_rows(run.folder)


def by_seed(found: list[Row]) -> Iterator[Row]:
    """A row for each share and criterion, with the scores of the seeds in order."""
    scores = [row for row in found if row["part"] == "score"]
    for (share, criterion), each in grouped(scores, "share", "criterion").items():
        told = {key: " ".join(f"{row[key]:.3f}" for row in each if key in row) for key in ("at_once", "trained")}
        yield {"criterion": "FP32" if criterion == "none" else criterion, "share": share} | told


def newest(document: Document) -> str:
    scores = list(by_seed(document.rows))
    least = min((row["share"] for row in scores), default=None)
    told = [f"{row['criterion']} {row['at_once']}" for row in scores if row["share"] == least]
    gains = [row["gain"] for row in document.rows if row["part"] == "layer"]
    layers = f"a factored layer {min(gains):.2f} to {max(gains):.2f} times as fast in INT8" if gains else ""
    return "; ".join(filter(None, [f"{least:.0%} of the parameters, before training: {', '.join(told)}" if told else "", layers]))


BENCHMARK = Benchmark(
    name="lowrank", options=LowRankBenchmarkOptions, measure=rows, newest=newest, n=seeds_of,
    about="hybrid-s on `earth`: test mIoU of each seed at once and after the recovery stage. `cumulative` is the usual criterion. No goal.",
    variant=lambda document: "" if any("trained" in row for row in document.rows) else "layers",
    tables=(
        Table(columns=columns("share of parameters=share:.0%, criterion, at once=at_once, trained"), rows=by_seed),
        Table(
            columns=columns("layer, dense ms=dense_ms:.3f, factored ms=factored_ms:.3f, gain:.2f"),
            rows=lambda found: [row for row in found if row["part"] == "layer"],
            title="One layer in INT8, dense time over factored",
        ),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
