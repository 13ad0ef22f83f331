"""Compare the engines on the demonstration's artefacts: agreement, speed, and the cost of a Session.

    python benchmarks/engines.py [--run runs/demo] [--output runs/benchmark-engines] [--rounds 60] [--json]

From the run of `muntin demo` (made if it is not there, six to twelve minutes), three artefacts: FP32 layers, plain INT8, compressed (low
rank, W4A8, mixed). For each, in each engine that this machine can open:
    score, agree    test mIoU, and the share of the test split's labels that the same model in PyTorch gives, too
    ms              one call at 512 x 512, each engine interleaved with eager FP32 PyTorch: median, 90th and 99th percentile. For the
                    compressed artefact that baseline is the simulation of the same small model, not the float model it came from
    images/s        `Session.map` with one stream, and with as many as there are threads
    bare ms, over   the engine called directly with the same graph (for OpenVINO with the ending that a Session gives it, which endings.py
                    measures) and the same options, interleaved with the Session; the Session's extra, in percent
    bare images/s   OpenVINO's own AsyncInferQueue with as many requests, beside `Session.map`
A row that is there already is not run again; one of other weights or settings, or of another machine, is refused. Time on two cores: about
four minutes, beyond the demonstration. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from kept import Row, kept_row, now
from muntin.artifact import open_artifact
from muntin.compression import freeze, load_model
from muntin.deployment.checkpoint_export import REVISION, export_checkpoint
from muntin.errors import DependencyError
from muntin.images import IGNORED
from muntin.models import TorchSession
from muntin.runtime import ENGINES, Session, describe_hardware
from muntin.runtime.engines.openvino.output_fusion import ending_in_scores
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.quiet_imports import onnxruntime, openvino
from muntin.runtime.profiling.profile import fill
from muntin.runtime.profiling.timing import interleaved_latency, interleaved_throughput
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.evaluation import Labels, predictions, score, tile_of

SIDE = 512
GOALS = {"overhead_percent": 3.0}
Call = Callable[[NDArray[np.uint8]], Any]


def demonstration(run: Path) -> None:
    if not (run / "report.json").is_file():
        command = [sys.executable, "-m", "muntin", "demo", "--output", str(run), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command


def artifacts(run: Path, output: Path) -> dict[str, tuple[Checkpoint, Path, Any]]:
    """Name -> checkpoint, artefact, the PyTorch model that it should agree with."""
    plain, compressed = read_checkpoint(run), read_checkpoint(run / "compressed" / "3-mixed")
    trained = load_model(compressed)
    freeze(trained, calibration_of(plain, source_of(plain)))
    return {
        "fp32": (plain, export_checkpoint(plain, output / "fp32", integer=False).path, load_model(plain)),
        "int8": (plain, export_checkpoint(plain, output / "int8").path, load_model(plain)),
        "compressed": (compressed, export_checkpoint(compressed, output / "compressed").path, trained),
    }


def labels_of(checkpoint: Checkpoint, session: Any) -> tuple[float, list[Labels]]:
    test = source_of(checkpoint).split("test")
    pairs = list(predictions(session, test, tile=tile_of(checkpoint.recipe.data.crop)))
    return score(iter(pairs), session).score, [labels for _, labels in pairs]


def agreement(checkpoint: Checkpoint, one: list[Labels], other: list[Labels]) -> float:
    test = source_of(checkpoint).split("test")
    equal = [(a == b)[np.asarray(test[index].target) != IGNORED] for index, (a, b) in enumerate(zip(one, other, strict=True))]
    return float(np.concatenate([part.ravel() for part in equal]).mean())


def settings() -> list[tuple[str, str]]:
    """(engine, precision) pairs; those that this machine cannot open are found out by opening."""
    return [("openvino", "f32"), ("openvino", "bf16"), ("openvino", "f16"), *((name, "recorded") for name in ENGINES if name != "openvino")]


def bare(path: Path, engine: str, precision: str, images: NDArray[np.uint8]) -> Call | None:
    """The engine without muntin around it, ready for images of this shape: the same graph and options, nothing checked, nothing copied."""
    data = open_artifact(path).model_bytes()
    if engine == "openvino":
        core = openvino.Core()
        model = ending_in_scores(core.read_model(model=data, weights=b""))
        model.reshape(list(images.shape))
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": physical_cores(), "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", options | {"NUM_STREAMS": 1}).create_infer_request()
        return lambda x: request.infer([x], share_inputs=True, share_outputs=True)
    if engine != "onnxruntime":
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = physical_cores(), 1, 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def overhead(session: Session, call: Call, images: NDArray[np.uint8], rounds: int) -> tuple[float, float, float]:
    """Median ms of the bare engine and of the session, in turns of either order, and the median of the pairs' ratio."""
    calls: dict[str, Call] = {"bare": call, "session": session}
    times: dict[str, list[float]] = {"bare": [], "session": []}
    for round_ in range(rounds + 3):
        for name in sorted(calls, reverse=bool(round_ % 2)):
            calls[name](images)
            started = time.perf_counter()
            calls[name](images)
            if round_ >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    ratios = [s / b for s, b in zip(times["session"], times["bare"], strict=True)]
    return median(times["bare"]), median(times["session"]), (median(ratios) - 1) * 100


def queue_rate(path: Path, precision: str, images: NDArray[np.uint8], streams: int, session: Session, rounds: int) -> tuple[float, float]:
    """Images a second: OpenVINO's AsyncInferQueue with `streams` requests, and `session.map`, in turns; scores are taken in both."""
    core = openvino.Core()
    model = ending_in_scores(core.read_model(model=open_artifact(path).model_bytes(), weights=b""))
    model.reshape(list(images.shape))
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": physical_cores(), "PERFORMANCE_HINT": "THROUGHPUT"}
    queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", options | {"NUM_STREAMS": streams}), streams)
    taken: list[int] = []
    queue.set_callback(lambda request, _: taken.append(request.get_output_tensor(0).data.size))
    count = 8 * streams
    rates: dict[str, list[float]] = {"queue": [], "map": []}
    for round_ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(count):
            queue.start_async([images], share_inputs=True)
        queue.wait_all()
        middle = time.perf_counter()
        for _ in session.map([images] * count):
            pass
        if round_:
            rates["queue"].append(count / (middle - started))
            rates["map"].append(count / (time.perf_counter() - middle))
    return median(rates["queue"]), median(rates["map"])


def measure(name: str, checkpoint: Checkpoint, path: Path, model: Any, rounds: int) -> Row:
    signature = checkpoint.recipe.signature(source_of(checkpoint).classes)
    simulated, wanted = labels_of(checkpoint, TorchSession(model, signature))
    images = fill(open_artifact(path).golden()[0][0], (1, SIDE, SIDE))
    eager = TorchSession(load_model(checkpoint) if name != "compressed" else model, signature)
    rows: list[dict[str, Any]] = [{"artifact": name, "engine": "pytorch eager", "precision": "f32", "score": simulated, "agree": 1.0}]
    sessions: dict[int, Any] = {0: eager}
    left_out: dict[str, str] = {}
    for engine, precision in settings():
        try:
            sessions[len(rows)] = muntin.load(path, engine=engine, precision=precision, shapes=[(1, SIDE, SIDE)])
        except DependencyError as error:
            left_out[f"{engine} {precision}"] = str(error)
            continue
        session = sessions[len(rows)]
        found, labels = labels_of(checkpoint, session)
        rows.append(
            {
                "artifact": name,
                "engine": engine,
                "precision": session.precision,
                "score": found,
                "agree": agreement(checkpoint, wanted, labels),
            }
        )
    # Not all at once: each pair of an engine and eager PyTorch is interleaved, so that no row depends on which others there are.
    for index, row in enumerate(rows[1:], 1):
        pair = {"eager": eager, "engine": sessions[index]}
        latency = interleaved_latency(pair, images, rounds=rounds)
        row |= {key: getattr(latency["engine"], key) for key in ("median_ms", "p90_ms", "p99_ms")}
        row |= {"eager_ms": latency["eager"].median_ms, "speedup": latency["eager"].median_ms / latency["engine"].median_ms}
        many = muntin.load(
            path, engine=row["engine"], precision=row["precision"], streams=sessions[index].threads, shapes=[(1, SIDE, SIDE)]
        )
        rates = interleaved_throughput({"one": sessions[index], "many": many}, images, rounds=5)
        row |= {"images_per_s": rates["one"], "streams": many.streams, "images_per_s_streams": rates["many"]}
        call = bare(path, row["engine"], row["precision"], images)
        if call is not None:
            row["bare_ms"], row["session_ms"], row["overhead_percent"] = overhead(sessions[index], call, images, rounds)
        if row["engine"] == "openvino":
            row["queue_images_per_s"], row["map_images_per_s"] = queue_rate(path, row["precision"], images, many.streams, many, 5)
    rows[0] |= {"median_ms": median(row["eager_ms"] for row in rows[1:])}
    return {"rows": rows, "left_out": left_out}


def print_table(rows: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    columns = {
        "score": ".4f", "agree": ".4f", "median_ms": ".2f", "p90_ms": ".2f", "speedup": ".2f", "images_per_s": ".1f",
        "images_per_s_streams": ".1f", "queue_images_per_s": ".1f", "bare_ms": ".2f", "overhead_percent": ".1f",
    }  # fmt: skip
    titles = ("score", "agree", "ms", "p90", "faster", "im/s", "streams", "queue", "bare", "over %")
    print(f"{'artefact':<12}{'engine':<22}" + "".join(f"{title:>9}" for title in titles))
    for row in rows:
        line = f"{row['artifact']:<12}{row['engine'] + ' ' + row['precision']:<22}"
        print(line + "".join(f"{format(row[key], form) if row.get(key) is not None else '–':>9}" for key, form in columns.items()))
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-engines"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    demonstration(arguments.run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = describe_hardware()
    rows: list[Row] = []
    left_out: dict[str, dict[str, str]] = {}
    for name, (checkpoint, path, model) in artifacts(arguments.run, arguments.output).items():
        settings = {"weights": checkpoint.state.sha256[AVERAGE], "revision": REVISION, "side": SIDE, "rounds": arguments.rounds}
        # What machines are not told apart by: an engine that comes, or goes, makes another row.
        settings |= {"onnxruntime": machine.get("onnxruntime"), "providers": onnxruntime.get_available_providers()}
        made = partial(measure, name, checkpoint, path, model, arguments.rounds)
        kept = kept_row(arguments.output / f"{name}.json", settings, made, hardware=machine)
        rows += kept["rows"]
        left_out[name] = kept["left_out"]
    hardware = {**machine, "created": now()}
    if arguments.json:
        document = {"hardware": hardware, "side": SIDE, "rows": rows, "left_out": left_out, "goals": GOALS}
        print(json.dumps({"benchmark": "engines", **document}, indent=1))
    else:
        print_table(rows, hardware)
        for name, reasons in left_out.items():
            for way, reason in reasons.items():
                print(f"left out  {name}, {way}: {reason}")


if __name__ == "__main__":
    main()
