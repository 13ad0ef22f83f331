"""Artefacts on disk: written whole or not at all, read with every digest checked, never executed.

    DIR/manifest.json         description (muntin.artifact.manifest)
    DIR/model.onnx            the graph; initializers that were moved out keep name, type and shape here
    DIR/weights.safetensors   each weight once: integers of 2 to 7 bits packed, "f16" floats in half precision, others unchanged
    DIR/golden.safetensors    inputs_0/NAME, outputs_0/NAME, inputs_1/NAME, ... : inputs, and the model's outputs at export; of an image
                              model `images` and `scores`
    DIR/drift.json            optional: statistics of the training pictures (muntin.updating.drift)

The names are fixed, so a manifest cannot refer to other files. The same model, packing and golden pairs give the same bytes.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from muntin.artifact.atomic_directory import names_in, refuse_foreign, replace_directory
from muntin.artifact.manifest import (
    LARGEST_MANIFEST,
    AnyFileName,
    AnySignature,
    EngineFamily,
    FileName,
    FloatPrecision,
    GoldenTolerance,
    LayerRecord,
    Manifest,
    OptionalFileName,
    Signature,
    field_error,
    parse_manifest,
    render_manifest,
)
from muntin.artifact.onnx_weights import Packing, join_model, split_model
from muntin.artifact.sparsity import sparsity_of
from muntin.artifact.tensors import TensorPair, TensorSignature
from muntin.artifact.tile_plan import TilePlan
from muntin.errors import ArtifactError

MANIFEST = "manifest.json"
FILES: tuple[FileName, ...] = get_args(FileName)
OPTIONAL_FILES: tuple[OptionalFileName, ...] = get_args(OptionalFileName)

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
        if isinstance(signature, TensorSignature):
            kind = signature.text
        else:
            kind = signature.task if signature.sizes.every else f"{signature.task}, {signature.sizes.text}"
        return f"{type(self).__name__}({str(self.path)!r}, {kind}, {form}, exported {self.manifest.created})"

    @property
    def bytes(self) -> int:
        """Size of the whole directory."""
        return sum((self.path / name).stat().st_size for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the files in the directory."""
        return (MANIFEST, *FILES, *(name for name in OPTIONAL_FILES if name in self.manifest.files))

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

    def optional_file(self, name: OptionalFileName) -> builtins.bytes | None:
        """The content of an optional file; None if the artefact has none. Raises ArtifactError if it was altered."""
        return _read_checked(self.path, name, self.manifest) if name in self.manifest.files else None

    @property
    def picture(self) -> Signature:
        """The signature of an image model. Raises ArtifactError for one with named tensors."""
        try:
            return self.manifest.picture
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {error}") from error

    def golden(self) -> tuple[TensorPair, ...]:
        """The recorded pairs of inputs and outputs by name. Raises ArtifactError for none, or for tensors that do not fit the signature."""
        pairs: dict[str, TensorPair] = {}
        for key, tensor in _read_tensors(self.path, "golden.safetensors", self.manifest).items():
            (kind, _, number), name = key.partition("/")[0].rpartition("_"), key.partition("/")[2]
            if kind not in ("inputs", "outputs"):
                raise self._golden_error(f"it holds {key}, which is neither inputs_N/NAME nor outputs_N/NAME")
            pairs.setdefault(number, ({}, {}))[kind == "outputs"][name] = tensor
        try:
            _check_golden(list(pairs.values()), self.manifest.signature)
        except ArtifactError as error:
            raise self._golden_error(str(error)) from error
        order = [spec.name for spec in self.manifest.signature.tensors.outputs]  # the file has its own
        return tuple(
            (inputs, {name: outputs[name] for name in order if name in outputs})
            for _, (inputs, outputs) in sorted(pairs.items(), key=lambda item: item[0].zfill(9))
        )

    def golden_images(self) -> tuple[GoldenPair, ...]:
        """The recorded pairs of images, uint8 (B, H, W, C), and scores, float32, of an image model. Raises as `golden`."""
        return tuple((inputs["images"], outputs["scores"]) for inputs, outputs in self.golden())

    def _golden_error(self, text: str) -> ArtifactError:
        return ArtifactError(f"{self.path / 'golden.safetensors'}: {text}: export the artefact again")


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
    for recorded in manifest.files:
        if recorded not in present:
            raise ArtifactError(f"{path / recorded}: missing: copy or export the artefact again")
    if extra := sorted(present - {MANIFEST, *manifest.files}):
        raise ArtifactError(f"{path / extra[0]}: not part of the artefact: remove it")
    for recorded, digest in manifest.files.items():
        file = path / recorded
        if file.exists() and not file.is_file():  # a pipe or a device: reading it might never end
            raise ArtifactError(f"{file}: no regular file: copy or export the artefact again")
        _check_digest(file, _digest(file), digest)
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """Reads an artefact's manifest only; `open_artifact` checks the other files.

    Raises ArtifactError without a manifest, or for one newer than this version reads.
    """
    try:
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such artefact directory: name a directory that muntin exported")
        if not (path / MANIFEST).is_file():
            raise ArtifactError(f"{path}: it holds no {MANIFEST}: name a directory that muntin exported{such_as(path)}")
        size = (path / MANIFEST).stat().st_size
    except OSError as error:  # missing permissions, an impossible name
        raise ArtifactError(f"{str(path)[:200]}: cannot be read ({error.strerror}): check the path and its permissions") from error
    if size > LARGEST_MANIFEST:
        raise ArtifactError(
            f"{path / MANIFEST}: {size:,} bytes, more than the {LARGEST_MANIFEST:,} that are read: export the artefact again"
        )
    return parse_manifest(_read(path / MANIFEST), str(path / MANIFEST))


def such_as(folder: Path) -> str:
    """Words that name an artefact directly in a folder, such as a run's; empty if there is none."""
    found = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    return f", such as {found[0]}" if found else ""


def check_target(path: str | Path) -> None:
    """Raises ArtifactError where `write_artifact` would refuse to write. Call it before the work."""
    refuse_foreign(Path(path), (MANIFEST, *FILES, *OPTIONAL_FILES), marker=MANIFEST)


def with_optional_file(artifact: Artifact, name: OptionalFileName, content: bytes) -> None:
    """Writes an optional file into an artefact, in place of an earlier one. Its manifest, and so its digest, change.

    The directory is replaced whole or not at all. Takes the artefact's size in memory. Raises ArtifactError.
    """
    digests = {**artifact.manifest.files, name: hashlib.sha256(content).hexdigest()}
    rewrite_artifact(artifact, {name: content}, files=digests)


def with_precision(artifact: Artifact, precision: FloatPrecision) -> None:
    """Records the precision in which the float layers of an artefact run. As `with_optional_file`."""
    rewrite_artifact(artifact, {}, precision=precision)


def rewrite_artifact(artifact: Artifact, added: Mapping[OptionalFileName, bytes], **changes: Any) -> None:
    """Replaces an artefact by one with more files and other fields of the manifest. As `with_optional_file`."""
    contents = {key: _read_checked(artifact.path, key, artifact.manifest) for key in artifact.manifest.files} | dict(added)
    _, rendered = render_manifest(artifact.manifest.model_copy(update=changes))
    replace_directory(artifact.path, {MANIFEST: rendered, **{str(key): data for key, data in contents.items()}}, marker=MANIFEST)


def write_artifact(
    path: str | Path,
    *,
    model: onnx.ModelProto,
    signature: AnySignature,
    golden: Sequence[GoldenPair | TensorPair],
    golden_tolerance: Mapping[EngineFamily, Mapping[FloatPrecision, GoldenTolerance]],
    example: Mapping[str, int] | tuple[int, int, int] | None = None,
    packing: Packing | None = None,
    layers: Iterable[LayerRecord] = (),
    passes: Iterable[Mapping[str, Any]] = (),
    tile_plan: TilePlan | None = None,
    precision: FloatPrecision = "f32",
    measured: Mapping[str, Any] | None = None,
    created: str | None = None,
) -> Artifact:
    """Writes a self-contained ONNX model as an artefact directory, whole or not at all. Replaces an existing artefact.

    Initializers of more than 64 elements, and those named in `packing`, move to `weights.safetensors`: at 2 to 8 bits for an integer (INT8
    and UINT8), in half precision for "f16" (FLOAT), otherwise unchanged. Doc strings, metadata and inferred shapes of intermediates are
    left out; names stay. `model` is not changed. Takes about twice the model's bytes in memory. `golden`: inputs and outputs by name, or of
    an image model images and scores. `example`: sizes of free dimensions, or (B, H, W).

    Raises ArtifactError: `path` exists and is no artefact, the disk is full, a value does not fit its bits, or the model expands to more
    than 2 GiB.
    """
    path = Path(path)
    if isinstance(example, tuple):
        example = dict(zip(("batch", "height", "width"), example, strict=True))
    pairs = [_named_pair(pair) for pair in golden]
    _check_golden(pairs, signature)
    tensors = {
        f"{kind}_{index}/{name}": np.require(tensor, requirements="C")
        for index, pair in enumerate(pairs)
        for kind, named in zip(("inputs", "outputs"), pair, strict=True)
        for name, tensor in named.items()
    }
    fields = {
        "signature": signature,
        "golden_tolerance": {engine: dict(limits) for engine, limits in golden_tolerance.items()},
        "example": None if example is None else dict(example),
        "layers": tuple(layers),
        "passes": tuple(dict(entry) for entry in passes),
        "tile_plan": tile_plan,
        "precision": precision,
        "measured": dict(measured or {}),
        "created": created,
    }
    return Artifact(path, _write(path, model, packing or {}, tensors, fields))


def copy_artifact(artifact: Artifact, path: str | Path, measured: Mapping[str, JsonValue]) -> Artifact:
    """Writes a copy of an artefact with more values under `measured` in its manifest, and so with a digest of its own.

    Raises ArtifactError as `write_artifact` does, and for a file of the source that was altered.
    """
    files = {str(name): _read_checked(artifact.path, name, artifact.manifest) for name in FILES}
    manifest = artifact.manifest.model_copy(update={"measured": {**artifact.manifest.measured, **measured}})
    manifest, rendered = render_manifest(manifest)
    replace_directory(Path(path), {MANIFEST: rendered, **files}, marker=MANIFEST)
    return replace(artifact, path=Path(path), manifest=manifest)


def _write(path: Path, model: onnx.ModelProto, packing: Packing, golden: dict[str, NDArray[Any]], fields: dict[str, Any]) -> Manifest:
    """Writes the four files and returns the manifest. `fields`: its values other than of files and weights."""
    structure, tensors, records = split_model(model, packing)
    patterns = sparsity_of(model)
    fields["layers"] = tuple(one.model_copy(update={"sparsity": patterns.get(one.name, "")}) for one in fields["layers"])
    contents: dict[AnyFileName, bytes] = {
        "model.onnx": structure.SerializeToString(deterministic=True),
        "weights.safetensors": save_tensors(tensors),
        "golden.safetensors": save_tensors(golden),
    }
    created = fields["created"] or datetime.now(UTC).isoformat(timespec="seconds")
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    try:
        manifest = Manifest(**fields | {"created": created}, muntin=_version(), tensors=records, files=digests)
    except ValidationError as error:
        raise ArtifactError(f"manifest field {field_error(error)}: record plain values") from error
    manifest, rendered = render_manifest(manifest)
    written = {MANIFEST: rendered, **{str(name): data for name, data in contents.items()}}
    replace_directory(path, written, marker=MANIFEST, names=OPTIONAL_FILES)
    return manifest


def _named_pair(pair: GoldenPair | TensorPair) -> TensorPair:
    inputs, outputs = pair
    return (inputs, outputs) if isinstance(inputs, dict) else ({"images": inputs}, {"scores": outputs})  # type: ignore[dict-item, return-value]


def _check_golden(golden: Sequence[TensorPair], signature: AnySignature) -> None:
    if not golden:
        raise ArtifactError("no golden pairs: at least one pair of inputs and outputs is needed, or nothing can be verified later")
    tensors, images = signature.tensors, isinstance(signature, Signature)
    names = {"scores"} if images else {spec.name for spec in tensors.outputs}
    for index, (inputs, outputs) in enumerate(golden):
        dims: dict[str, int] = {}
        whole = "" if outputs.keys() == names else f"outputs {', '.join(outputs) or 'nothing'}"
        if problem := tensors.inputs_problem(inputs, dims) or whole or tensors.outputs_problem(outputs, dims):
            raise ArtifactError(f"golden pair {index}: {problem}")
        if isinstance(signature, Signature):
            _check_sizes(index, inputs["images"], outputs["scores"], signature)
        if wrong := [name for name, tensor in outputs.items() if tensor.dtype.kind == "f" and not np.isfinite(tensor).all()]:
            raise ArtifactError(f"golden pair {index}: output {wrong[0]} holds NaN or infinity: give inputs with finite outputs")


def _check_sizes(index: int, images: NDArray[Any], scores: NDArray[Any], signature: Signature) -> None:
    if not signature.sizes.takes(*images.shape[1:3]):
        raise ArtifactError(f"golden images {index}: {images.shape}, and the model takes {signature.sizes.text}: give allowed sizes")
    expected = signature.scores_shape(*images.shape[:3])
    if scores.shape != expected:
        raise ArtifactError(f"golden scores {index}: {scores.shape}: {expected} is needed")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}): check the path and its permissions") from error


def _read_checked(path: Path, name: AnyFileName, manifest: Manifest) -> bytes:
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
