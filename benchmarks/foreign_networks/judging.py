"""One network in FP32 and its forms as they are deployed: what `foreign.py` and `sparsity.py` compare, and how they print it."""

from __future__ import annotations

import argparse
import copy
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
from foreign_networks.forms import Form, Material, parameters_of
from foreign_networks.subjects import Subject, batches, without_padding
from kept import Row, kept_row
from muntin.runtime.profiling.timing import interleaved_latency
from quantizer_peers.jobs import CALIBRATION, convert, nncf_job
from quantizer_peers.scoring import Call, PlainModel, agreement, answers_of, bytes_of, each, open_artifact, reference

PRECISION = "f32"
Makers = dict[str, Callable[[], Row]]
"""By the name of a form, what makes and judges it."""


def file_name(form: str) -> str:
    """The name of a form's files."""
    return form.replace(" ", "-").replace(":", "of")


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

    def artifact(self, name: str, form: Form | None) -> Row:
        """Make a form (None: FP32 as it is), export it, and compare what is deployed with FP32."""
        model, started = copy.deepcopy(self.module), time.perf_counter()
        if form is not None:
            material = Material(
                subject=self.subject, batches=batches(self.train()), calibration=without_padding(self.calibration),
                steps=self.settings["steps"], seed=self.seed,
            )  # fmt: skip
            try:
                model = form(model, material)
            except muntin.MuntinError as error:
                return {"cannot": str(error)}
        seconds = time.perf_counter() - started
        path = self.folder / file_name(name)
        muntin.export(model, batches(self.calibration)[0], path)
        return {"seconds": seconds, "parameters": parameters_of(model), **self._judged(path)}

    def nncf(self, python: str, options: dict[str, str], name: str) -> Row:
        """NNCF's model, the same way."""
        source = convert(copy.deepcopy(self.module), self.calibration, self.folder)
        path, inputs = self.folder / file_name(name) / "model.xml", self.folder / CALIBRATION
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


def figures_of(row: Row) -> str:
    """A row in a few words."""
    if "cannot" in row:
        return f"refused: {row['cannot']}"
    main = row["same"] if "same" in row else row["cosine"]
    return f"{main:.4f}, {row['bytes'] / 1e6:.2f} MB, {row['seconds']:.0f} s"


def over(rows: list[Row], key: str, digits: int = 3) -> str:
    """Mean over the seeds, and spread."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return "–"
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def measure(
    subject: Subject, makers: Callable[[Judge], Makers], arguments: argparse.Namespace, settings: dict[str, Any], machine: Row
) -> Row:
    """All rows of a network: by form, a list over seeds; and the latencies of the first seed. `makers`: what makes each form."""
    rows: dict[str, list[Row]] = {}
    first: Judge | None = None
    for seed in range(arguments.seeds):
        folder = arguments.output.resolve() / subject.name / str(seed)
        judge = Judge(subject, seed, arguments.packages.resolve(), folder, settings)
        first = first or judge
        for name, make in makers(judge).items():
            row = kept_row(folder / f"{file_name(name)}.json", settings, make, hardware=machine)
            rows.setdefault(name, []).append(row)
            print(f"{subject.name}, seed {seed}, {name}: {figures_of(row)}", file=sys.stderr, flush=True)
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


def print_table(networks: dict[str, Row], hardware: Row) -> None:
    """A row for each form of each network."""
    for name, network in networks.items():
        accuracy = "" if network["fp32_accuracy"] is None else f"; accuracy in FP32 {network['fp32_accuracy']:.3f}"
        print(f"{name}: {network['description']}{accuracy}; weights {network['fp32_bytes'] / 1e6:.2f} MB in FP32")
        main, other = ("same", "kl") if network["judged_by"] == "classes" else ("cosine", "worst_cosine")
        print(f"  {'form':<24}{main:>15}{other:>15}{'accuracy':>15}{'M params':>10}{'MB':>8}{'smaller':>9}{'ms':>8}{'s':>7}")
        for form, rows in network["rows"].items():
            if "cannot" in rows[0]:
                print(f"  {form:<24}refused: {rows[0]['cannot']}")
                continue
            size = statistics.mean(row["bytes"] for row in rows)
            print(
                f"  {form:<24}{over(rows, main):>15}{over(rows, other):>15}{over(rows, 'accuracy'):>15}"
                f"{rows[0]['parameters'] / 1e6:>10.2f}{size / 1e6:>8.2f}{network['fp32_bytes'] / size:>9.1f}"
                f"{network['ms'][form]:>8.2f}{statistics.mean(row['seconds'] for row in rows):>7.0f}"
            )
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")
