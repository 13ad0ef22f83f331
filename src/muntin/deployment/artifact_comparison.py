"""Comparison of a run's deployed artefacts with each other and with PyTorch FP32: scores, latency, size, memory, and which one to take.

    each artefact: score on the validation split (it decides), score on the test split (it is shown), labels equal to those of FP32
    all together:  latency, one call after the other in turns, so that a disturbance hits all of them alike

`muntin compare` and `muntin report` both call `compare_artifacts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from muntin.artifact.answers import Task
from muntin.compression import load_model
from muntin.data import Source
from muntin.data.source import Samples
from muntin.deployment.checkpoint_candidate import CheckpointCandidate
from muntin.deployment.checkpoint_export import SIZE_REASON, export_side
from muntin.deployment.run_artifacts import RunArtifact, missing_forms, run_artifacts, run_folder
from muntin.errors import CheckpointError
from muntin.images.rasters import Raster
from muntin.models import TorchSession
from muntin.runtime import Session, SessionOptions, describe_hardware, load
from muntin.runtime.profiling.cold_start import ArtifactCandidate, Candidate, measure_loading
from muntin.runtime.profiling.contention import notes_on, watch_cpu
from muntin.runtime.profiling.timing import latency_report
from muntin.runtime.tiles import Predictor
from muntin.tasks.learning import LEARNING
from muntin.tasks.scores import PictureAnswers, TaskScores
from muntin.text import count
from muntin.training.checkpoint import Checkpoint, source_of
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.fitting import broken_off

REFERENCE = "fp32"
"""Name of the row of PyTorch FP32."""
LATENCY_MARGIN = 0.1
"""Share of the fastest latency by which another may be longer and count as equal: about the noise of a timing."""
ROUNDING = 1e-9
"""Tolerance of a comparison of scores: 0.5 - 0.01 is not exactly 0.49."""
ROUNDS = 30
"""Timed calls of each candidate."""
Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ArtifactComparison:
    """Result of `compare_artifacts`, by the names of the rows.

    `record`: plain values, `ArtifactsRecord` of `muntin.reporting`. `taken`: the artefact to take. `tests`: evaluations on the test split,
    of the reference too. `labels`: of the artefact to take, for each test sample; of restore the pictures. `seconds`: of the evaluations.
    """

    record: dict[str, Any]
    taken: RunArtifact
    sessions: dict[str, Session]
    tests: dict[str, TaskScores]
    labels: PictureAnswers
    seconds: dict[str, float]
    notes: tuple[str, ...]


def compare_run(checkpoint: Checkpoint, *, rounds: int = ROUNDS, stage: Announce = lambda name: None) -> dict[str, Any]:
    """Compare all artefacts that lie in a run's folder. Returns plain values: the rows, the missing forms, and notes.

    Raises `CheckpointError` for a run without an artefact, and for the checkpoint of a compressed model.
    """
    artifacts, notes = run_artifacts(checkpoint)
    missing = missing_forms(checkpoint, artifacts)
    if not artifacts:
        reason = f" ({'; '.join(notes)})" if notes else ""
        raise CheckpointError(f"{run_folder(checkpoint)} holds no artefact of its weights{reason}: `{missing[0].command}` writes one")
    source = source_of(checkpoint)
    reference = TorchSession(load_model(checkpoint), checkpoint.signature)
    compared = compare_artifacts(checkpoint, artifacts, source, reference, rounds=rounds, memory=True, stage=stage)
    return {
        "title": checkpoint.recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "muntin": version("muntin"),
        "hardware": describe_hardware(),
        "task": checkpoint.recipe.task,
        "artifacts": compared.record,
        "missing": [asdict(entry) for entry in missing],
        "notes": [*broken_off(checkpoint), *notes, *compared.notes, *source.notes],
    }


def compare_artifacts(
    checkpoint: Checkpoint,
    artifacts: Sequence[RunArtifact],
    source: Source,
    reference: TorchSession,
    *,
    rounds: int = ROUNDS,
    memory: bool = False,
    stage: Announce = lambda name: None,
) -> ArtifactComparison:
    """Measure artefacts in OpenVINO beside the reference, PyTorch FP32 of the run's checkpoint, and choose one by `rule`.

    `memory`: also open each candidate in a process of its own, and measure its peak. The test split is read when the artefact is chosen.
    Costs a prediction of both splits for each candidate, and `rounds` timed calls.
    """
    opened = {entry.name: load(entry.artifact.path) for entry in artifacts}
    sessions: dict[str, Predictor] = {REFERENCE: reference, **opened}
    tile = tile_of(checkpoint.recipe.data.crop)
    scored = _Scored(validation={}, tests={}, same={}, labels=[], seconds={})
    scored.validate(sessions, source.split("validation"), tile=tile, stage=stage)
    side, threads = _common_side(export_side(checkpoint.recipe), opened.values()), next(iter(opened.values())).threads
    engines = {REFERENCE: f"PyTorch {torch.__version__} eager FP32, {count(threads, 'thread')}"}
    engines |= {entry.name: engine_words(entry, opened[entry.name]) for entry in artifacts}
    stage("latency")
    image_HWC = middle_window(source.split("test")[0].image, side)
    candidates = {name: (engines[name], session) for name, session in sessions.items()}
    with torch_threads(threads), watch_cpu() as watch:
        latency = latency_report(candidates, image_HWC, rounds=rounds)
    files = {
        REFERENCE: (checkpoint.path, checkpoint.bytes),
        **{entry.name: (entry.artifact.path, entry.artifact.bytes) for entry in artifacts},
    }
    score_format = checkpoint.recipe.answer.score
    known = {
        timed["name"]: {"validation": scored.validation[timed["name"]], "bytes": files[timed["name"]][1], **timed}
        for timed in latency["rows"]
    }  # fmt: skip
    take = choose([row for name, row in known.items() if name != REFERENCE], score_format.margin)["name"]
    scored.test(sessions, source.split("test"), tile=tile, keep=take, stage=stage)
    rows = []
    for name, row in known.items():
        path, _ = files[name]
        stage(f"memory of {name}")
        peak = _peak_mib(path, threads=threads, side=side, reference=name == REFERENCE) if memory else None
        found = {"test": scored.tests[name].score, "same_labels": scored.same[name], "peak_mib": peak}
        rows.append({"name": name, "path": str(path), **row, **found})
    return ArtifactComparison(
        record={
            **{key: latency[key] for key in ("height", "width", "rounds")},
            "size_reason": SIZE_REASON if side == export_side(checkpoint.recipe) else f"nearest to {SIZE_REASON} that the artefacts take",
            "samples": {name: len(source.split(name)) for name in ("validation", "test")},
            "rows": rows,
            "take": take,
            "rule": rule(score_format.margin, score_format.unit),
            "others": watch.others,
        },
        taken=next(entry for entry in artifacts if entry.name == take),
        sessions=opened,
        tests=scored.tests,
        labels=scored.labels,
        seconds=scored.seconds,
        notes=tuple(f"Latency: {note}." for note in notes_on(watch.others)),
    )


def _common_side(side: int, sessions: Iterable[Session]) -> int:
    """Return the side of the pictures that are timed: nearest to a given one that the sessions take. Their calls refuse another."""
    for session in sessions:
        side = session.signature.sizes.square(side) or side
    return side


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Evaluations by name. `same`: share of labels that equal those of the first session, the reference. `labels`: of the kept one."""

    validation: dict[str, float]
    tests: dict[str, TaskScores]
    same: dict[str, float]
    labels: PictureAnswers
    seconds: dict[str, float]

    def validate(self, sessions: Mapping[str, Predictor], samples: Samples, *, tile: int, stage: Announce) -> None:
        for name, session in sessions.items():
            stage(f"validate {name}")
            started = perf_counter()
            self.validation[name] = evaluate(session, samples, tile=tile, similarity=False).score
            self.seconds[f"evaluate {name}"] = perf_counter() - started

    def test(self, sessions: Mapping[str, Predictor], samples: Samples, *, tile: int, keep: str, stage: Announce) -> None:
        reference: PictureAnswers = []
        for name, session in sessions.items():
            stage(f"evaluate {name}")
            started = perf_counter()
            labels: PictureAnswers = []
            self.tests[name] = evaluate(session, samples, tile=tile, answers=labels)
            reference = reference or labels
            if name == keep:
                self.labels.extend(labels)
            self.same[name] = equal_labels(samples, reference, labels, session.signature.task)
            self.seconds[f"evaluate {name}"] += perf_counter() - started


def rule(margin: float, unit: str = "") -> str:
    """Return in words how an artefact is chosen."""
    return (
        f"the fastest whose validation score is at most {margin:g}{unit} below the best artefact's; of those within "
        f"{100 * LATENCY_MARGIN:.0f} % of its latency, the smallest"
    )


def choose(rows: Sequence[Mapping[str, Any]], margin: float) -> Mapping[str, Any]:
    """Return the row of the artefact to take, by `rule`. The test score does not count."""
    best = max(row["validation"] for row in rows)
    good = [row for row in rows if row["validation"] >= best - margin - ROUNDING]
    fastest = min(row["median_ms"] for row in good)
    return min(
        (row for row in good if row["median_ms"] <= fastest * (1 + LATENCY_MARGIN)), key=lambda row: (row["bytes"], row["median_ms"])
    )


def engine_words(entry: RunArtifact, session: Session) -> str:
    """Return engine, numbers and threads of an opened artefact in words."""
    integers = "INT8 + " if entry.artifact.manifest.integers else ""
    return f"{session.engine} {integers}{session.precision.upper()}, {count(session.threads, 'thread')}"


def equal_labels(samples: Samples, one: PictureAnswers, other: PictureAnswers, task: Task) -> float:
    """Return the share of equal items of two models' answers, 0 to 1 (`Learning.same`)."""
    found = [LEARNING[task].same(samples[index], a, b) for index, (a, b) in enumerate(zip(one, other, strict=True))]
    return sum(equal for equal, _ in found) / max(1, sum(total for _, total in found))


def middle_window(image_HWC: NDArray[np.uint8] | Raster, side: int) -> NDArray[np.uint8]:
    """Return the middle of an image, extended by reflection where it is smaller than `side`."""
    pad = [(0, max(0, side - n)) for n in image_HWC.shape[:2]]
    if any(after for _, after in pad):
        image_HWC = np.pad(image_HWC[:, :], (*pad, (0, 0)), mode="symmetric")
    top, left = ((n - side) // 2 for n in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run PyTorch with `count` threads inside the block, the number of the session that it is timed beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak_mib(path: Path, *, threads: int, side: int, reference: bool) -> float | None:
    """Return the peak memory of opening a candidate and a first call, in MiB; None where the system does not report it."""
    candidate: Candidate = CheckpointCandidate(path=str(path), device="cpu") if reference else ArtifactCandidate(path=str(path))
    return measure_loading(candidate, SessionOptions(threads=threads, shapes=((1, side, side),))).peak_mib
