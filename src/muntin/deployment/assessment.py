"""Assessing a run: the trained model, its quantised form and the deployed artefact, measured by one code on one split.

    checkpoint -> FP32 score -> quantise -> its score -> export -> the artefact's score -> agreement -> latency -> pictures

Nothing here chooses anything: the test split is only looked at. What is reported as `deployed` is what the artefact does in its
real runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, open_artifact
from muntin.compression import Change, quantize
from muntin.data import EarthSource, Sample, Source, calibration_batches, open_source
from muntin.deployment.counting import image_macs, parameter_count
from muntin.deployment.export import export
from muntin.deployment.latency import latency_report
from muntin.deployment.pictures import write_examples, write_whole
from muntin.errors import ArtifactError, VerificationError
from muntin.models import TorchSession
from muntin.runtime import Session, describe_hardware, load, verify
from muntin.runtime.tiles import Predictor
from muntin.training.checkpoint import Checkpoint
from muntin.training.evaluation import IGNORED, Evaluation, Labels, predictions, score, tile_of
from muntin.training.loop import signature_of

LATENCY_SIDE = 512
Stage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """A step of the report: the row, and the labels it gave to each test sample."""

    row: dict[str, Any]
    labels: list[Labels]


def source_of(checkpoint: Checkpoint) -> Source:
    """The data that a checkpoint was trained on."""
    return open_source(checkpoint.recipe.data, root=Path(checkpoint.state.root))


def calibration_of(checkpoint: Checkpoint, source: Source) -> list[Tensor]:
    """Crops of the training split, never of another one, that calibrate a checkpoint's activations."""
    recipe = checkpoint.recipe
    return calibration_batches(
        source.split("train"),
        task=recipe.task,
        crop=recipe.data.crop,
        count=recipe.quantization.calibration_images,
        batch_size=8,
        seed=recipe.seed,
    )


def quantized_model(checkpoint: Checkpoint, calibration: Sequence[Tensor]) -> tuple[nn.Module, list[Change]]:
    """The checkpoint's model in its quantised form, and what was done; the same bits every time on one machine."""
    model = checkpoint.model()
    return model, quantize(calibration, checkpoint.recipe.quantization)(model)


def export_checkpoint(checkpoint: Checkpoint, path: Path, *, integer: bool = True) -> Artifact:
    """Quantise (unless `integer` is False) and write a checkpoint's artefact; one that is there from the same weights is taken as it is."""
    origin = f"{checkpoint.state.sha256['average.safetensors']}:{checkpoint.recipe.quantization.model_dump_json() if integer else 'float'}"
    try:
        existing = open_artifact(path)
    except ArtifactError:
        existing = None
    if existing is not None and existing.manifest.measured.get("origin") == origin and existing.manifest.muntin == version("muntin"):
        return existing
    source = source_of(checkpoint)
    calibration = calibration_of(checkpoint, source)
    model, changes = quantized_model(checkpoint, calibration) if integer else (checkpoint.model(), [])
    return export(
        model, calibration[0], path, signature=signature_of(checkpoint.recipe, source), changes=changes, measured={"origin": origin}
    )


def assess(checkpoint: Checkpoint, directory: Path, *, stage: Stage = lambda name: None, rounds: int = 30) -> dict[str, Any]:
    """Everything that a report of a run says, as plain values (see `muntin.reporting`); writes the artefact and the pictures beside it.

    Costs a prediction of the test split in PyTorch twice and in the runtime once, an export, and the timing. Raises
    `VerificationError` when the artefact does not compute what was recorded.
    """
    return _Assessment(checkpoint, directory, stage).run(rounds)


class _Assessment:
    def __init__(self, checkpoint: Checkpoint, directory: Path, stage: Stage) -> None:
        self.checkpoint, self.directory, self.stage = checkpoint, directory, stage
        self.recipe = checkpoint.recipe
        self.source = source_of(checkpoint)
        self.test = self.source.split("test")
        self.signature: Signature = signature_of(self.recipe, self.source)
        self.tile = tile_of(self.recipe.data.crop)
        self.seconds = {"train": checkpoint.state.seconds}
        self.side = LATENCY_SIDE if self.recipe.task == "segment" else self.recipe.data.crop

    def run(self, rounds: int) -> dict[str, Any]:
        model = self.checkpoint.model()
        probe = torch.from_numpy(np.ascontiguousarray(_window(self.test[0].image, self.side))).permute(2, 0, 1)[None]
        counts = {"params": parameter_count(model), "gmacs": image_macs(model, probe) / 1e9}
        reference = TorchSession(model, self.signature)
        fp32 = self._step("fp32", "PyTorch FP32", reference, bytes=self.checkpoint.bytes, **counts)
        calibration = calibration_of(self.checkpoint, self.source)
        simulated, changes = self._timed("quantise", lambda: quantized_model(self.checkpoint, calibration))
        artifact = self._timed("export", lambda: export_checkpoint(self.checkpoint, self.directory / "artifact"))
        folded = {"params": parameter_count(simulated), "gmacs": image_macs(simulated, probe) / 1e9}
        session = load(artifact.path)
        fake = self._step(
            "fake-quantised", "PyTorch FP32, simulated INT8", TorchSession(simulated, self.signature), bytes=artifact.bytes, **folded
        )
        self._verify(artifact)
        engine = f"{session.engine} INT8 + {session.precision.upper()}, {session.threads} threads"
        deployed = self._step("deployed", engine, session, bytes=artifact.bytes, **folded)
        self.stage("latency")
        torch_engine = f"PyTorch {torch.__version__} eager FP32, {torch.get_num_threads()} threads"
        latency = latency_report(
            {"fp32": (torch_engine, reference), "deployed": (engine, session)}, _window(self.test[0].image, self.side), rounds=rounds
        )
        for step, row in ((fp32, latency["rows"][0]), (deployed, latency["rows"][1])):
            step.row["latency_ms"] = row["median_ms"]
        return {
            **self._about(changes),
            "steps": [fp32.row, fake.row, deployed.row],
            "latency": latency,
            "agreement": self._agreement(fake.labels, deployed.labels),
            "layers": _layer_rows(artifact, session, changes),
            "pictures": self._pictures(session),
            "seconds": self.seconds,
        }

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        self.stage(name)
        started = perf_counter()
        result = work()
        self.seconds[name] = perf_counter() - started
        return result

    def _step(self, name: str, engine: str, session: Predictor, **figures: Any) -> Assessed:
        def work() -> tuple[Evaluation, list[Labels]]:
            pairs: list[tuple[Sample, Labels]] = list(predictions(session, self.test, tile=self.tile))
            return score(iter(pairs), session), [labels for _, labels in pairs]

        result, labels = self._timed(f"evaluate {name}", work)
        row = {"name": name, "miou": result.score, "iou": result.iou, **figures, "latency_ms": None, "engine": engine}
        return Assessed(row=row, labels=labels)

    def _verify(self, artifact: Artifact) -> None:
        result = self._timed("verify", lambda: verify(artifact.path))
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
        kept = [f"{c.layer} stays in 16 bits: {c.reason}" for c in changes if c.pass_ == "quantize" and c.kept]
        return {
            "format": 1,
            "title": self.recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "muntin": version("muntin"),
            "hardware": describe_hardware(),
            "task": self.recipe.task,
            "classes": [c.model_dump() for c in self.signature.classes],
            "training": state.training,
            "validation": [{"step": v["step"], "miou": v["score"], "iou": v["iou"]} for v in state.validation],
            "notes": [
                f"Trained in {state.precision}; scores are of the test split, which nothing was chosen by.",
                *kept,
                *self.source.notes,
            ],
            "recipe": yaml.safe_dump(self.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True),
        }

    def _pictures(self, session: Session) -> dict[str, Any] | None:
        if self.recipe.task != "segment":
            return None
        self.stage("pictures")
        classes = self.signature.classes
        pictures: dict[str, Any] = {
            "overlay": None,
            "examples": write_examples(self.directory, session, self.test, classes, side=self.side),
        }
        if isinstance(self.source, EarthSource):
            write_whole(self.directory, session, *self.source.picture(), self.source.borders(), classes, tile=self.tile)
            pictures["overlay"] = "overlay.png"
        return pictures


def _window(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The middle of an image, repeated by reflection where it is smaller than `side`."""
    pad = [(0, max(0, side - n)) for n in image_HWC.shape[:2]]
    if any(after for _, after in pad):
        image_HWC = np.pad(image_HWC, (*pad, (0, 0)), mode="symmetric")
    top, left = ((n - side) // 2 for n in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])


def _layer_rows(artifact: Artifact, session: Session, changes: list[Change]) -> list[dict[str, Any]]:
    executed = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    sqnr = {c.layer: c.sqnr_db for c in changes if c.pass_ == "quantize"}
    rows = []
    for record in artifact.manifest.layers:
        value = sqnr.get(record.name)
        rows.append(
            {
                **record.model_dump(include={"name", "kind", "weight_bits", "activation_bits", "parameters", "macs"}),
                "executed": executed.get(record.name),
                "sqnr_db": value if value is not None and np.isfinite(value) else None,
            }
        )
    return rows
