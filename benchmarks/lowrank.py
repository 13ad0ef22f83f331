"""Compare three criteria for low rank: accuracy against parameters before and after training, and the time that a factored layer saves.

    python benchmarks/lowrank.py --seeds 0 [--shares 0.5 0.35 0.2] --output runs/benchmark-lowrank [--json]

One FP32 model a seed (the demonstration's, hybrid-s on earth), and from that same checkpoint, for each share of parameters and
each criterion: the score at once, and after the recovery stage (labels and distillation, as in the demonstration).
    cumulative   the same share of Σσ of every weight (the usual criterion), the threshold found that meets the budget
    energy       the same share of Σσ²
    activation   muntin's default: least harm to the answer on calibration images, ranks allocated together
Then layer by layer: each kind of layer alone in an INT8 artefact in OpenVINO, dense against factored, interleaved in one run.

A row that is there already is not run again; one of other weights or stages, or of another machine, is refused. Time on two cores: about
four minutes of FP32 training a seed, then one a row.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import muntin
from kept import Row, kept_row
from muntin.compression import load_model
from muntin.compression.low_rank.factored_layers import full_ranks
from muntin.compression.low_rank.factorization import factorize, low_rank
from muntin.deployment.counting import parameter_count
from muntin.models import TorchSession
from muntin.runtime import describe_hardware
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.config import CompressionConfig, LowRankConfig
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.evaluation import tile_of
from muntin.training.recipe import load_recipe
from resumed import compressed, trained

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


def score(checkpoint: Checkpoint, model: nn.Module) -> float:
    source = source_of(checkpoint)
    session = TorchSession(model, checkpoint.recipe.signature(source.classes))
    return muntin.evaluate(session, source.split("test"), tile=tile_of(checkpoint.recipe.data.crop)).score


def row(checkpoint: Checkpoint, seed: int, share: float, criterion: Any, folder: Path, hardware: Row) -> Row:
    stages = checkpoint.recipe.compression.model_copy(update={"low_rank": LowRankConfig(criterion=criterion, parameters=share)})
    settings = {"weights": checkpoint.state.sha256[AVERAGE], "compression": stages.model_dump(mode="json")}
    made = partial(measure, checkpoint, seed, stages, folder / f"{criterion}-{share}")
    return kept_row(folder / f"{criterion}-{share}.json", settings, made, hardware=hardware)


def measure(checkpoint: Checkpoint, seed: int, stages: CompressionConfig, folder: Path) -> Row:
    config = stages.low_rank
    assert config is not None
    model = load_model(checkpoint)
    before = parameter_count(model)
    low_rank(model, calibration_of(checkpoint, source_of(checkpoint)), **config.model_dump())
    at_once = score(checkpoint, model)
    run = compressed(checkpoint, folder, stages, until="low-rank")
    after = score(checkpoint, load_model(read_checkpoint(run.stages[0].checkpoint)))
    return {
        "seed": seed, "criterion": config.criterion, "share": config.parameters, "parameters": parameter_count(model) / before,
        "at_once": at_once, "trained": after,
    }  # fmt: skip


def layer_rows(folder: Path, rounds: int = 40) -> list[dict[str, Any]]:
    """Each layer between two pixel-wise ones, dense and factored: the difference is the layer's."""
    torch.manual_seed(0)
    rows = []
    for name, (layer, (channels, side), ranks) in LAYERS.items():
        example = torch.randint(0, 256, (1, 3, side, side))
        ends = nn.Conv2d(3, channels, 1), nn.Conv2d(layer.weight.shape[0], 4, 1)
        sessions = {}
        for kind, middle in (("dense", layer), ("factored", factorize(layer, ranks))):
            model = nn.Sequential(ends[0], nn.ReLU(), middle, nn.ReLU(), ends[1]).eval()
            sessions[kind] = muntin.load(muntin.export(model, example, folder / f"layer-{kind}", calibration=[example]).path)
        measured = interleaved_latency(sessions, example.permute(0, 2, 3, 1).to(torch.uint8).numpy(), rounds=rounds)
        dense, factored = (measured[kind].median_ms for kind in ("dense", "factored"))
        rows.append(
            {"layer": name, "full": full_ranks(layer), "ranks": ranks, "dense_ms": dense, "factored_ms": factored, "gain": dense / factored}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-lowrank"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    hardware = describe_hardware()
    rows = []
    for seed in arguments.seeds:
        folder = arguments.output / f"seed-{seed}"
        recipe = load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", [f"seed={seed}"])
        checkpoint = trained(recipe, folder)
        rows.append(
            {"seed": seed, "criterion": "none", "share": 1.0, "parameters": 1.0, "at_once": score(checkpoint, load_model(checkpoint))}
        )
        rows += [row(checkpoint, seed, share, criterion, folder, hardware) for share in arguments.shares for criterion in CRITERIA]
    layers = layer_rows(arguments.output)
    if arguments.json:
        print(json.dumps({"benchmark": "lowrank", "hardware": hardware, "rows": rows, "layers": layers}, indent=1))
        return
    print(f"{'seed':<6}{'criterion':<14}{'parameters':>12}{'at once':>10}{'trained':>10}")
    for entry in rows:
        after = f"{entry['trained']:>10.4f}" if "trained" in entry else f"{'–':>10}"
        print(f"{entry['seed']:<6}{entry['criterion']:<14}{entry['parameters']:>12.1%}{entry['at_once']:>10.4f}{after}")
    print(f"\n{'layer, INT8, dense against factored':<44}{'dense ms':>10}{'factored':>10}{'gain':>8}")
    for entry in layers:
        print(f"{entry['layer']:<44}{entry['dense_ms']:>10.3f}{entry['factored_ms']:>10.3f}{entry['gain']:>8.2f}")
    print(f"{hardware['cpu']}, {hardware['cores']} cores")


if __name__ == "__main__":
    main()
