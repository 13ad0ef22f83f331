"""Write a model, or a further version of one, into a Triton repository: whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from muntin.artifact import Artifact, Signature, open_artifact, write_standalone
from muntin.artifact.atomic_directory import publish_directory
from muntin.artifact.atomic_files import sync_directory, write_synced
from muntin.errors import ArtifactError, DataError
from muntin.serving.triton.batching import TritonBatching, measured_batching
from muntin.serving.triton.configuration import LABELS, ONNX_FILE, configuration_text, contract_lines, has_labels_file
from muntin.serving.triton.options import TritonOptions
from muntin.serving.worker.calls import starting_calls

CONFIG, MODEL, COPY = "config.pbtxt", "model.py", "artifact"
MODEL_TEXT = '''"""Model of Triton's Python back end, written by muntin {version}. The artefact beside it runs in muntin's base install."""

import triton_python_backend_utils as pb_utils

from muntin.serving.triton.backend import TritonModel


class TritonPythonModel:
    def initialize(self, args):
        self.model = TritonModel(args, pb_utils)

    def execute(self, requests):
        return self.model.execute(requests)

    def finalize(self):
        self.model.close()
'''


@dataclass(frozen=True, kw_only=True)
class TritonExport:
    """Paths and batching of a written model. `batching`: of the written configuration; None for a version of an existing model."""

    model: Path
    version: Path
    batching: TritonBatching | None


def write_repository(
    artifact: Artifact | Path | str,
    repository: Path | str,
    options: TritonOptions,
    *,
    batching: TritonBatching | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> TritonExport:
    """Write `REPOSITORY/NAME`, or into an existing model of the same inputs and outputs only its folder of the version.

    `batching`: None to measure the artefact for `options.objective_ms` where that is given (seconds). `stage` is called with the name of
    each step. Raises ArtifactError and DataError: the artefact is damaged, the version exists, the model has other inputs or outputs,
    the sizes are not the model's, or nothing can be written. Then nothing changes.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    starting_calls(artifact.manifest, options.max_batch, options.sizes, options.dims)  # raises for sizes that the model does not take
    model = Path(repository) / options.name
    number = model / str(options.version)
    files = {}
    if os.path.lexists(model):
        _check_existing(model, number, artifact, options)
        batching = None
    else:
        if batching is None:
            stage("measuring batches")
            batching = measured_batching(artifact, options)
        files = {CONFIG: configuration_text(artifact.manifest, options, batching), **_labels(artifact)}
    stage("writing")
    target = model if files else number
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        _write_version(fresh / number.name if files else fresh, artifact, options)
        for name, text in files.items():
            write_synced(fresh / name, text.encode())
        publish_directory(fresh, target, names=(), marker=CONFIG)
    except OSError as error:
        raise ArtifactError(
            f"{target}: cannot be written ({error.strerror or error}): make room or name another repository; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return TritonExport(model=model, version=number, batching=batching)


def _check_existing(model: Path, number: Path, artifact: Artifact, options: TritonOptions) -> None:
    """Raise DataError unless a version can be added to an existing model."""
    if os.path.lexists(number):
        raise DataError(f"{number} exists and is not replaced: give another --version or --name, or remove it")
    try:
        present = (model / CONFIG).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{model} exists and holds no readable {CONFIG}: give another --name, or remove it") from error
    lacking = [line for line in contract_lines(artifact.manifest, options) if line not in present]
    if lacking:
        raise DataError(f"{model / CONFIG} has no line `{lacking[0]}`: the model has other inputs or outputs; give another --name")
    for name, text in _labels(artifact).items():
        if not (model / name).is_file() or (model / name).read_text(encoding="utf-8") != text:
            raise DataError(f"{model / name} names other classes than the artefact: give another --name")


def _labels(artifact: Artifact) -> dict[str, str]:
    """Return the file of a classifier's names, a line each."""
    signature = artifact.manifest.signature
    if not has_labels_file(artifact.manifest):
        return {}
    assert isinstance(signature, Signature)
    return {LABELS: "".join(" ".join(entry.name.split()) + "\n" for entry in signature.classes)}


def _write_version(folder: Path, artifact: Artifact, options: TritonOptions) -> None:
    folder.mkdir(exist_ok=True)
    if options.backend != "python":
        write_standalone(artifact, folder / ONNX_FILE)
        return
    copy = folder / COPY
    copy.mkdir()
    for name in artifact.names:
        shutil.copyfile(artifact.path / name, copy / name)
        with (copy / name).open("rb+") as file:
            os.fsync(file.fileno())
    sync_directory(copy)
    if open_artifact(copy).digest != artifact.digest:
        raise ArtifactError(f"{artifact.path}: it was replaced meanwhile: run the command again")
    write_synced(folder / MODEL, MODEL_TEXT.format(version=version("muntin")).encode())
