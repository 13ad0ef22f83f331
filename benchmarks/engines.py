"""Compare the engines on the demonstration's artifacts: agreement, speed, and the cost of a Session.

    python benchmarks/engines.py [--run runs/demo] [--rounds 60]

From the run of `muntin demo` (made if it is not there, six to twelve minutes), three artifacts: FP32 layers, plain INT8, compressed (low
rank, W4A8, mixed). For each, in each engine that this machine can open:
test mIoU, and the share of the test split's labels that the same model in PyTorch gives, too; the time of a call at 512 x 512 in turns
with eager FP32 PyTorch (for the compressed artifact the simulation of the same small model, not the float model it came from); images a
second of `Session.map` with one stream, and with as many as there are threads; `bare`: the engine called directly with the same graph (for
OpenVINO with the ending that a Session gives it, which endings.py measures) and the same options, in turns with the Session, whose extra is
in percent; `queue`: OpenVINO's own AsyncInferQueue with as many requests, beside `Session.map`. Time on two cores: about four minutes,
beyond the demonstration. Run it alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from documents import Column, Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.artifact import open_artifact
from muntin.compression import freeze, load_model
from muntin.deployment.checkpoint_export import REVISION, export_checkpoint
from muntin.errors import DependencyError
from muntin.images import IGNORED
from muntin.models import TorchSession
from muntin.runtime import ENGINES, Session
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
SHAPE = (1, SIDE, SIDE)
WAYS = [("openvino", "f32"), ("openvino", "bf16"), ("openvino", "f16"), *((name, "recorded") for name in ENGINES if name != "openvino")]
"""Engines and precisions; those that this machine cannot open are found out by opening."""
Call = Callable[[NDArray[np.uint8]], Any]


def demonstration(run: Path) -> None:
    if not (run / "report.json").is_file():
        command = [sys.executable, "-m", "muntin", "demo", "--output", str(run), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command


def artifacts(run: Path, output: Path) -> dict[str, tuple[Checkpoint, Path, Any]]:
    """Name -> checkpoint, artifact, the PyTorch model that it should agree with."""
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


def compiled(path: Path, precision: str, hint: str, streams: int) -> Any:
    """The graph that a Session of OpenVINO runs, compiled by OpenVINO itself with the same options."""
    core = openvino.Core()
    model = ending_in_scores(core.read_model(model=open_artifact(path).model_bytes(), weights=b""))
    model.reshape([*SHAPE, 3])
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": physical_cores(), "PERFORMANCE_HINT": hint}
    return core.compile_model(model, "CPU", options | {"NUM_STREAMS": streams})


def bare(path: Path, engine: str, precision: str) -> Call | None:
    """The engine without muntin around it, ready for images of this shape: the same graph and options, nothing checked, nothing copied."""
    if engine == "openvino":
        request = compiled(path, precision, "LATENCY", 1).create_infer_request()
        return lambda x: request.infer([x], share_inputs=True, share_outputs=True)
    if engine != "onnxruntime":
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = physical_cores(), 1, 3
    session = onnxruntime.InferenceSession(open_artifact(path).model_bytes(), options, providers=["CPUExecutionProvider"])
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


def queue_rate(path: Path, precision: str, images: NDArray[np.uint8], session: Session, rounds: int) -> Row:
    """Images a second: OpenVINO's AsyncInferQueue with a request for each stream, and `session.map`, in turns; scores are taken in both."""
    queue = openvino.AsyncInferQueue(compiled(path, precision, "THROUGHPUT", session.streams), session.streams)
    taken: list[int] = []
    queue.set_callback(lambda request, _: taken.append(request.get_output_tensor(0).data.size))
    count = 8 * session.streams
    rates: dict[str, list[float]] = {"queue_images_per_s": [], "map_images_per_s": []}
    for round_ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(count):
            queue.start_async([images], share_inputs=True)
        queue.wait_all()
        middle = time.perf_counter()
        for _ in session.map([images] * count):
            pass
        if round_:
            rates["queue_images_per_s"].append(count / (middle - started))
            rates["map_images_per_s"].append(count / (time.perf_counter() - middle))
    return {name: median(values) for name, values in rates.items()}


def measure(name: str, checkpoint: Checkpoint, path: Path, model: Any, rounds: int) -> Row:
    signature = checkpoint.recipe.signature(source_of(checkpoint).classes)
    simulated, wanted = labels_of(checkpoint, TorchSession(model, signature))
    images = fill(open_artifact(path).golden()[0][0], SHAPE)
    eager = TorchSession(load_model(checkpoint) if name != "compressed" else model, signature)
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    sessions: list[Any] = []
    for engine, precision in WAYS:
        try:
            session = muntin.load(path, engine=engine, precision=precision, shapes=[SHAPE])
        except DependencyError as error:
            left_out[f"{engine} {precision}"] = str(error)
            continue
        found, labels = labels_of(checkpoint, session)
        sessions.append(session)
        rows.append({"engine": engine, "precision": session.precision, "score": found, "agree": agreement(checkpoint, wanted, labels)})
    # Not all at once: each pair of an engine and eager PyTorch is interleaved, so that no row depends on which others there are.
    for session, row in zip(sessions, rows, strict=True):
        latency = interleaved_latency({"eager": eager, "engine": session}, images, rounds=rounds)
        row |= {key: getattr(latency["engine"], key) for key in ("median_ms", "p90_ms", "p99_ms")}
        row |= {"eager_ms": latency["eager"].median_ms, "speedup": latency["eager"].median_ms / latency["engine"].median_ms}
        many = muntin.load(path, engine=row["engine"], precision=row["precision"], streams=session.threads, shapes=[SHAPE])
        rates = interleaved_throughput({"one": session, "many": many}, images, rounds=5)
        row |= {"images_per_s": rates["one"], "streams": many.streams, "images_per_s_streams": rates["many"]}
        if (call := bare(path, row["engine"], row["precision"])) is not None:
            row["bare_ms"], row["session_ms"], row["overhead_percent"] = overhead(session, call, images, rounds)
        if row["engine"] == "openvino":
            row |= queue_rate(path, row["precision"], images, many, 5)
    eager_ms = median(row["eager_ms"] for row in rows)
    rows.insert(0, {"engine": "pytorch eager", "precision": "f32", "score": simulated, "agree": 1.0, "median_ms": eager_ms})
    return {"rows": rows, "left_out": left_out}


@dataclass(frozen=True, kw_only=True)
class EnginesOptions(Options):
    run: Path = option(Path("runs/demo"), "run of `muntin demo`", selects=True)
    rounds: int = option(60, "timed calls", least=1)


def rows(run: Run) -> Iterator[Row]:
    demonstration(run.options.run)
    for name, (checkpoint, path, model) in artifacts(run.options.run, run.folder).items():
        # What machines are not told apart by: an engine that comes, or goes, makes another row.
        engines = {"onnxruntime": run.hardware.get("onnxruntime"), "providers": onnxruntime.get_available_providers()}
        settings = {"weights": checkpoint.state.sha256[AVERAGE], "revision": REVISION, "side": SIDE, **engines}
        row = run.row(name, partial(measure, name, checkpoint, path, model, run.options.rounds), **settings)
        yield from ({"artifact": name, **each, "created": row["created"]} for each in row["rows"])
        yield from ({"artifact": name, "engine": way, "cannot": reason} for way, reason in row["left_out"].items())


def overheads(document: Document) -> dict[str, float | None]:
    return {f"{row['artifact']} {row['engine']} {row['precision']}": row.get("overhead_percent") for row in document.rows if "agree" in row}


def newest(document: Document) -> str:
    compressed = [row for row in document.rows if row["artifact"] == "compressed" and "speedup" in row]
    times = ", ".join(f"{row['engine']} {row['precision']} {row['median_ms']:.1f}" for row in compressed)
    return f"compressed model, ms: {times}; {min(row['agree'] for row in compressed):.2%} of the labels and more are PyTorch's"


BENCHMARK = Benchmark(
    name="engines",
    options=EnginesOptions,
    measure=rows,
    about="""Agree: the share of test labels that are those of the same model in PyTorch. Faster: against eager PyTorch in turns (for the
compressed rows its simulation of the same small model). Images/s: `Session.map` with one stream, and with one for each thread; map/queue:
over OpenVINO's own asynchronous queue. Goal: a `Session` costs at most 3 % beyond the bare engine.""",
    newest=newest,
    tables=(
        Table(
            columns=(
                *columns(
                    "artifact, engine, precision, score:.4f, agree:.2%, ms=median_ms:.2f, p90=p90_ms:.2f, faster=speedup:.2f, "
                    "images/s=images_per_s:.1f, streams=images_per_s_streams:.1f, queue=queue_images_per_s:.1f, "
                    "bare ms=bare_ms:.2f, over %=overhead_percent:.1f"
                ),
                Column(
                    title="map/queue", form="{:.2f}",
                    value=lambda row: row["map_images_per_s"] / row["queue_images_per_s"] if "queue_images_per_s" in row else None,
                ),
            ),
        ),
    ),
    goals=(Goal(name="a Session beyond the bare engine, percent", values=overheads, at_most=3, form="{:.1f}"),),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
