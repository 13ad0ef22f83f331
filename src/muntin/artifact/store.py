"""Artefacts on disk: written whole or not at all, read with every digest checked, never executed.

    DIR/manifest.json         description (muntin.artifact.manifest)
    DIR/model.onnx            the graph; initializers that were moved out keep name, type and shape here
    DIR/weights.safetensors   each weight once: integers of 2 to 7 bits packed, "f16" floats in half precision, others unchanged
    DIR/golden.safetensors    images_0, scores_0, images_1, ... : inputs, and the model's scores at export

The names are fixed, so a manifest cannot refer to other files. The same model, packing and golden pairs give the same bytes.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from muntin.artifact.atomic_directory import names_in, refuse_foreign, replace_directory
from muntin.artifact.manifest import (
    EngineFamily,
    FileName,
    FloatPrecision,
    GoldenTolerance,
    LayerRecord,
    Manifest,
    Signature,
    field_error,
    parse_manifest,
    render_manifest,
)
from muntin.artifact.onnx_weights import Packing, join_model, split_model
from muntin.errors import ArtifactError

MANIFEST = "manifest.json"
FILES: tuple[FileName, ...] = get_args(FileName)

LARGEST_MANIFEST = 1 << 26
"""Bytes. It is read before any digest is checked, and parsing takes many times its size."""

GoldenPair = tuple[NDArray[np.uint8], NDArray[np.float32]]


@dataclass(frozen=True, repr=False)
class Artifact:
    """An opened artefact: directory and manifest. Its files are read on demand, and their digests checked again."""

    path: Path
    manifest: Manifest

    def __repr__(self) -> str:
        """Path and form in one line: the manifest alone would be tens of kilobytes."""
        layers = self.manifest.layers
        integers = sum(layer.integer_activations for layer in layers)
        form = f"{integers} of {len(layers)} layers in INT8, others in {self.manifest.precision}"
        signature = self.manifest.signature
        sizes = "" if signature.sizes.every else f", {signature.sizes.text}"
        return f"Artifact({str(self.path)!r}, {signature.task}{sizes}, {form}, exported {self.manifest.created})"

    @property
    def bytes(self) -> int:
        """Size of the whole directory."""
        return sum((self.path / name).stat().st_size for name in (MANIFEST, *FILES))

    @property
    def digest(self) -> str:
        """Identifies the whole content: the manifest's sha256, which covers those of the files."""
        return self.manifest.sha256

    def model_bytes(self) -> builtins.bytes:
        """The self-contained ONNX for an engine: packed integers as int8, "f16" as float32. Takes twice its size in memory."""
        structure = _read_checked(self.path, "model.onnx", self.manifest)
        try:
            return join_model(structure, _read_tensors(self.path, "weights.safetensors", self.manifest), self.manifest.tensors)
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {error}") from error

    def golden(self) -> tuple[GoldenPair, ...]:
        """The recorded pairs of images, uint8 (B, H, W, C), and scores, float32. Raises ArtifactError for none, or for other tensors."""
        tensors = _read_tensors(self.path, "golden.safetensors", self.manifest)
        count, odd = divmod(len(tensors), 2)
        if odd or not count:
            raise ArtifactError(
                f"{self.path / 'golden.safetensors'}: {len(tensors)} tensors, where pairs of images and scores are needed, at least one: "
                "export the artefact again"
            )
        try:
            pairs = tuple((tensors[f"images_{i}"], tensors[f"scores_{i}"]) for i in range(count))
            _check_golden(pairs, self.manifest.signature)
        except KeyError as error:
            raise ArtifactError(f"{self.path / 'golden.safetensors'}: it has no {error.args[0]}: export the artefact again") from error
        except ArtifactError as error:
            raise ArtifactError(f"{self.path / 'golden.safetensors'}: {error}: export the artefact again") from error
        return pairs


def open_artifact(path: str | Path) -> Artifact:
    """Opens an artefact directory and checks every digest, which reads all of it once.

    Raises ArtifactError, naming the file, if one is missing, added or altered, or if the format is newer than this version reads.
    """
    path = Path(path)
    manifest = read_manifest(path)
    present = names_in(path)
    for name in FILES:
        if name not in manifest.files:
            raise ArtifactError(f"{path / MANIFEST}: it names no digest for {name}: export the artefact again")
        if name not in present:
            raise ArtifactError(f"{path / name}: missing: copy or export the artefact again")
    if extra := sorted(present - {MANIFEST, *FILES}):
        raise ArtifactError(f"{path / extra[0]}: not part of the artefact: remove it")
    for name in FILES:
        if (path / name).exists() and not (path / name).is_file():  # a pipe or a device: reading it might never end
            raise ArtifactError(f"{path / name}: no regular file: copy or export the artefact again")
        _check_digest(path / name, _digest(path / name), manifest.files[name])
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Reads an artefact's manifest only; `open_artifact` checks the other files.

    Raises ArtifactError without a manifest, or for one newer than this version reads.
    """
    try:
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such artefact directory: name a directory that muntin exported")
        if not (path / MANIFEST).is_file():
            raise ArtifactError(f"{path}: it holds no {MANIFEST}: name a directory that muntin exported")
        size = (path / MANIFEST).stat().st_size
    except OSError as error:  # missing permissions, an impossible name
        raise ArtifactError(f"{str(path)[:200]}: cannot be read ({error.strerror}): check the path and its permissions") from error
    if size > LARGEST_MANIFEST:
        raise ArtifactError(
            f"{path / MANIFEST}: {size:,} bytes, more than the {LARGEST_MANIFEST:,} that are read: export the artefact again"
        )
    return parse_manifest(_read(path / MANIFEST), str(path / MANIFEST))


def check_target(path: str | Path) -> None:
    """Raises ArtifactError where `write_artifact` would refuse to write. Call it before the work."""
    refuse_foreign(Path(path), (MANIFEST, *FILES), marker=MANIFEST)


def write_artifact(
    path: str | Path,
    *,
    model: onnx.ModelProto,
    signature: Signature,
    golden: Sequence[GoldenPair],
    golden_tolerance: Mapping[EngineFamily, Mapping[FloatPrecision, GoldenTolerance]],
    example: tuple[int, int, int] | None = None,
    packing: Packing | None = None,
    layers: Iterable[LayerRecord] = (),
    passes: Iterable[Mapping[str, Any]] = (),
    plan: Mapping[str, Any] | None = None,
    precision: FloatPrecision = "f32",
    measured: Mapping[str, Any] | None = None,
    created: str | None = None,
) -> Artifact:
    """Writes a self-contained ONNX model as an artefact directory, whole or not at all. Replaces an existing artefact.

    Initializers of more than 64 elements, and those named in `packing`, move to `weights.safetensors`: at 2 to 8 bits for an integer (INT8
    and UINT8), in half precision for "f16" (FLOAT), otherwise unchanged. Doc strings, metadata and inferred shapes of intermediates are
    left out; names stay. `model` is not changed. Takes about twice the model's bytes in memory.

    Raises ArtifactError: `path` exists and is no artefact, the disk is full, a value does not fit its bits, or the model expands to more
    than 2 GiB.
    """
    path = Path(path)
    structure, tensors, records = split_model(model, packing or {})
    contents: dict[FileName, bytes] = {
        "model.onnx": structure.SerializeToString(deterministic=True),
        "weights.safetensors": save_tensors(tensors),
        "golden.safetensors": save_tensors(_golden_tensors(golden, signature)),
    }
    try:
        manifest = Manifest(
            muntin=_version(),
            created=created or datetime.now(UTC).isoformat(timespec="seconds"),
            signature=signature,
            passes=tuple(dict(entry) for entry in passes),
            layers=tuple(layers),
            tensors=records,
            plan=None if plan is None else dict(plan),
            precision=precision,
            measured=dict(measured or {}),
            golden_tolerance={engine: dict(limits) for engine, limits in golden_tolerance.items()},
            example=example,
            files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        )
    except ValidationError as error:
        raise ArtifactError(f"manifest field {field_error(error)}: record plain values") from error
    manifest, rendered = render_manifest(manifest)
    replace_directory(path, {MANIFEST: rendered, **{str(name): data for name, data in contents.items()}}, marker=MANIFEST)
    return Artifact(path, manifest)


def _golden_tensors(golden: Sequence[GoldenPair], signature: Signature) -> dict[str, NDArray[Any]]:
    if not golden:
        raise ArtifactError("no golden pairs: give at least one (images, scores) pair, or nothing can be verified later")
    _check_golden(golden, signature)
    tensors: dict[str, NDArray[Any]] = {}
    for index, (images, scores) in enumerate(golden):
        tensors[f"images_{index}"], tensors[f"scores_{index}"] = np.ascontiguousarray(images), np.ascontiguousarray(scores)
    return tensors


def _check_golden(golden: Iterable[GoldenPair], signature: Signature) -> None:
    for index, (images, scores) in enumerate(golden):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != signature.channels or 0 in images.shape:
            raise ArtifactError(f"golden images {index}: {images.dtype} {images.shape}: uint8 (B, H, W, {signature.channels}) is needed")
        if not signature.sizes.takes(*images.shape[1:3]):
            raise ArtifactError(f"golden images {index}: {images.shape}, and the model takes {signature.sizes.text}: give allowed sizes")
        expected = signature.scores_shape(*images.shape[:3])
        if scores.dtype != np.float32 or scores.shape != expected or not np.isfinite(scores).all():
            raise ArtifactError(f"golden scores {index}: {scores.dtype} {scores.shape}: finite float32 {expected} is needed")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _read_checked(path: Path, name: FileName, manifest: Manifest) -> bytes:
    data = _read(path / name)
    _check_digest(path / name, hashlib.sha256(data).hexdigest(), manifest.files[name])
    return data


def _digest(file: Path) -> str:
    """sha256 of a file, read in parts."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _check_digest(path: Path, digest: str, recorded: str) -> None:
    if digest != recorded:
        raise ArtifactError(f"{path}: its content is not what the manifest's sha256 says: copy or export the artefact again")


def _read_tensors(path: Path, name: FileName, manifest: Manifest) -> dict[str, NDArray[Any]]:
    data = _read_checked(path, name, manifest)
    try:
        tensors: dict[str, NDArray[Any]] = load_tensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type unknown to numpy
        raise ArtifactError(f"{path / name}: not readable as safetensors ({error}): export the artefact again") from error
    return tensors


def _version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("muntin")
    return "unknown"
