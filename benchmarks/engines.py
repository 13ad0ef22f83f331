"""Compare the engines on the demonstration's artifacts: agreement, speed, and the cost of a Session.

    python benchmarks/engines.py [--run runs/demo] [--rounds 60]

From the run of `muntin demo` (made if missing, six to twelve minutes) three artifacts: FP32 layers, plain INT8, and the one that its
search chose. All is at 512 x 512, in turns. `bare`: the engine called directly with the same graph and options; `queue`: OpenVINO's
AsyncInferQueue with as many requests as streams. Time on two cores: about four minutes, beyond the demonstration. Run it alone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import muntin
from documents import Column, Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.artifact import open_artifact
from muntin.budgeting.run_budget import compress_run
from muntin.budgeting.trials import MODEL
from muntin.compression import load_compressed, load_model
from muntin.deployment.checkpoint_export import REVISION, export_checkpoint
from muntin.errors import DependencyError
from muntin.images import IGNORED
from muntin.runtime import ENGINES
from muntin.runtime.engines.openvino.output_fusion import ending_in_scores
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.quiet_imports import onnxruntime, openvino
from muntin.runtime.profiling.profile import fill
from muntin.runtime.profiling.timing import interleaved_latency, interleaved_throughput
from muntin.runtime.session import Labels
from muntin.tasks.scores import PictureAnswers
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import evaluate, tile_of

SIDE = 512
SHAPE = (1, SIDE, SIDE)
WAYS = [("openvino", "f32"), ("openvino", "bf16"), ("openvino", "f16"), *((name, "recorded") for name in ENGINES if name != "openvino")]
"""Engines and precisions; those that this machine cannot open are found out by opening."""
Call = Callable[[NDArray[np.uint8]], Any]


def demonstration(run: Path) -> None:
    if not (run / "report.json").is_file():
        command = [sys.executable, "-m", "muntin", "demo", "--output", str(run), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command


def artifacts(run: Path, output: Path) -> dict[str, tuple[Checkpoint, Path, nn.Module]]:
    """Name -> checkpoint, artifact, the PyTorch model that it should agree with."""
    checkpoint = read_checkpoint(run)
    found = {name: export_checkpoint(checkpoint, output / name, integer=name == "int8") for name in ("fp32", "int8")}
    found["compressed"] = compress_run(checkpoint, progress=False).artifact  # its trials are measured already
    return {name: (checkpoint, artifact.path, simulated(checkpoint, artifact.path)) for name, artifact in found.items()}


def simulated(checkpoint: Checkpoint, artifact: Path) -> nn.Module:
    """The model of a search's artifact in PyTorch; FP32's for other artifacts."""
    model, place = load_model(checkpoint), artifact.parent / MODEL
    return load_compressed(place, model) if place.is_dir() else model


def labels_of(checkpoint: Checkpoint, session: Any) -> tuple[float, list[Labels]]:
    test = source_of(checkpoint).split("test")
    labels: PictureAnswers = []
    return evaluate(session, test, tile=tile_of(checkpoint.recipe.data.crop), answers=labels).score, labels


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


class Queue:
    """OpenVINO's AsyncInferQueue with a request for each stream, called as a `Session.map`; scores are taken in both."""

    def __init__(self, path: Path, precision: str, streams: int) -> None:
        self.streams, self.queue = streams, openvino.AsyncInferQueue(compiled(path, precision, "THROUGHPUT", streams), streams)
        self.queue.set_callback(lambda request, _: request.get_output_tensor(0).data.size)

    def map(self, batches: Iterable[Any]) -> Iterable[Any]:
        for batch in batches:
            self.queue.start_async([batch], share_inputs=True)
        self.queue.wait_all()
        return ()


def measure(checkpoint: Checkpoint, path: Path, model: nn.Module, rounds: int) -> Row:
    signature = checkpoint.recipe.signature(source_of(checkpoint).classes)
    eager = muntin.TorchSession(model, signature)
    expected, wanted = labels_of(checkpoint, eager)
    images = fill(open_artifact(path).golden_images()[0][0], SHAPE)
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
            both = interleaved_latency({"bare": call, "session": session}, images, rounds=rounds)
            row |= {f"{name}_ms": latency.median_ms for name, latency in both.items()}
            row["overhead_percent"] = (row["session_ms"] / row["bare_ms"] - 1) * 100
        if row["engine"] == "openvino":
            queued = {"queue_images_per_s": Queue(path, row["precision"], many.streams), "map_images_per_s": many}
            row |= interleaved_throughput(queued, images, rounds=5)
    eager_ms = median(row["eager_ms"] for row in rows)
    rows.insert(0, {"engine": "pytorch eager", "precision": "f32", "score": expected, "agree": 1.0, "median_ms": eager_ms})
    return {"rows": rows, "left_out": left_out}


class EnginesOptions(Options):
    run: Path = option(Path("runs/demo"), "run of `muntin demo`", selects=True)
    rounds: int = option(60, "timed calls", least=1)


def rows(run: Run) -> Iterator[Row]:
    demonstration(run.options.run)
    for name, (checkpoint, path, model) in artifacts(run.options.run, run.folder).items():
        # What machines are not told apart by: an engine that comes, or goes, makes another row.
        engines = {"onnxruntime": run.hardware.get("onnxruntime"), "providers": onnxruntime.get_available_providers()}
        settings = {"weights": open_artifact(path).manifest.files["weights.safetensors"], "revision": REVISION, "side": SIDE, **engines}
        row = run.row(name, measure, checkpoint, path, model, run.options.rounds, **settings)
        yield from ({"artifact": name, **each, "created": row["created"]} for each in row["rows"])
        yield from ({"artifact": name, "engine": way, "cannot": reason} for way, reason in row["left_out"].items())


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
    goals=(
        Goal(
            name="a Session beyond the bare engine, percent", values="overhead_percent", case="{artifact} {engine} {precision}", at_most=3,
            form="{:.1f}",
        ),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
