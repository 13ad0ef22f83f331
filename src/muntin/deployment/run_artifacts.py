"""The artefacts of a run: found in its folder by the weights that they record, and the commands that make the missing ones.

form        the checkpoint that an artefact was exported from, and whether it was quantised
int8        of the checkpoint of `muntin fit`, quantised without further training; `float` with --float
low-rank    of the first stage of `muntin compress`; `low-rank int8` where it was quantised
w4a8, mixed of the other stages
in budget   the one that `muntin compress --max-drop` chose
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muntin.artifact import Artifact, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.compression.stages import FOLDER, stage_checkpoints, stage_finished, stage_folder
from muntin.deployment.checkpoint_export import (
    ARTIFACT,
    compressed_stage,
    exported,
    origin_weights,
    other_artifact,
    quantized_at_export,
)
from muntin.errors import ArtifactError, CheckpointError
from muntin.models.compression_record import STAGES, Stage
from muntin.training.checkpoint import Checkpoint, checkpoints_in, read_checkpoint

BUDGET = Path("budget", "front.json")
"""The record of a search for a budget, in the run's folder."""
IN_BUDGET = "in budget"
PARENTS = 4
"""Folders above an artefact in which its run is looked for: RUN/budget/trials/003/artifact is four below RUN."""


@dataclass(frozen=True, kw_only=True)
class RunArtifact:
    """An artefact of a run. `name`: its form, with its folder's name where several artefacts have one form."""

    name: str
    form: str
    artifact: Artifact
    checkpoint: Checkpoint


@dataclass(frozen=True, kw_only=True)
class MissingForm:
    """A form of which a run has no artefact, and the command that makes it."""

    name: str
    command: str


def run_of(artifact: Path) -> Path:
    """Return the folder of the run that an artefact lies in. Raises `CheckpointError` where it lies in none."""
    for folder in list(artifact.resolve().parents)[:PARENTS]:
        if checkpoints_in(folder / "checkpoints"):
            return folder
    raise CheckpointError(
        f"{artifact} is an artefact outside of its run's folder, so its data are not known: "
        f"`muntin evaluate RUN --artifact {shlex.quote(str(artifact))}` scores it on the data of a run"
    )


def run_folder(checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint's run."""
    return checkpoint.path.parent.parent


def stages_of(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    """Return the stages in a run's folder, finished or not, of this checkpoint or another."""
    return {stage: read_checkpoint(path) for stage, path in stage_checkpoints(run_folder(checkpoint) / FOLDER).items()}


def made_from(checkpoint: Checkpoint, stages: dict[Stage, Checkpoint]) -> bool:
    """Return True if compression made all stages from this checkpoint's weights."""
    records = [stage.state.compression for stage in stages.values()]
    return all(record is not None and record.origin == checkpoint.state.weights for record in records)


def finished_stages(checkpoint: Checkpoint) -> dict[Stage, Checkpoint]:
    """Return the stages in a run's folder, if the last one is finished and all were made from this checkpoint; otherwise nothing."""
    stages = stages_of(checkpoint)
    finished = "mixed" in stages and stage_finished(stages["mixed"], "mixed")
    return stages if finished and made_from(checkpoint, stages) else {}


def stage_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return a note on stages in the run's folder that are not done, or that were made from another checkpoint."""
    stages = stages_of(checkpoint)
    if not stages or finished_stages(checkpoint):
        return ()
    if not made_from(checkpoint, stages):
        return (f"the stages in the run's folder {FOLDER} were made from another checkpoint; remove it and compress again to report them.",)
    return (f"the stages in the run's folder {FOLDER} are not done; `muntin compress RUN --resume` goes on with them.",)


def form_name(checkpoint: Checkpoint, *, integer: bool) -> str:
    """Return the name of the form that an export of a checkpoint gives."""
    record = checkpoint.state.compression
    if record is None:
        return "int8" if integer else "float"
    return "low-rank int8" if record.stage == "low-rank" and integer else record.stage


def run_artifacts(checkpoint: Checkpoint, *folders: Path) -> tuple[list[RunArtifact], list[str]]:
    """Return the artefacts of a checkpoint of `muntin fit` and of its stages, smaller forms last, and notes on others that lie there.

    Looks into the run's folder and `folders`: at the folders directly in them and in those of the stages. Reads every artefact once to
    check its digests. Of equal artefacts the first one counts.
    """
    if checkpoint.state.compression is not None:
        raise CheckpointError(f"{checkpoint.path} holds a compressed model: give the checkpoint of `muntin fit` that it was made from")
    checkpoints = _checkpoints(checkpoint)
    by_weights = {entry.state.weights: entry for entry in checkpoints}
    stale, stale_stages = list[Path](), list[Path]()  # of other weights: to be exported again, and to be compressed again first
    artifacts: list[RunArtifact] = []
    notes = []
    contents = []
    for path in _artifact_folders([*folders, run_folder(checkpoint)]):
        try:
            artifact = open_artifact(path)
        except ArtifactError as error:
            notes.append(f"left out: {error}")
            continue
        origin = by_weights.get(origin_weights(artifact.manifest) or "")
        if origin is None:
            (stale_stages if compressed_stage(artifact.manifest) and len(checkpoints) == 1 else stale).append(path)
        elif artifact.manifest.files not in contents:
            contents.append(artifact.manifest.files)
            form = form_name(origin, integer=quantized_at_export(artifact.manifest))
            artifacts.append(RunArtifact(name=form, form=form, artifact=artifact, checkpoint=origin))
    notes += _stale_notes(run_folder(checkpoint), stale, stale_stages)
    places = [entry.path for entry in checkpoints]
    artifacts.sort(key=lambda entry: places.index(entry.checkpoint.path))
    chosen, told = _chosen_in_budget(checkpoint)
    return _distinct([*artifacts, *chosen]), [*notes, *told]


def budget_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the record of a search for a budget that began with these weights (a front's `front.json`), if there is a readable one."""
    try:
        content = json.loads((run_folder(checkpoint) / BUDGET).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("weights") == checkpoint.state.weights else None


def _chosen_in_budget(checkpoint: Checkpoint) -> tuple[list[RunArtifact], list[str]]:
    """Return the artefact that a search for a budget chose for these weights, if there is one, and notes."""
    record = run_folder(checkpoint) / BUDGET
    if not record.is_file():
        return [], []
    again = f"to search again, remove {record.parent}, then `{_command('compress', run_folder(checkpoint))} --max-drop DROP`"
    try:
        content = json.loads(record.read_bytes())
        if content["chosen"] is None:
            return [], []
        page = record.with_suffix(".html")
        if content.get("weights") != checkpoint.state.weights:
            whose = "of other weights than the run's newest" if content.get("weights") else "of a version that did not record its weights"
            return [], [f"left out, {whose}: the models of {page}; {again}"]
        point = {point["number"]: point for point in content["points"]}[content["chosen"]]
        if not point["kept"]:
            return [], [f"left out: no model of {page} keeps its budget"]
        artifact = open_artifact(record.parent / point["artifact"])
    except (ArtifactError, OSError, ValueError, KeyError, TypeError) as error:
        return [], [f"left out: {record}: {error}; {again}"]
    notes = []
    if point.get("verdict") == "uncertain":
        worst = f"it may lose {point['bound']:.4f} on other data"
        notes.append(f"{IN_BUDGET}: the drop is within {content['max_drop']:g} on the validation data, not with certainty: {worst}")
    return [RunArtifact(name=IN_BUDGET, form=IN_BUDGET, artifact=artifact, checkpoint=checkpoint)], notes


def _checkpoints(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return a checkpoint of `muntin fit`, and the stages in its run's folder if they were made from it."""
    stages = stages_of(checkpoint)
    return [checkpoint, *(stages.values() if made_from(checkpoint, stages) else ())]


def _stale_notes(run: Path, stale: list[Path], stale_stages: list[Path]) -> list[str]:
    """Return notes on artefacts of other weights: those to export again, and those whose model must be compressed again first."""
    notes = []
    if stale:
        notes.append(f"left out, of other weights than the run's newest: {_listed(stale)}; export again, or see them by `muntin bench`")
    if stale_stages:
        remove = f"remove {run / FOLDER}, then " if stage_checkpoints(run / FOLDER) else ""
        notes.append(
            f"left out, compressed from other weights than the run's newest: {_listed(stale_stages)}; to renew them, {remove}"
            f"`{_command('compress', run)}`, and export the stages again"
        )
    return notes


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _artifact_folders(folders: Iterable[Path]) -> Iterator[Path]:
    passed = set()
    for folder in folders:
        for pattern in (f"*/{MANIFEST}", f"{FOLDER}/*/*/{MANIFEST}"):
            for path in sorted(file.parent for file in folder.glob(pattern)):
                if path.resolve() not in passed and not path.name.startswith("."):  # a hidden one is being written
                    passed.add(path.resolve())
                    yield path


def _distinct(artifacts: list[RunArtifact]) -> list[RunArtifact]:
    """Add the folder's name to forms that occur twice, and the path where that does not help."""
    for whole in (False, True):
        names = [entry.name for entry in artifacts]
        artifacts = [
            entry
            if names.count(entry.name) == 1
            else replace(entry, name=f"{entry.form} in {entry.artifact.path if whole else entry.artifact.path.name}")
            for entry in artifacts
        ]
    return artifacts


def artifact_place(checkpoint: Checkpoint, directory: Path, *, taken: Iterable[Path] = ()) -> Path:
    """Return the folder in `directory` for the artefact of a checkpoint: `artifact`, or `artifact-FORM` where another one is there.

    `taken`: folders in which others will be written.
    """
    target = directory / ARTIFACT
    return (
        target
        if target not in taken and other_artifact(checkpoint, target) is None
        else directory / f"{ARTIFACT}-{form_name(checkpoint, integer=True)}"
    )


def existing_place(checkpoint: Checkpoint, artifacts: Iterable[RunArtifact]) -> Path | None:
    """Return the folder of the artefact that an export of a checkpoint would write again as it is."""
    return next((entry.artifact.path for entry in artifacts if exported(checkpoint, entry.artifact.path) is not None), None)


def missing_forms(checkpoint: Checkpoint, artifacts: Iterable[RunArtifact]) -> list[MissingForm]:
    """Return the forms of which a run has no artefact: INT8 without further training, and one for each stage of compression."""
    run, stages, artifacts = run_folder(checkpoint), stages_of(checkpoint), list(artifacts)
    origins = [entry.checkpoint.path for entry in artifacts]
    own = [entry.state.weights for entry in _checkpoints(checkpoint)]
    newest = checkpoints_in(run / "checkpoints")[-1:] == [checkpoint.path]
    missing = []
    if "int8" not in [entry.form for entry in artifacts]:
        missing.append(MissingForm(name="int8", command=_export_command(checkpoint, run if newest else checkpoint.path, own)))
    if not made_from(checkpoint, stages):
        return missing  # those of another checkpoint stay where they are; `stage_notes` says so
    expected = [stage for stage in STAGES if stage in stages or stage != "low-rank" or checkpoint.recipe.compression.low_rank is not None]
    for stage in (stage for stage in expected if stage in stages):
        if stages[stage].path not in origins:
            missing.append(MissingForm(name=stage, command=_export_command(stages[stage], run_folder(stages[stage]), own)))
    if rest := [stage for stage in expected if stage not in stages]:
        compress = _command("compress", run, *(("--resume",) if stages else ()))
        export = _command("export", stage_folder(run / FOLDER, rest[-1]))
        missing.append(MissingForm(name=", ".join(rest), command=f"{compress} && {export}"))
    return missing


def _export_command(checkpoint: Checkpoint, source: Path, own: Collection[str]) -> str:
    """Return the command that exports a checkpoint. It replaces an artefact of weights that are not the run's `own`."""
    place = artifact_place(checkpoint, run_folder(checkpoint))
    with suppress(ArtifactError):
        if origin_weights(open_artifact(place.with_name(ARTIFACT)).manifest) not in (None, *own):
            return _command("export", source)
    return _command("export", source) if place.name == ARTIFACT else _command("export", source, "-o", place)


def _command(*words: str | Path) -> str:
    return shlex.join(["muntin", *map(str, words)])
