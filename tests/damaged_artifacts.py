"""Damaged and malicious artefacts: one file of a sound artefact is changed, its digests are set right, and all of it is read.

Reading may end with ArtifactError alone. `fuzz_artifacts.py` looks for other ends; `artifact/test_fuzzed.py` reads the inputs that it kept.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact import ClassInfo, GoldenTolerance, LayerRecord, Signature, write_artifact
from muntin.artifact.manifest import _content_digest
from muntin.artifact.store import open_artifact

Files = dict[str, bytes]
CHANGED = ("manifest.json", "model.onnx", "weights.safetensors", "golden.safetensors")
ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 7, 8, 64, 1 << 31, 1 << 63, -(1 << 63), 1 << 70, 0.5, 1e308, "", "a", "tensors", "int", "f16", "block:1x1",
    "2:4", "1:16", "block:9999x9999", "\ud800", "../../etc/passwd", [], {}, [[]], [1], [0, 0], [1 << 40, 1 << 40], {"": None}, "x" * 4000,
)  # fmt: skip
"""Values that take the place of one of a manifest."""


@functools.cache
def seed() -> Files:
    """The files of a small artefact with weights of each kind: packed, of layers with patterns of zeros, half precision, plain."""
    rng = np.random.default_rng(7)
    groups = rng.integers(1, 8, (64, 64)).astype(np.int8)
    np.put_along_axis(groups.reshape(-1, 4), rng.permuted(np.tile(np.arange(4), (1024, 1)), axis=1)[:, 2:], 0, 1)
    blocks = np.where(np.kron(rng.random((16, 16)) < 0.3, np.ones((4, 4))), rng.integers(1, 8, (64, 64)), 0).astype(np.int8)
    tensors = {
        "groups": groups, "blocks": blocks, "packed": rng.integers(-8, 8, (40, 3)).astype(np.int8),
        "half": rng.normal(size=(9, 9)).astype(np.float32), "plain": rng.normal(size=(3, 30)).astype(np.float32),
        "shape": np.arange(70, dtype=np.int64),
    }  # fmt: skip
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 3, "H", "W"])
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["scores"], perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(nodes, "g", [images], [scores], [numpy_helper.from_array(value, name) for name, value in tensors.items()])
    classes = tuple(ClassInfo(name=name, color=(index, 0, 0)) for index, name in enumerate("abc"))
    pixels = rng.integers(0, 256, (1, 4, 5, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(
            Path(folder) / "a", model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10),
            signature=Signature(task="segment", channels=3, classes=classes),
            golden=[(pixels, np.moveaxis(pixels, 3, 1).astype(np.float32))],
            golden_tolerance={"openvino": {"f32": GoldenTolerance(max_error=0.05, label_agreement=1)}},
            packing={"groups": 4, "blocks": 4, "packed": 4, "half": "f16"}, example=(1, 8, 8),
            layers=[LayerRecord(name="head", kind="Conv2d", weight_bits=4, activation_bits=8)], passes=[{"name": "int8"}],
            measured={"notes": ["a note"], "milliseconds": 1.5},
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in (Path(folder) / "a").iterdir()}


def with_digests(files: Files) -> Files:
    """The files with a manifest whose digests are right, where it is a JSON object with text for keys."""
    files = dict(files)
    with suppress(ValueError, RecursionError):
        content = json.loads(files["manifest.json"])
        if isinstance(content, dict):
            if isinstance(content.get("files"), dict):
                content["files"] |= {name: hashlib.sha256(files[name]).hexdigest() for name in content["files"] if name in files}
            content.pop("sha256", None)
            content["sha256"] = _content_digest(content)
            files["manifest.json"] = json.dumps(content).encode()
    return files


def edited(manifest: bytes, choices: bytes) -> bytes:
    """The manifest with values replaced, doubled or left out: each two bytes choose a place and a change."""
    content = json.loads(manifest)
    for where, what in zip(choices[::2], choices[1::2], strict=False):
        places = list(_places(content))
        holder, key = places[where * len(places) // 256]
        if what == 255:
            del holder[key]
        elif what == 254 and isinstance(holder, list):
            holder.append(holder[key])
        elif what == 253:
            other, name = places[(where * 7 + 1) % len(places)]
            holder[key] = json.loads(json.dumps(other[name]))
        else:
            holder[key] = copy.deepcopy(ODD[what % len(ODD)])
    return json.dumps(content).encode()


def _places(content: Any) -> Any:
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def files_of(data: bytes) -> Files:
    """The artefact that an input describes: its first byte says what the others change."""
    kind, rest = (data[0] if data else 0) % 6, data[1:]
    files = dict(seed())
    if kind == 4:
        files["manifest.json"] = edited(files["manifest.json"], rest[:32])
    elif kind == 5:  # a manifest and weights together
        files["manifest.json"] = edited(files["manifest.json"], rest[:8])
        files["weights.safetensors"] = rest[8:] or files["weights.safetensors"]
    else:
        files[CHANGED[kind]] = rest
    return with_digests(files)


def read_all(files: Files, folder: Path) -> None:
    """Write an artefact to `folder` and read every part of it. Raises what reading raises."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    artifact = open_artifact(folder)
    repr(artifact)
    artifact.golden()
    onnx.load_model_from_string(artifact.model_bytes())


def inputs_to_begin_with() -> list[bytes]:
    """An input of each kind that is a sound artefact, or nearly one."""
    files = seed()
    whole = [bytes([kind]) + files[name] for kind, name in enumerate(CHANGED)]
    return [*whole, bytes([4, 9, 3, 200, 40]), bytes([5, *range(8)]) + files["weights.safetensors"]]
