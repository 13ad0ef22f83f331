"""Comparison of a run's deployed artefact with its checkpoint: scores, sizes and latencies of every step on one test split.

    checkpoint -> FP32 score -> score of each compression stage (or of the INT8 simulation)
               -> export -> score of the artefact in its runtime -> agreement -> latency -> pictures

Nothing is chosen by the test split.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, check_target
from muntin.compression import Change, freeze, load_model
from muntin.compression.stages import FOLDER, broken_off, stage_checkpoints, stage_finished
from muntin.data import EarthSource, Sample
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, integer_model, other_artifact
from muntin.deployment.counting import image_macs, layer_macs, parameter_count, stored_bytes
from muntin.deployment.layer_rows import layer_rows, rank_rows
from muntin.deployment.pictures import write_examples, write_picture
from muntin.errors import ArtifactError, CheckpointError, VerificationError
from muntin.images import IGNORED
from muntin.models import TorchSession
from muntin.models.compression_record import Stage
from muntin.runtime import Session, describe_hardware, load, verify
from muntin.runtime.host.memory import no_memory
from muntin.runtime.profiling.contention import notes_on, watch_cpu
from muntin.runtime.profiling.timing import latency_report
from muntin.runtime.tiles import Predictor
from muntin.text import count
from muntin.training.checkpoint import AVERAGE, Checkpoint, calibration_of, read_checkpoint, source_of
from muntin.training.evaluation import Labels, predictions, score, tile_of
from muntin.training.recipe import recipe_text

LATENCY_SIDE = 512
"""Side of the image of a segmenter that is timed, pixels."""
Announce = Callable[[str], None]


def _plain_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return a note why a report shows plain INT8 although the run's folder holds stages of compression."""
    stages = _stages(checkpoint)
    if not stages:
        return ()
    if not _made_from(checkpoint, stages):
        return (
            f"Plain INT8: the stages in the run's folder {FOLDER} were made from another checkpoint; compress this one to report them.",
        )
    return (f"Plain INT8: the stages in the run's folder {FOLDER} are not done; `muntin compress --resume` goes on with them.",)


def finished_stages(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    """Return the stages in a run's folder, if the last one is finished and all were made from this checkpoint; otherwise nothing."""
    stages = _stages(checkpoint)
    finished = "mixed" in stages and stage_finished(stages["mixed"], "mixed")
    return stages if finished and _made_from(checkpoint, stages) else {}


def _stages(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    return {stage: read_checkpoint(path) for stage, path in stage_checkpoints(checkpoint.path.parent.parent / FOLDER).items()}


def _made_from(checkpoint: Checkpoint, stages: dict[Stage, Checkpoint]) -> bool:
    """Return True if compression made all stages from this checkpoint's weights."""
    records = [stage.state.compression for stage in stages.values()]
    return all(record is not None and record.origin == checkpoint.state.sha256[AVERAGE] for record in records)


def compare(checkpoint: Checkpoint, directory: Path, *, stage: Announce = lambda name: None, rounds: int = 30) -> dict[str, Any]:
    """Export a run's checkpoint, measure it beside the artefact, and return the report as plain values (see `muntin.reporting`).

    Writes the pictures into `directory` and the artefact into `directory/artifact`, or into `artifact-report` with a note where another
    artefact is at that place. The report has the stages of `muntin compress`, if finished, otherwise plain INT8 and a note why. Costs a
    prediction of the test split for each step in PyTorch and once in the runtime, an export, and `rounds` timed calls. Raises
    `VerificationError` where the artefact does not compute what was recorded, and `CheckpointError` for the checkpoint of a stage.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} holds a compressed model: give the checkpoint of `muntin fit` that it was made from")
    return _Comparison(checkpoint, directory, stage).run(rounds)


class _Comparison:
    def __init__(self, checkpoint: Checkpoint, directory: Path, stage: Announce) -> None:
        self.checkpoint, self.directory, self.stage = checkpoint, directory, stage
        self.recipe = checkpoint.recipe
        self.source = source_of(checkpoint)
        self.test = self.source.split("test")
        self.signature: Signature = checkpoint.signature
        self.tile = tile_of(self.recipe.data.crop)
        self.stages = finished_stages(checkpoint)
        self.seconds = {"train": checkpoint.state.seconds}
        self.notes: list[str] = []
        self.labels: deque[list[Labels]] = deque(maxlen=2)
        """Predictions of the last two steps for each test sample."""
        self.side = LATENCY_SIDE if self.recipe.task == "segment" else self.recipe.data.crop

    def run(self, rounds: int) -> dict[str, Any]:
        last = self.stages.get("mixed", self.checkpoint)
        target = self._target(last)
        check_target(target)  # before the long work
        model = load_model(self.checkpoint)
        reference = TorchSession(model, self.signature)
        self._reduce_side(reference, "PyTorch FP32")
        self.probe = torch.from_numpy(np.ascontiguousarray(_window(self.test[0].image, self.side))).permute(2, 0, 1)[None]
        steps = [self._step("fp32", "PyTorch FP32", reference, model, bytes=self.checkpoint.bytes)]
        calibration = calibration_of(self.checkpoint, self.source)
        steps += [self._stage_step(name, stage, calibration) for name, stage in self.stages.items() if name != "mixed"]
        self.seconds |= {f"train {name}": stage.state.seconds for name, stage in self.stages.items()}
        simulated, changes = self._timed("quantise", lambda: integer_model(last, calibration))
        artifact = self._timed("export", lambda: export_checkpoint(last, target))
        session = load(artifact.path)
        has_integers = any(layer.activation_bits for layer in artifact.manifest.layers)
        name = "mixed" if self.stages else "fake-quantised"
        numbers = "no layer in integers" if not has_integers else "simulated integers" if self.stages else "simulated INT8"
        steps.append(self._step(name, f"PyTorch FP32, {numbers}", TorchSession(simulated, self.signature), simulated, bytes=None))
        self._verify(artifact)
        engine = f"{session.engine} {'INT8 + ' if has_integers else ''}{session.precision.upper()}, {count(session.threads, 'thread')}"
        steps.append(self._step("deployed", engine, session, simulated, bytes=artifact.bytes))
        latency = self._latency(reference, session, engine, rounds)
        for step, row in zip((steps[0], steps[-1]), latency["rows"], strict=True):
            step["latency_ms"] = row["median_ms"]
        record = last.state.compression
        return {
            **self._about(changes),
            "steps": steps,
            "latency": latency,
            "agreement": self._agreement(*self.labels),
            "ranks": rank_rows(model, changes, record.widths) if self.stages and record is not None else [],
            "layers": layer_rows(artifact, session, simulated, changes, calibration[:2], macs=layer_macs(simulated, self.probe)),
            "counted": list(self.probe.shape[2:]),
            "pictures": self._pictures(session),
            "seconds": self.seconds,
        }

    def _target(self, last: Checkpoint) -> Path:
        """Return the folder of the artefact. Another artefact stays, because only an export replaces it."""
        target = self.directory / ARTIFACT
        if (other := other_artifact(last, target)) is None:
            return target
        target = self.directory / f"{ARTIFACT}-report"
        self.notes.append(
            f"The folder {ARTIFACT} holds another artefact ({other}) and stays: the artefact of this report is {target.name}."
        )
        return target

    def _latency(self, reference: TorchSession, session: Session, engine: str, rounds: int) -> dict[str, Any]:
        self.stage("latency")
        self._reduce_side(session, session.engine)
        torch_engine = f"PyTorch {torch.__version__} eager FP32, {count(session.threads, 'thread')}"
        candidates: dict[str, tuple[str, Predictor]] = {"fp32": (torch_engine, reference), "deployed": (engine, session)}
        with torch_threads(session.threads), watch_cpu() as watch:
            latency = latency_report(candidates, _window(self.test[0].image, self.side), rounds=rounds)
        self.notes += [f"Latency: {note}." for note in notes_on(watch.others)]
        return latency | {"others": watch.others}

    def _reduce_side(self, session: Predictor, name: str) -> None:
        """Reduce the side where a session lacks memory for it: attention among all pixels may take 64 GiB at 512."""
        side, self.side = self.side, affordable_side(session, self.test[0].image, self.side, least=self.recipe.data.crop)
        if self.side != side:
            self.notes.append(f"Timed and shown at {self.side} pixels: {name} does not find the memory for an image of {side}.")

    def _stage_step(self, name: Stage, stage: Checkpoint, calibration: list[Tensor]) -> dict[str, Any]:
        model = load_model(stage)
        if name == "low-rank":
            return self._step(name, "PyTorch FP32", TorchSession(model, self.signature), model, bytes=stage.bytes)
        frozen = copy.deepcopy(model)
        freeze(calibration)(frozen)
        return self._step(name, "PyTorch FP32, simulated integers", TorchSession(frozen, self.signature), frozen, bytes=None)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        self.stage(name)
        started = perf_counter()
        result = work()
        self.seconds[name] = perf_counter() - started
        return result

    def _step(self, name: str, engine: str, session: Predictor, model: nn.Module, *, bytes: int | None) -> dict[str, Any]:
        sizes = {"params": parameter_count(model), "weights": stored_bytes(model), "bytes": bytes}
        predicted: list[Labels] = []
        self.labels.append(predicted)

        def collected() -> Iterator[tuple[Sample, Labels]]:  # one picture at a time, because a test split may exceed the memory
            for sample, labels in predictions(session, self.test, tile=self.tile):
                predicted.append(labels)
                yield sample, labels

        gmacs = image_macs(model, self.probe) / 1e9
        result = self._timed(f"evaluate {name}", lambda: score(collected(), session))
        self.notes += [f"Step {name}: {note}." for note in result.notes]
        return {"name": name, "miou": result.score, "iou": result.by_class, **sizes, "gmacs": gmacs, "latency_ms": None, "engine": engine}

    def _verify(self, artifact: Artifact) -> None:
        result = self._timed("verify", lambda: verify(artifact.path, layers=True))
        if not result.passed:
            raise VerificationError(f"{artifact.path}: {result.problems[0]}")

    def _agreement(self, one: list[Labels], other: list[Labels]) -> float:
        equal = total = 0
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            counted = (
                np.atleast_1d(np.asarray(self.test[index].target)) != IGNORED if self.recipe.task == "segment" else np.ones_like(a, bool)
            )
            equal += int((a == b)[counted].sum())
            total += int(counted.sum())
        return equal / max(1, total)

    def _about(self, changes: list[Change]) -> dict[str, Any]:
        state = self.checkpoint.state
        kept = [f"{c.layer} stays in 16 bits: {c.reason}" for c in changes if c.pass_ == "quantize" and c.kept and not self.stages]
        return {
            "format": 1,
            "title": self.recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "muntin": version("muntin"),
            "hardware": describe_hardware(),
            "task": self.recipe.task,
            "classes": [c.model_dump() for c in self.signature.classes],
            "training": state.training,
            "validation": [{"step": v["step"], "miou": v["score"], "iou": v.get("by_class", v.get("iou", {}))} for v in state.validation],
            "notes": [
                f"Trained in {state.precision}; scores are of the test split, which nothing was chosen by.",
                *broken_off(self.checkpoint),
                *(() if self.stages else _plain_notes(self.checkpoint)),
                *kept,
                *self.notes,
                *self.source.notes,
            ],
            "recipe": recipe_text(self.recipe),
        }

    def _pictures(self, session: Session) -> dict[str, Any] | None:
        if self.recipe.task != "segment":
            return None
        self.stage("pictures")
        classes = self.signature.classes
        pictures: dict[str, Any] = {
            "overlay": None,
            "examples": write_examples(self.directory, session, self.test, classes, side=self.side, tile=self.tile),
        }
        if isinstance(self.source, EarthSource):
            write_picture(self.directory, session, *self.source.picture(), self.source.borders(), classes, tile=self.tile)
            pictures["overlay"] = "overlay.png"
        return pictures


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run PyTorch with `count` threads inside the block, the number of the session that it is timed beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def affordable_side(session: Predictor, image_HWC: NDArray[np.uint8], side: int, *, least: int) -> int:
    """Return `side`, halved until a session has the memory to compute a window of that side, and at least `least`."""
    while side > least:
        try:
            session(_window(image_HWC, side)[None])
        except (MemoryError, RuntimeError, ArtifactError) as error:
            if not no_memory(error):
                raise
            side = max(least, side // 2)
        else:
            break
    return side


def _window(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return the middle of an image, extended by reflection where it is smaller than `side`."""
    pad = [(0, max(0, side - n)) for n in image_HWC.shape[:2]]
    if any(after for _, after in pad):
        image_HWC = np.pad(image_HWC, (*pad, (0, 0)), mode="symmetric")
    top, left = ((n - side) // 2 for n in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])
