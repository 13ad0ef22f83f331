"""Compress networks within an accuracy budget: muntin.compress, each pass alone swept, and NNCF's accuracy control, as deployed.

    python benchmarks/budget.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--budgets 3] [--seeds 3] [--trials 10]
                                [--steps 1200] [--output runs/benchmark-budget] [--json]

Networks, packages and NNCF's environment: as for `foreign.py`. Metrics: share of crops with FP32's class (EfficientNet-Lite0), mean cosine
with FP32's embedding (MiniLM), accuracy (the ResNet, which is trained here). Every contender chooses on the same inputs (`choosing`) the
smallest of its artefacts whose metric is within the budget; the figures are those of other inputs, which none has seen (`holdout`).
Calibration and training use other pictures and sentences than both. Artefacts run as deployed: ours with float layers as recorded, NNCF's
as OpenVINO chooses, which is 16 bits where the machine has them. Contenders:
    muntin      muntin.compress: channels, ranks and bits together; `--trials` artefacts at most
    bits, ranks, channels       quantize, or low_rank or prune and then INT8, at several strengths
    nncf        nncf.quantize_with_accuracy_control, told the budget
Only the ResNet is trained: `--steps` steps of distillation a contender, shared evenly among its artefacts.
Columns: the drop on the choosing and the holdout inputs, bytes and how many times fewer than FP32's weights, median milliseconds (all
chosen artefacts of a seed in turns), seconds of the contender (a sweep is counted once for each budget), artefacts made. A row that is
measured already is not measured again. Run it alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import muntin
from foreign_networks.forms import RATE, parameters_of
from foreign_networks.subjects import PRETRAINED, Batch, Subject, batches, without_padding
from foreign_networks.trained import TRAINED
from kept import Row, kept_row, now
from muntin.errors import MuntinError
from muntin.models.eager import call, tensors_of
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.timing import interleaved_latency
from options import at_least
from quantizer_peers.jobs import CALIBRATION, convert, nncf_job
from quantizer_peers.scoring import Call, PlainModel, answers_of, bytes_of, each, open_artifact, reference

PROTOCOL = 2
"""Version of the rows."""
BUDGETS = {"efficientnet-lite0": (0.05, 0.1, 0.2), "minilm": (0.005, 0.01, 0.02), "resnet": (0.005, 0.01, 0.02)}
SUBJECTS = tuple(subject for subject in (*PRETRAINED, *TRAINED) if subject.name in BUDGETS)
SHARES = (0.8, 0.6, 0.4)
"""Parameters that low rank and pruning leave."""
SWEEPS: dict[str, tuple[float, ...]] = {"bits": (8, 6, 5, 4.5, 4), "ranks": SHARES, "channels": SHARES}


class Bench:
    """One network of one seed: its inputs, FP32's answers, and the metric."""

    def __init__(self, subject: Subject, seed: int, packages: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.subject, self.seed, self.folder, self.settings = subject, seed, folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.module: nn.Module = subject.build(packages, folder, seed).eval()
        self.calibration = subject.inputs(packages, "train", settings["calibration"], seed)
        unlabelled = subject.inputs(packages, "train", settings["unlabelled"], seed + 1000)
        self.train = batches(unlabelled) if subject.labels is not None else None
        count, total = settings["choosing"], settings["choosing"] + settings["holdout"]
        test = subject.inputs(packages, "test", total, 0)
        labels = None if subject.labels is None else subject.labels(packages, total)
        self.parts = {"choosing": slice(0, count), "holdout": slice(count, total)}
        self.inputs = {part: {name: value[rows] for name, value in test.items()} for part, rows in self.parts.items()}
        self.exact = {part: reference(self.module, folder, inputs) for part, inputs in self.inputs.items()}
        self.labels = {part: None if labels is None else labels[rows] for part, rows in self.parts.items()}

    def scores(self, part: str, answers: NDArray[np.float32]) -> NDArray[np.float64]:
        """The metric of each input."""
        exact, labels = self.exact[part], self.labels[part]
        if self.subject.judged_by == "vectors":
            norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(answers, axis=1)
            return np.asarray((exact * answers).sum(1) / norms, np.float64)
        return np.asarray(answers.argmax(1) == (exact.argmax(1) if labels is None else labels), np.float64)

    def judged(self, path: Path) -> Row:
        """Metric of an artefact on both parts, and the drops from FP32's."""
        row: Row = {"path": str(path.relative_to(self.folder)), "bytes": bytes_of(path)}
        for part, inputs in self.inputs.items():
            score = float(self.scores(part, answers_of(self.opened(path), inputs)).mean())
            row[part] = {"score": score, "drop": float(self.scores(part, self.exact[part]).mean()) - score}
        return row

    def opened(self, path: Path) -> Call:
        one = each(self.inputs["choosing"])[0]
        if path.suffix == ".xml":
            return PlainModel(path, one, precision=None, threads=self.settings["threads"])
        return open_artifact(path, one, precision="recorded", threads=self.settings["threads"])[1]

    # contenders

    def muntin(self, max_drop: float) -> Row:
        def evaluate(part: str, model: Callable[..., Any]) -> NDArray[np.float64]:
            answers = [tensors_of(call(model, batch))[0].numpy() for batch in batches(self.inputs[part])]  # type: ignore[arg-type]
            return self.scores(part, np.concatenate(answers))

        started, steps = time.perf_counter(), self.settings["steps"] // self.settings["trials"]
        recipe = {"trials": self.settings["trials"], "steps": steps if self.train else None, "learning_rate": RATE}
        result = muntin.compress(
            self.module, calibration=without_padding(self.calibration), evaluate=partial(evaluate, "choosing"),
            budget=muntin.Budget(max_drop=max_drop, confidence=None), finetune=self.train, recipe=recipe,
            folder=self.folder / f"muntin-{max_drop:g}", seed=self.seed,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "artifacts": len(result.trials), "parameters": parameters_of(result.model),
                "width": result.best.plan.width if result.best else 1.0, **self.judged(result.artifact.path)}  # fmt: skip

    def point(self, sweep: str, strength: float) -> Row:
        """One artefact of a sweep."""
        model, given, started = copy.deepcopy(self.module), without_padding(self.calibration), time.perf_counter()
        narrow: dict[str, Any] = {"bits": int(strength) if float(strength).is_integer() else strength} if sweep == "bits" else {}
        try:
            if sweep == "ranks":
                muntin.low_rank(model, given, parameters=strength, keep=self.subject.keep)
            elif sweep == "channels":
                muntin.prune(model, given, parameters=strength, keep=self.subject.keep)
        except MuntinError as error:  # out of reach
            return {"cannot": str(error)}
        steps = self.settings["steps"] // len(SWEEPS[sweep])
        if self.train is not None and not narrow:
            self._distil(model, self.train, steps)
        if any(isinstance(layer, nn.Embedding) for layer in model.modules()):
            narrow["embedding_bits"] = 4 if strength < 8 else 8
        if self.train is not None and isinstance(narrow.get("bits"), int):
            muntin.prepare_qat(model, given, bits=narrow["bits"])
            self._distil(model, self.train, steps)
            muntin.freeze(model)
        else:
            muntin.quantize(model, given, **narrow)
        seconds, path = time.perf_counter() - started, self.folder / f"{sweep}-{strength:g}"
        muntin.export(model, batches(self.calibration)[0], path)
        return {"seconds": seconds, "parameters": parameters_of(model), **self.judged(path)}

    def _distil(self, model: nn.Module, train: list[Batch], steps: int) -> None:
        muntin.distil(model, self.module, train, steps=steps, loss=self.subject.distance, learning_rate=RATE, seed=self.seed)

    def swept(self, sweep: str, max_drop: float, points: Mapping[float, Row]) -> Row:
        """The smallest artefact of a sweep within the budget on the choosing inputs; the one with the least drop if there is none."""
        made = [row for row in points.values() if "cannot" not in row]
        if not made:
            return dict(next(iter(points.values())))
        kept = [row for row in made if row["choosing"]["drop"] <= max_drop]
        best = min(kept, key=lambda row: row["bytes"]) if kept else min(made, key=lambda row: row["choosing"]["drop"])
        return {**best, "seconds": sum(row["seconds"] for row in made), "artifacts": len(made)}

    def nncf(self, python: str, max_drop: float) -> Row:
        source, path = convert(copy.deepcopy(self.module), self.calibration, self.folder), self.folder / f"nncf-{max_drop:g}" / "model.xml"
        np.savez(self.folder / CALIBRATION, **self.calibration)
        choosing = self.folder / "choosing.npz"
        labels, exact = self.labels["choosing"], self.exact["choosing"]
        target = exact if self.subject.judged_by == "vectors" else exact.argmax(1) if labels is None else labels
        np.savez(choosing, **self.inputs["choosing"], target=target)
        options = dict(self.subject.schemes["nncf"])
        answer = nncf_job(python, source, self.folder / CALIBRATION, path, options, control={"inputs": str(choosing), "max_drop": max_drop})
        if "refused" in answer:
            return {"cannot": answer["refused"]}
        return {"seconds": answer["seconds"], "artifacts": 1, "parameters": parameters_of(self.module), **self.judged(path)}


def measure(subject: Subject, arguments: argparse.Namespace, settings: dict[str, Any], machine: Row) -> Row:
    """All rows of a network: by budget and contender, a list over seeds."""
    rows: dict[str, dict[str, list[Row]]] = {}
    for seed in range(arguments.seeds):
        folder = arguments.output.resolve() / subject.name / str(seed)
        bench = Bench(subject, seed, arguments.packages.resolve(), folder, settings)
        keep = partial(kept_row, settings=settings, hardware=machine)
        sweeps = {
            sweep: {one: keep(folder / f"{sweep}-{one:g}.json", measure=partial(bench.point, sweep, one)) for one in strengths}
            for sweep, strengths in SWEEPS.items()
        }
        for budget in BUDGETS[subject.name][: arguments.budgets]:
            made = {"muntin": keep(folder / f"muntin-{budget:g}.json", measure=partial(bench.muntin, budget))}
            made |= {sweep: bench.swept(sweep, budget, points) for sweep, points in sweeps.items()}
            if arguments.nncf_python:
                made["nncf"] = keep(folder / f"nncf-{budget:g}.json", measure=partial(bench.nncf, arguments.nncf_python, budget))
            latency = keep(folder / f"latency-{budget:g}.json", measure=partial(_timed, bench, made, arguments.rounds))
            for name, row in made.items():
                rows.setdefault(f"{budget:g}", {}).setdefault(name, []).append({**row, "ms": latency["ms"].get(name)})
            print(f"{subject.name}, seed {seed}, budget {budget:g}: {', '.join(map(_figures, made.items()))}", file=sys.stderr, flush=True)
    return {"description": subject.description, "fp32_bytes": parameters_of(bench.module) * 4, "rows": rows}


def _timed(bench: Bench, made: Mapping[str, Row], rounds: int) -> Row:
    calls = {name: bench.opened(bench.folder / row["path"]) for name, row in made.items() if "cannot" not in row}
    latencies = interleaved_latency(calls, each(bench.inputs["choosing"])[0], rounds=rounds)
    return {"ms": {name: latency.median_ms for name, latency in latencies.items()}}


def _figures(item: tuple[str, Row]) -> str:
    name, row = item
    return f"{name} refused" if "cannot" in row else f"{name} {row['holdout']['drop']:.4f} at {row['bytes'] / 1e6:.2f} MB"


def _over(values: list[float], digits: int) -> str:
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def print_table(networks: dict[str, Row], hardware: Row) -> None:
    for name, network in networks.items():
        print(f"{name}: {network['description']}; weights {network['fp32_bytes'] / 1e6:.2f} MB in FP32")
        head = {"drop, choosing": 16, "drop, holdout": 16, "MB": 13, "smaller": 9, "ms": 7, "s": 7, "made": 6}
        print(f"  {'budget':<8}{'contender':<11}{''.join(f'{title:>{width}}' for title, width in head.items())}")
        for budget, contenders in network["rows"].items():
            for contender, each_seed in contenders.items():
                ok = [row for row in each_seed if "cannot" not in row]
                if not ok:
                    print(f"  {budget:<8}{contender:<11}refused: {each_seed[0]['cannot']}")
                    continue
                drops = [_over([row[part]["drop"] for row in ok], 4) for part in ("choosing", "holdout")]
                size = statistics.mean(row["bytes"] for row in ok)
                print(
                    f"  {budget:<8}{contender:<11}{drops[0]:>16}{drops[1]:>16}{_over([row['bytes'] / 1e6 for row in ok], 2):>13}"
                    f"{network['fp32_bytes'] / size:>9.1f}{statistics.mean(row['ms'] for row in ok):>7.2f}"
                    f"{statistics.mean(row['seconds'] for row in ok):>7.0f}{statistics.mean(row['artifacts'] for row in ok):>6.0f}"
                )
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages with weights and pictures")
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF")
    parser.add_argument("--only", nargs="+", choices=list(BUDGETS), default=None)
    parser.add_argument("--budgets", type=at_least(1), default=3, help="how many of each network's, the tightest first")
    parser.add_argument("--choosing", type=at_least(16), default=400, help="inputs on which contenders choose")
    parser.add_argument("--holdout", type=at_least(16), default=600, help="inputs of the figures")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--trials", type=at_least(1), default=10, help="most artefacts of muntin.compress")
    parser.add_argument("--steps", type=at_least(1), default=1200, help="of distillation, all artefacts of a contender together")
    parser.add_argument("--calibration", type=at_least(8), default=128, help="calibration inputs")
    parser.add_argument("--unlabelled", type=at_least(16), default=1024, help="inputs of distillation")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=60, help="of latency")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-budget"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    keys = ("choosing", "holdout", "calibration", "unlabelled", "trials", "steps", "threads", "rounds")
    settings = {key: getattr(arguments, key) for key in keys} | {"protocol": PROTOCOL}
    chosen = [subject for subject in SUBJECTS if arguments.only is None or subject.name in arguments.only]
    networks = {subject.name: measure(subject, arguments, settings, machine) for subject in chosen}
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "budget", "hardware": hardware, "settings": settings, "rows": networks}, indent=1))
    else:
        print_table(networks, hardware)


if __name__ == "__main__":
    main()
