"""Writes an artefact's model as one plain ONNX file for other tools: every weight inside, in a type of ONNX's own.

Quantised layers keep their QuantizeLinear and DequantizeLinear nodes around INT8 weights. Weights of 2 to 7 bits stand in INT8, and those
stored in half precision in FLOAT, so that every runtime computes the same numbers from them.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from muntin.artifact.atomic_files import write_files
from muntin.artifact.manifest import Signature
from muntin.artifact.store import MANIFEST, Artifact, open_artifact
from muntin.errors import ArtifactError

SUFFIX = ".onnx"


def write_standalone(artifact: Artifact | Path | str, file: Path | str) -> Path:
    """Write the model of an artefact, or of the artefact's folder, to `file` and return its path. An existing ONNX file is replaced.

    The graph is the one that the engines run: `images` uint8 (B, H, W, C) in, `scores` float32 out, normalisation inside; or the named
    inputs and outputs of any other model. Metadata name the task, and of images the classes, the allowed sizes and the side that a
    classifier's pictures are resized to, which is not part of the graph.
    Takes about four times the model's size in memory. Raises ArtifactError: the artefact is damaged, the file is not named *.onnx, or it
    cannot be written.
    """
    file = Path(file)
    check_standalone(file)
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    signature = artifact.manifest.signature
    model = onnx.load_model_from_string(artifact.model_bytes())
    if isinstance(signature, Signature):
        _name_axes(model.graph, signature)
    model = onnx.shape_inference.infer_shapes(model)  # viewers show the shapes of intermediate values only where they are stored
    onnx.helper.set_model_props(model, _metadata(artifact))
    try:
        write_files(file.parent, {file.name: model.SerializeToString(deterministic=True)})
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written ({error.strerror or error}): make room or name another place") from error
    return file


def check_standalone(file: Path) -> None:
    """Raises ArtifactError where `write_standalone` would refuse to write. Call it before the work."""
    if file.suffix.lower() != SUFFIX:
        raise ArtifactError(f"{file}: name a file that ends in {SUFFIX}, as other tools expect")
    if file.is_dir() or not file.parent.is_dir():
        raise ArtifactError(f"{file}: it is a folder, or its folder does not exist: name a file in an existing folder")
    if (file.parent / MANIFEST).is_file():
        raise ArtifactError(f"{file}: {file.parent} is an artefact, which holds its own files only: name a file beside it")


def _name_axes(graph: onnx.GraphProto, signature: Signature) -> None:
    """Replaces the exporter's numbered names of free axes in the graph's input and output."""
    sides = ["height", "width"] if signature.scale == 1 else [f"{signature.scale}*height", f"{signature.scale}*width"]
    for value, names in ((graph.input[0], ["batch", "height", "width"]), (graph.output[0], ["batch", "", *sides])):
        for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=False):  # the input's channels have a number
            if not axis.HasField("dim_value"):
                axis.dim_param = name


def _metadata(artifact: Artifact) -> dict[str, str]:
    """Key and value of each entry of the model's metadata; the values of other types than text are JSON."""
    signature = artifact.manifest.signature
    if not isinstance(signature, Signature):
        return {"task": signature.task, "artifact": artifact.digest}
    entries = {"task": signature.task, "classes": json.dumps([entry.name for entry in signature.classes], ensure_ascii=False)}
    if signature.side is not None:
        entries["side"] = str(signature.side)
    if not signature.sizes.every:
        entries["sizes"] = signature.sizes.model_dump_json()
    return entries | {"artifact": artifact.digest}
