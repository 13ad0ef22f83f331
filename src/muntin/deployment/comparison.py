"""The report of a run: scores, sizes and latencies of every step and every deployed artifact on one test split.

    checkpoint -> FP32 score
               -> artifacts -> validation scores, latency -> the artifact to take -> test scores, agreement, pictures

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
from torch import nn

from muntin.artifact import Artifact, Signature, check_target
from muntin.compression import load_model
from muntin.compression.saving import saved_record
from muntin.data import EarthSource, Samples
from muntin.data.source import SPLITS
from muntin.deployment.artifact_comparison import (
    REFERENCE,
    ROUNDS,
    Announce,
    compare_artifacts,
    engine_words,
    middle_window,
)
from muntin.deployment.checkpoint_export import export_checkpoint, export_side, origin_weights
from muntin.deployment.counting import image_macs, parameter_count, stored_bytes
from muntin.deployment.layer_rows import deployed_sizes, layer_rows, rank_rows
from muntin.deployment.pictures import write_picture
from muntin.deployment.run_artifacts import (
    COMPRESSED,
    INT8,
    RunArtifact,
    artifact_place,
    check_trained,
    existing_place,
    run_artifacts,
    search_record,
)
from muntin.errors import VerificationError
from muntin.models import TorchSession
from muntin.runtime import Session, describe_hardware, verify
from muntin.tasks.learning import LEARNING
from muntin.tasks.scores import Judging, PictureAnswers, TaskScores
from muntin.text import count, list_some, plain
from muntin.training.checkpoint import Checkpoint, calibration_of, source_of
from muntin.training.distributed.ranks import ALONE
from muntin.training.evaluation import tile_of
from muntin.training.fitting import broken_off
from muntin.training.recipe import recipe_text

NAMES_SHOWN = 200
"""Pictures of a split that a report names."""
PICTURE_SIDE = 512
"""Side of the windows that are shown as examples, and longest side of a classifier's pictures, pixels."""


def compare(checkpoint: Checkpoint, directory: Path, *, stage: Announce = lambda name: None, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure all artifacts of a run's checkpoint, and return the report as plain values (see `muntin.reporting`).

    The report describes the artifact to take (`compare_artifacts`), of all of these weights in the run's folder and `directory`. Without
    an INT8 artifact, one is exported into `directory/artifact`, or into `artifact-int8` where another one is at that place. Writes the
    pictures into `directory`. Costs a prediction of two splits for each artifact and for PyTorch, at most one export, and `rounds` timed
    calls. Raises `VerificationError` where the artifact to take does not compute what was recorded, and `CheckpointError` for the
    checkpoint of a compressed model.
    """
    check_trained(checkpoint)
    return _Comparison(checkpoint, directory, stage).run(rounds)


class _Comparison:
    def __init__(self, checkpoint: Checkpoint, directory: Path, stage: Announce) -> None:
        self.checkpoint, self.directory, self.stage = checkpoint, directory, stage
        self.recipe = checkpoint.recipe
        self.source = source_of(checkpoint)
        self.test = self.source.split("test")
        self.signature: Signature = checkpoint.signature
        self.tile = tile_of(self.recipe.data.crop)
        self.seconds = {"train": checkpoint.state.seconds}
        self.notes: list[str] = []
        self.side = export_side(self.recipe)

    def run(self, rounds: int) -> dict[str, Any]:
        entries = self._artifacts()
        model = load_model(self.checkpoint)
        self.probe = torch.from_numpy(middle_window(self.test[0].image, self.side)).permute(2, 0, 1)[None]
        reference = TorchSession(model, self.signature)
        compared = compare_artifacts(self.checkpoint, entries, self.source, reference, rounds=rounds, stage=self.stage)
        self.seconds |= compared.seconds
        self.notes += compared.notes
        subject = compared.taken
        artifact, session = subject.artifact, compared.sessions[subject.name]
        self._verify(artifact)
        rows = {row["name"]: row for row in compared.record["rows"]}
        fp32 = self._row("fp32", "PyTorch FP32", compared.tests[REFERENCE], self._sizes(model, bytes=self.checkpoint.bytes))
        steps = [fp32 | {"latency_ms": rows[REFERENCE]["median_ms"]}]
        plain = [entry for entry in entries if entry.form == INT8 and subject.form == COMPRESSED]
        for name, entry in [*((entry.name, entry) for entry in plain), ("deployed", subject)]:
            words = engine_words(entry, compared.sessions[entry.name])
            step = self._row(name, words, compared.tests[entry.name], deployed_sizes(entry.artifact))
            steps.append(step | {"latency_ms": rows[entry.name]["median_ms"]})
        calibration = calibration_of(self.checkpoint, self.source)
        return {
            **self._about(artifact),
            **compared.tests[subject.name].report(self.signature.scale),
            "steps": steps,
            "artifacts": compared.record,
            "latency": self._latency(compared.record, subject.name) | {"others": compared.record["others"]},
            "agreement": rows[subject.name]["same_labels"],
            "ranks": self._ranks(model, artifact) if subject.form == COMPRESSED else [],
            "layers": layer_rows(artifact, session, calibration[:2]),
            "counted": list((artifact.manifest.shape or self.probe.shape[1:])[1:]),
            "pictures": self._pictures(session, compared.labels),
            "search": search_record(self.checkpoint),
            "splits": {name: _split_record(self.source.split(name)) for name in SPLITS},
            "seconds": self.seconds,
        }

    def _artifacts(self) -> list[RunArtifact]:
        """Return the artifacts of the run; one in INT8 is exported if there is none, or if it is of another version of muntin."""
        existing, _ = run_artifacts(self.checkpoint, self.directory)
        place = existing_place(self.checkpoint, existing) or artifact_place(self.checkpoint, self.directory)
        if not any(entry.form == INT8 and origin_weights(entry.artifact.manifest) is None for entry in existing):  # none of a search
            check_target(place)
            self._timed("export", partial(export_checkpoint, self.checkpoint, place))
        entries, notes = run_artifacts(self.checkpoint, self.directory)
        self.notes += notes
        return entries

    def _ranks(self, model: nn.Module, artifact: Artifact) -> list[dict[str, Any]]:
        """Return the ranks of a trial's layers; none for a pruned model, whose layers have other sizes."""
        record = saved_record(artifact.path.parent / "model")
        return [] if record.pruning is not None else rank_rows(model, record.changes, record.widths)

    def _latency(self, record: dict[str, Any], subject: str) -> dict[str, Any]:
        """Return the timings of all artifacts, the one that the report describes last, named as its step."""
        rows = [row for row in record["rows"] if row["name"] != subject] + [row for row in record["rows"] if row["name"] == subject]
        timed = [{key: row[key] for key in ("name", "engine", "median_ms", "p90_ms")} for row in rows]
        timed[-1]["name"] = "deployed"
        return {key: record[key] for key in ("height", "width", "rounds")} | {"rows": timed}

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        self.stage(name)
        started = perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started
        return result

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
        reasons: dict[str, list[str]] = {}
        for layer in layers:
            if layer.note:
                reasons.setdefault(layer.note, []).append(layer.name)
        kept = [f"In 16 bits, {reason}: {list_some(names)}" for reason, names in reasons.items()]
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
