"""The artefact format: manifest, packed weights, digests, versions. Runs without torch and executes nothing that it reads."""

from __future__ import annotations

from muntin.artifact.classes import ClassInfo
from muntin.artifact.manifest import FORMAT, GoldenTolerance, LayerRecord, Manifest, Signature, TensorRecord
from muntin.artifact.packing import pack, unpack
from muntin.artifact.sizes import Sides, Sizes
from muntin.artifact.standalone import check_standalone, write_standalone
from muntin.artifact.store import Artifact, check_target, open_artifact, write_artifact

__all__ = [
    "FORMAT",
    "Artifact",
    "ClassInfo",
    "GoldenTolerance",
    "LayerRecord",
    "Manifest",
    "Sides",
    "Signature",
    "Sizes",
    "TensorRecord",
    "check_standalone",
    "check_target",
    "open_artifact",
    "pack",
    "unpack",
    "write_artifact",
    "write_standalone",
]
