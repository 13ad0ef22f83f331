"""The artefact format: manifest, packed weights, digests, versions. Runs without torch and executes nothing that it reads."""

from __future__ import annotations

from muntin.artifact.classes import ClassInfo
from muntin.artifact.manifest import FORMAT, AnySignature, GoldenTolerance, LayerRecord, Manifest, Signature, TensorRecord
from muntin.artifact.packing import pack, unpack
from muntin.artifact.sizes import Sides, Sizes
from muntin.artifact.sparsity import sparsity_of
from muntin.artifact.standalone import check_standalone, write_standalone
from muntin.artifact.store import Artifact, check_target, open_artifact, write_artifact
from muntin.artifact.tensors import TensorInfo, TensorPair, TensorSignature

__all__ = [
    "FORMAT",
    "AnySignature",
    "Artifact",
    "ClassInfo",
    "GoldenTolerance",
    "LayerRecord",
    "Manifest",
    "Sides",
    "Signature",
    "Sizes",
    "TensorInfo",
    "TensorPair",
    "TensorRecord",
    "TensorSignature",
    "check_standalone",
    "check_target",
    "open_artifact",
    "pack",
    "sparsity_of",
    "unpack",
    "write_artifact",
    "write_standalone",
]
