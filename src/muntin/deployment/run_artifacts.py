"""The artefacts of a run: found in its folder by the weights that they record, and the commands that make the missing ones.

form        the weights, and how they became numbers of fewer bits
int8        of `muntin fit`, quantised without further training; `float` with --float
compressed  of the trial that `muntin compress` chose
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
from muntin.deployment.checkpoint_export import ARTIFACT, exported, origin_weights, other_artifact, quantized_at_export
from muntin.errors import ArtifactError, CheckpointError
from muntin.training.checkpoint import Checkpoint, checkpoints_in

SEARCH = Path("compressed", "front.json")
"""The record of `muntin compress`, in the run's folder."""
INT8, COMPRESSED = "int8", "compressed"
PLAIN_TRIAL = "trials/000/artifact"
"""Plain INT8 among the trials of a search."""
PARENTS = 4
"""Folders above an artefact in which its run is looked for: RUN/compressed/trials/003/artifact is four below RUN."""


@dataclass(frozen=True, kw_only=True)
class RunArtifact:
    """An artefact of a run. `name`: its form, with its folder's name where several artefacts have one form."""

    name: str
    form: str
    artifact: Artifact


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


def check_trained(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for the checkpoint of a compressed model, which is one of a run's forms."""
    if checkpoint.trial:
        raise CheckpointError(f"{checkpoint.path} holds a compressed model: give the checkpoint of `muntin fit` that it was made from")


def run_artifacts(checkpoint: Checkpoint, *folders: Path) -> tuple[list[RunArtifact], list[str]]:
    """Return the artefacts of a checkpoint of `muntin fit`, the chosen one of `muntin compress` last, and notes on others that lie there.

    Looks into the run's folder and `folders`, at the folders directly in them. Reads every artefact once to check its digests. Of equal
    artefacts the first one counts. Without another INT8 artefact, the plain one of the search counts.
    """
    check_trained(checkpoint)
    stale, notes, artifacts = list[Path](), list[str](), list[RunArtifact]()  # stale: of other weights
    contents = []
    for path in _artifact_folders([*folders, run_folder(checkpoint)]):
        try:
            artifact = open_artifact(path)
        except ArtifactError as error:
            notes.append(f"left out: {error}")
            continue
        if origin_weights(artifact.manifest) != checkpoint.state.weights:
            stale.append(path)
        elif artifact.manifest.files not in contents:
            contents.append(artifact.manifest.files)
            form = INT8 if quantized_at_export(artifact.manifest) else "float"
            artifacts.append(RunArtifact(name=form, form=form, artifact=artifact))
    if stale:
        listed = ", ".join(map(str, stale))
        notes.append(f"left out, of other weights than the run's newest: {listed}; export again, or see them by `muntin bench`")
    found, told = _of_search(checkpoint)
    plain = any(entry.form == INT8 for entry in artifacts)
    return _distinct([*artifacts, *(entry for entry in found if entry.form != INT8 or not plain)]), [*notes, *told]


def search_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the record of a search that began with these weights (a front's `front.json`), if there is a readable one."""
    try:
        content = json.loads((run_folder(checkpoint) / SEARCH).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("weights") == checkpoint.state.weights else None


def _of_search(checkpoint: Checkpoint) -> tuple[list[RunArtifact], list[str]]:
    """Return plain INT8 and the chosen artefact of a search from these weights, if there are any, and notes."""
    record = run_folder(checkpoint) / SEARCH
    if not record.is_file():
        return [], []
    again = f"to search again, remove {record.parent}, then `{_command('compress', run_folder(checkpoint))}`"
    notes = []
    try:
        content = json.loads(record.read_bytes())
        page = record.with_suffix(".html")
        if content.get("weights") != checkpoint.state.weights:
            whose = "of other weights than the run's newest" if content.get("weights") else "of a version that did not record its weights"
            return [], [f"left out, {whose}: the models of {page}; {again}"]
        points = {point["number"]: point for point in content["points"]}
        places = {INT8: next((point["artifact"] for point in points.values() if point["artifact"] == PLAIN_TRIAL), None)}
        if content["chosen"] is not None:
            point = points[content["chosen"]]
            if not point["kept"]:
                notes.append(f"left out: no model of {page} keeps its budget")
            elif point["artifact"] != PLAIN_TRIAL:
                places[COMPRESSED] = point["artifact"]
                if point.get("verdict") == "uncertain":
                    worst = f"it may lose {point['bound']:.4f} on other data"
                    drop = f"the drop is within {content['max_drop']:g} on the validation data, not with certainty"
                    notes.append(f"{COMPRESSED}: {drop}: {worst}")
        entries = [
            RunArtifact(name=form, form=form, artifact=open_artifact(record.parent / place))
            for form, place in places.items()
            if place is not None
        ]
    except (ArtifactError, OSError, ValueError, KeyError, TypeError) as error:
        return [], [f"left out: {record}: {error}; {again}"]
    return entries, notes


def _artifact_folders(folders: Iterable[Path]) -> Iterator[Path]:
    passed = set()
    for folder in folders:
        for path in sorted(file.parent for file in folder.glob(f"*/{MANIFEST}")):
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


def artifact_place(checkpoint: Checkpoint, directory: Path) -> Path:
    """Return the folder in `directory` for the INT8 artefact of a checkpoint: `artifact`, or `artifact-int8` where another one is there."""
    target = directory / ARTIFACT
    return target if other_artifact(checkpoint, target) is None else directory / f"{ARTIFACT}-{INT8}"


def existing_place(checkpoint: Checkpoint, artifacts: Iterable[RunArtifact]) -> Path | None:
    """Return the folder of the artefact that an export of a checkpoint would write again as it is."""
    return next((entry.artifact.path for entry in artifacts if exported(checkpoint, entry.artifact.path) is not None), None)


def missing_forms(checkpoint: Checkpoint, artifacts: Collection[RunArtifact]) -> list[MissingForm]:
    """Return the forms of which a run has no artefact: INT8 without further training, and the one that a search chooses."""
    run, forms = run_folder(checkpoint), [entry.form for entry in artifacts]
    missing = []
    if INT8 not in forms:
        newest = checkpoints_in(run / "checkpoints")[-1:] == [checkpoint.path]
        missing.append(MissingForm(name=INT8, command=_export_command(checkpoint, run if newest else checkpoint.path)))
    if COMPRESSED not in forms and search_record(checkpoint) is None:
        missing.append(MissingForm(name=COMPRESSED, command=_command("compress", run)))
    return missing


def _export_command(checkpoint: Checkpoint, source: Path) -> str:
    """Return the command that exports a checkpoint. It replaces an artefact of other weights than the run's."""
    place = artifact_place(checkpoint, run_folder(checkpoint))
    with suppress(ArtifactError):
        if origin_weights(open_artifact(place.with_name(ARTIFACT)).manifest) not in (None, checkpoint.state.weights):
            return _command("export", source)
    return _command("export", source) if place.name == ARTIFACT else _command("export", source, "-o", place)


def _command(*words: str | Path) -> str:
    return shlex.join(["muntin", *map(str, words)])
