"""The report of a run: scores, sizes and latencies of every step and every deployed artefact on one test split.

    checkpoint -> FP32 score -> score of each compression stage
               -> export -> scores of the artefacts in their runtime, agreement, latency -> pictures

Nothing is chosen by the test split.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, check_target
from muntin.compression import freeze, load_model
from muntin.compression.stages import broken_off
from muntin.data import EarthSource, Samples
from muntin.data.source import SPLITS
from muntin.deployment.artifact_comparison import (
    REFERENCE,
    ROUNDS,
    Announce,
    ArtifactComparison,
    compare_artifacts,
    engine_words,
    equal_labels,
    middle_window,
)
from muntin.deployment.checkpoint_export import export_checkpoint, export_side
from muntin.deployment.counting import image_macs, parameter_count, stored_bytes
from muntin.deployment.layer_rows import deployed_sizes, layer_rows, rank_rows
from muntin.deployment.pictures import write_picture
from muntin.deployment.run_artifacts import (
    RunArtifact,
    artifact_place,
    budget_record,
    existing_place,
    finished_stages,
    run_artifacts,
    stage_notes,
)
from muntin.errors import CheckpointError, VerificationError
from muntin.models import TorchSession
from muntin.models.compression_record import Stage
from muntin.runtime import Session, describe_hardware, verify
from muntin.tasks.learning import LEARNING
from muntin.tasks.scores import Judging, PictureAnswers, TaskScores
from muntin.text import count, plain
from muntin.training.checkpoint import Checkpoint, calibration_of, source_of
from muntin.training.distributed.ranks import ALONE
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.recipe import recipe_text

NAMES_SHOWN = 200
"""Pictures of a split that a report names."""
PICTURE_SIDE = 512
"""Side of the windows that are shown as examples, and longest side of a classifier's pictures, pixels."""


def compare(checkpoint: Checkpoint, directory: Path, *, stage: Announce = lambda name: None, rounds: int = ROUNDS) -> dict[str, Any]:
    """Export a run's checkpoint, measure all its artefacts, and return the report as plain values (see `muntin.reporting`).

    The report describes the artefact of the last stage of `muntin compress`, if all are finished, otherwise plain INT8 with a note why.
    Beside it stands plain INT8, and every other artefact of these weights in the run's folder (`compare_artifacts`). An artefact that is
    missing is exported into `directory/artifact`, or into `artifact-FORM` where another one is at that place. Writes the pictures into
    `directory`. Costs a prediction of the test split for each step in PyTorch, one of two splits for each artefact, one or two exports, and
    `rounds` timed calls. Raises `VerificationError` where an exported artefact does not compute what was recorded, and `CheckpointError`
    for the checkpoint of a stage.
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
        self.side = export_side(self.recipe)

    def run(self, rounds: int) -> dict[str, Any]:
        last = self.stages.get("mixed", self.checkpoint)
        targets = self._targets(last)
        for target in targets.values():
            check_target(target)  # before the long work
        model = load_model(self.checkpoint)
        reference = TorchSession(model, self.signature)
        self.probe = torch.from_numpy(middle_window(self.test[0].image, self.side)).permute(2, 0, 1)[None]
        calibration = calibration_of(self.checkpoint, self.source)
        subject, compared = self._deployed(last, targets, reference, rounds)
        artifact, session = subject.artifact, compared.sessions[subject.name]
        rows = {row["name"]: row for row in compared.record["rows"]}
        fp32 = self._row("fp32", "PyTorch FP32", compared.tests[REFERENCE], self._sizes(model, bytes=self.checkpoint.bytes))
        steps, agreement = [fp32 | {"latency_ms": rows[REFERENCE]["median_ms"]}], rows[subject.name]["same_labels"]
        for name, stage in self.stages.items():
            step, labels = self._stage_step(name, stage, calibration)
            steps.append(step)
            agreement = equal_labels(self.test, labels, compared.labels, self.recipe.task)
        self.seconds |= {f"train {name}": stage.state.seconds for name, stage in self.stages.items()}
        deployed = self._row("deployed", engine_words(subject, session), compared.tests[subject.name], deployed_sizes(artifact))
        steps.append(deployed | {"latency_ms": rows[subject.name]["median_ms"]})
        record = last.state.compression
        return {
            **self._about(artifact),
            **compared.tests[subject.name].report(self.signature.scale),
            "steps": steps,
            "artifacts": compared.record | {"described": subject.name},
            "latency": self._latency(compared.record, subject.name) | {"others": compared.record["others"]},
            "agreement": agreement,
            "ranks": rank_rows(model, last.changes, record.widths) if self.stages and record is not None else [],
            "layers": layer_rows(artifact, session, calibration[:2]),
            "counted": list((artifact.manifest.shape or self.probe.shape[1:])[1:]),
            "pictures": self._pictures(session, compared.labels),
            "search": budget_record(self.checkpoint),
            "splits": {name: _split_record(self.source.split(name)) for name in SPLITS},
            "seconds": self.seconds,
        }

    def _targets(self, last: Checkpoint) -> dict[Path, Path]:
        """Return the folders of the artefacts of the last stage and of plain INT8, by checkpoint: where they lie, or shall be written."""
        existing, _ = run_artifacts(self.checkpoint, self.directory)
        targets: dict[Path, Path] = {}
        for form in (last, self.checkpoint):
            place = artifact_place(form, self.directory, taken=targets.values())
            targets.setdefault(form.path, existing_place(form, existing) or place)
        return targets

    def _deployed(
        self, last: Checkpoint, targets: dict[Path, Path], reference: TorchSession, rounds: int
    ) -> tuple[RunArtifact, ArtifactComparison]:
        """Export what is missing, and measure all artefacts. Returns the artefact that the report describes, and the measurements."""
        artifacts = []
        for form in (self.checkpoint, last) if self.stages else (last,):
            artifacts.append(self._timed("export", partial(export_checkpoint, form, targets[form.path])))
            self._verify(artifacts[-1])
        entries, notes = run_artifacts(self.checkpoint, self.directory)
        subject = next(entry for entry in entries if entry.artifact.manifest.files == artifacts[-1].manifest.files)
        compared = compare_artifacts(self.checkpoint, entries, self.source, reference, rounds=rounds, keep=subject.name, stage=self.stage)
        self.seconds |= compared.seconds
        self.notes += [*notes, *compared.notes]
        return subject, compared

    def _latency(self, record: dict[str, Any], subject: str) -> dict[str, Any]:
        """Return the timings of all artefacts, the one that the report describes last, named as its step."""
        rows = [row for row in record["rows"] if row["name"] != subject] + [row for row in record["rows"] if row["name"] == subject]
        timed = [{key: row[key] for key in ("name", "engine", "median_ms", "p90_ms")} for row in rows]
        timed[-1]["name"] = "deployed"
        return {key: record[key] for key in ("height", "width", "rounds")} | {"rows": timed}

    def _stage_step(self, name: Stage, stage: Checkpoint, calibration: list[Tensor]) -> tuple[dict[str, Any], PictureAnswers]:
        model = load_model(stage)
        if name == "low-rank":
            return self._step(name, "PyTorch FP32", model, bytes=stage.bytes)
        freeze(model, calibration)
        return self._step(name, "PyTorch FP32, simulated integers", model, bytes=None)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        self.stage(name)
        started = perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started
        return result

    def _step(self, name: str, engine: str, model: nn.Module, *, bytes: int | None) -> tuple[dict[str, Any], PictureAnswers]:
        """Return the row of a step in PyTorch, and its labels of each test sample."""
        session = TorchSession(model, self.signature)
        labels: PictureAnswers = []
        result = self._timed(f"evaluate {name}", lambda: evaluate(session, self.test, tile=self.tile, answers=labels))
        return self._row(name, engine, result, self._sizes(model, bytes=bytes)), labels

    def _sizes(self, model: nn.Module, *, bytes: int | None) -> dict[str, Any]:
        """Return the columns of a model in PyTorch: parameters, bytes of its weights, and multiply-adds."""
        gmacs = image_macs(model, self.probe) / 1e9
        return {"params": parameter_count(model), "weights": stored_bytes(model), "bytes": bytes, "gmacs": gmacs}

    def _row(self, name: str, engine: str, result: TaskScores, sizes: dict[str, Any]) -> dict[str, Any]:
        self.notes += [f"Step {name}: {note}." for note in result.notes]
        return {"name": name, "miou": result.score, "iou": result.by_class, **sizes, "latency_ms": None, "engine": engine}

    def _verify(self, artifact: Artifact) -> None:
        result = self._timed("verify", lambda: verify(artifact.path, layers=True))
        if not result.passed:
            raise VerificationError(f"{artifact.path}: {result.problems[0]}")

    def _about(self, artifact: Artifact) -> dict[str, Any]:
        state, layers = self.checkpoint.state, artifact.manifest.layers
        kept = [f"{layer.name} stays in 16 bits: {layer.note}" for layer in layers if layer.note and not self.stages]
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
                *self._weights_note(),
                *(f"Plain INT8: {note}" for note in stage_notes(self.checkpoint)),
                *kept,
                *self.notes,
                *self.source.notes,
            ],
            "recipe": recipe_text(self.recipe),
        }

    def _weights_note(self) -> tuple[str, ...]:
        """Return a note that says of which validation the weights are."""
        state, point = self.checkpoint.state, self.checkpoint.state.result
        if point is None:
            return ()
        rank = "the best" if state.averaged_at is not None or point["score"] == max(v["score"] for v in state.validation) else "the last"
        return (f"The FP32 weights are those of step {point['step']}, {rank} of {count(len(state.validation), 'validation')}.",)

    def _pictures(self, session: Session, labels: PictureAnswers) -> dict[str, Any]:
        self.stage("pictures")
        classes = self.signature.classes
        judged = Judging(session=session, samples=self.test, tile=self.tile, answers=labels, ranks=ALONE)
        examples = LEARNING[self.recipe.task].examples(self.directory, judged, classes, side=PICTURE_SIDE)
        pictures: dict[str, Any] = {"overlay": None, **examples}
        if isinstance(self.source, EarthSource):
            write_picture(self.directory, session, *self.source.picture(), self.source.borders(), classes, tile=self.tile)
            pictures["overlay"] = "overlay.png"
        return pictures


def _split_record(samples: Samples) -> dict[str, Any]:
    names = samples.names()
    return {"count": len(samples), "names": [plain(name) for name in names[:NAMES_SHOWN]]}
