"""Assessing a run: the trained model, what every stage made of it, and the deployed artefact, measured by one code on one split.

    checkpoint -> FP32 score -> each stage's score (or the INT8 simulation's)
               -> export -> the artefact's score -> agreement -> latency -> pictures

Nothing here chooses anything: the test split is only looked at. What is reported as `deployed` is what the artefact does in its
real runtime.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, check_target, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.compression import Change, freeze, load_model, quantize
from muntin.compression.stages import FOLDER, broken_off, stage_checkpoints, stage_finished
from muntin.data import EarthSource, Sample
from muntin.deployment.counting import image_macs, layer_macs, parameter_count, stored_bytes
from muntin.deployment.export import export
from muntin.deployment.layers import layer_rows, rank_rows
from muntin.deployment.pictures import write_examples, write_picture
from muntin.errors import ArtifactError, CheckpointError, ExportError, RecipeError, VerificationError
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
from muntin.training.recipe import override_recipe, recipe_text

ARTIFACT = "artifact"
"""The folder of a run's artefact, unless told otherwise."""
LATENCY_SIDE = 512
REVISION = 7
"""Of what export makes of the same weights: to be raised where that changes, so that what is there already is exported again."""
Announce = Callable[[str], None]


def integer_model(checkpoint: Checkpoint, calibration: list[Tensor]) -> tuple[nn.Module, list[Change]]:
    """A checkpoint's model in integers, and all changes: frozen if a stage of compression has quantised it, otherwise quantised to W8A8."""
    model = load_model(checkpoint)
    pass_ = freeze(calibration) if checkpoint.quantized else quantize(calibration, checkpoint.recipe.quantization)
    return model, [*checkpoint.changes, *pass_(model)]


def float_model(checkpoint: Checkpoint, calibration: list[Tensor]) -> tuple[nn.Module, list[Change]]:
    """A checkpoint's model in floating point, and all changes: rounded to FP16 after the low-rank stage, otherwise as it is."""
    model = load_model(checkpoint)
    return model, [] if checkpoint.state.compression is None else [*checkpoint.changes, *freeze(calibration)(model)]


def quantized_by(checkpoint: Checkpoint, overrides: Iterable[str]) -> Checkpoint:
    """The checkpoint with `quantization.KEY=VALUE` of its recipe replaced. Raises RecipeError for others, and for what `compress` made."""
    overrides = tuple(overrides)
    other = next((override for override in overrides if not override.startswith("quantization.")), None)
    if other is not None:
        raise RecipeError(f"'{other}': the model is trained already; only quantization.KEY=VALUE can be set here")
    if overrides and checkpoint.quantized:
        raise RecipeError(f"{checkpoint.path} was quantised by `muntin compress`: set compression.KEY=VALUE there")
    recipe = override_recipe(checkpoint.recipe, overrides)
    return replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe}))


def export_checkpoint(checkpoint: Checkpoint, path: Path, *, integer: bool = True) -> Artifact:
    """Quantise (unless `integer` is False) and write a checkpoint's artefact; one that is there from the same weights is taken as it is.

    Raises ExportError for a checkpoint whose stages have quantised it already, where `integer` is False.
    """
    if not integer and checkpoint.quantized:
        raise ExportError(
            f"{checkpoint.path} is quantised already and has no float form: leave out --float (integer=False), or export the checkpoint of "
            "`muntin fit` or of the low-rank stage"
        )
    if (existing := exported(checkpoint, path, integer=integer)) is not None:
        return existing
    check_target(path)
    source = source_of(checkpoint)
    calibration = calibration_of(checkpoint, source)
    model, changes = (integer_model if integer else float_model)(checkpoint, calibration)
    side = tile_of(checkpoint.recipe.data.crop) if checkpoint.recipe.task != "classify" else checkpoint.recipe.data.crop
    return export(
        model, calibration[0], path, signature=checkpoint.signature, changes=changes, measured={"origin": _origin_of(checkpoint, integer)},
        shape=(1, side, side),
    )  # fmt: skip


def exported(checkpoint: Checkpoint, path: Path, *, integer: bool = True) -> Artifact | None:
    """The artefact at `path`, if it is what `export_checkpoint` would write."""
    try:
        existing = open_artifact(path)
    except ArtifactError:
        return None
    same = existing.manifest.measured.get("origin") == _origin_of(checkpoint, integer) and existing.manifest.muntin == version("muntin")
    return existing if same else None


def other_artifact(checkpoint: Checkpoint, path: Path, *, integer: bool = True) -> str | None:
    """The artefact at `path` that `export_checkpoint` would replace by one of other weights or another kind, in words; None without one."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        manifest = open_artifact(path).manifest
    except ArtifactError as error:
        return f"unreadable: {error}"
    origin = manifest.measured.get("origin")
    if origin == _origin_of(checkpoint, integer):
        return None
    passes = {entry.get("pass") for entry in manifest.passes}
    stage = next((name for made, name in (("mix", "mixed"), ("qat", "w4a8"), ("low_rank", "low-rank")) if made in passes), "plain")
    numbers = "INT8" if any(layer.activation_bits == 8 for layer in manifest.layers) else "float"
    weights = origin.partition(":")[0] if isinstance(origin, str) else None
    whose = (
        "these weights" if weights == checkpoint.state.sha256[AVERAGE] else f"weights {weights[:8]}" if weights else "weights not recorded"
    )
    return f"{stage} {numbers} of {whose}, exported {manifest.created}"


def _origin_of(checkpoint: Checkpoint, integer: bool) -> str:
    """What an artefact records of where it came from: the weights, how they were quantised, and by what state of the code."""
    how = checkpoint.recipe.quantization.model_dump_json() if integer else "float"
    return f"{checkpoint.state.sha256[AVERAGE]}:{how}:{REVISION}"


def _why_plain(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note why a report shows plain INT8 although the run's folder holds stages of compression."""
    stages = _stages(checkpoint)
    if not stages:
        return ()
    if not _made_from(checkpoint, stages):
        return (
            f"Plain INT8: the stages in the run's folder {FOLDER} were made from another checkpoint; compress this one to have them told.",
        )
    return (f"Plain INT8: the stages in the run's folder {FOLDER} are not done; `muntin compress --resume` goes on with them.",)


def finished_stages(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    """The stages in a run's folder, if the last one is finished and all were made from this checkpoint; otherwise empty."""
    stages = _stages(checkpoint)
    finished = "mixed" in stages and stage_finished(stages["mixed"], "mixed")
    return stages if finished and _made_from(checkpoint, stages) else {}


def _stages(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    return {stage: read_checkpoint(path) for stage, path in stage_checkpoints(checkpoint.path.parent.parent / FOLDER).items()}


def _made_from(checkpoint: Checkpoint, stages: dict[Stage, Checkpoint]) -> bool:
    """Return True if compression made all stages from this checkpoint's weights."""
    records = [stage.state.compression for stage in stages.values()]
    return all(record is not None and record.origin == checkpoint.state.sha256[AVERAGE] for record in records)


def assess(checkpoint: Checkpoint, directory: Path, *, stage: Announce = lambda name: None, rounds: int = 30) -> dict[str, Any]:
    """Everything that a report of a run says, as plain values (see `muntin.reporting`); writes the artefact and the pictures beside it.

    The artefact goes to `directory/artifact`, or to `artifact-report` where that is another one's place, with a note: only an export
    replaces what somebody exported.
    Where `muntin compress` has been through the run, the report tells its stages, otherwise plain INT8 and a note why. Costs a
    prediction of the test split in PyTorch for each step and in the runtime once, an export, and the timing. Raises `VerificationError`
    when the artefact does not compute what was recorded, and `CheckpointError` for the checkpoint of a stage.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} holds a compressed model: give the checkpoint of `muntin fit` that it was made from")
    return _Assessment(checkpoint, directory, stage).run(rounds)


class _Assessment:
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
        """What the last two steps gave to each test sample."""
        self.side = LATENCY_SIDE if self.recipe.task == "segment" else self.recipe.data.crop

    def run(self, rounds: int) -> dict[str, Any]:
        last = self.stages.get("mixed", self.checkpoint)
        record = last.state.compression
        place, other = self.directory / ARTIFACT, other_artifact(last, self.directory / ARTIFACT)
        if other is not None:
            place = self.directory / f"{ARTIFACT}-report"
            self.notes.append(f"The folder {ARTIFACT} holds another artefact ({other}) and stays: the one told here is {place.name}.")
        check_target(place)  # before the work, which takes long
        model = load_model(self.checkpoint)
        reference = TorchSession(model, self.signature)
        self._afford(reference, "PyTorch FP32")
        self.probe = torch.from_numpy(np.ascontiguousarray(_window(self.test[0].image, self.side))).permute(2, 0, 1)[None]
        steps = [self._step("fp32", "PyTorch FP32", reference, model, bytes=self.checkpoint.bytes)]
        calibration = calibration_of(self.checkpoint, self.source)
        for done, stage in self.stages.items():
            if done != "mixed":
                steps.append(self._stage_step(done, stage, calibration))
            self.seconds[f"train {done}"] = stage.state.seconds
        simulated, changes = self._timed("quantise", lambda: integer_model(last, calibration))
        artifact = self._timed("export", lambda: export_checkpoint(last, place))
        session = load(artifact.path)
        integers = any(layer.activation_bits for layer in artifact.manifest.layers)
        name = "mixed" if self.stages else "fake-quantised"
        told = "no layer in integers" if not integers else "simulated integers" if self.stages else "simulated INT8"
        steps.append(self._step(name, f"PyTorch FP32, {told}", TorchSession(simulated, self.signature), simulated, bytes=None))
        self._verify(artifact)
        engine = f"{session.engine} {'INT8 + ' if integers else ''}{session.precision.upper()}, {count(session.threads, 'thread')}"
        steps.append(self._step("deployed", engine, session, simulated, bytes=artifact.bytes))
        self.stage("latency")
        self._afford(session, session.engine)
        torch_engine = f"PyTorch {torch.__version__} eager FP32, {count(session.threads, 'thread')}"
        with torch_threads(session.threads), watch_cpu() as watch:
            latency = latency_report(
                {"fp32": (torch_engine, reference), "deployed": (engine, session)}, _window(self.test[0].image, self.side), rounds=rounds
            )
        self.notes += [f"Latency: {note}." for note in notes_on(watch.others)]
        for step, row in ((steps[0], latency["rows"][0]), (steps[-1], latency["rows"][1])):
            step["latency_ms"] = row["median_ms"]
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

    def _afford(self, session: Predictor, name: str) -> None:
        """Takes a smaller side where a session finds no memory for this one: attention among all pixels may want 64 GiB at 512."""
        wanted, self.side = self.side, affordable_side(session, self.test[0].image, self.side, least=self.recipe.data.crop)
        if self.side != wanted:
            self.notes.append(f"Timed and shown at {self.side} pixels: {name} does not find the memory for an image of {wanted}.")

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
        figures = {
            "params": parameter_count(model), "weights": stored_bytes(model), "bytes": bytes,
            "gmacs": image_macs(model, self.probe) / 1e9,
        }  # fmt: skip

        given: list[Labels] = []
        self.labels.append(given)

        def seen() -> Iterator[tuple[Sample, Labels]]:  # one picture at a time: all of a test split need not fit into memory
            for sample, labels in predictions(session, self.test, tile=self.tile):
                given.append(labels)
                yield sample, labels

        result = self._timed(f"evaluate {name}", lambda: score(seen(), session))
        self.notes += [f"Step {name}: {note}." for note in result.notes]
        return {"name": name, "miou": result.score, "iou": result.by_class, **figures, "latency_ms": None, "engine": engine}

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
                *(() if self.stages else _why_plain(self.checkpoint)),
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
    """PyTorch on so many threads inside the block: as many as what it is timed beside has. Training may have left it with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def affordable_side(session: Predictor, image_HWC: NDArray[np.uint8], side: int, *, least: int) -> int:
    """`side`, or half of it and so on down to `least`, at which a session finds the memory to compute a window of an image."""
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
    """The middle of an image, repeated by reflection where it is smaller than `side`."""
    pad = [(0, max(0, side - n)) for n in image_HWC.shape[:2]]
    if any(after for _, after in pad):
        image_HWC = np.pad(image_HWC, (*pad, (0, 0)), mode="symmetric")
    top, left = ((n - side) // 2 for n in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])
