"""The format of artefacts with named inputs and outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from muntin.artifact import TensorInfo, TensorSignature, open_artifact, write_standalone
from muntin.errors import ArtifactError
from muntin.graph.float_run import FloatRun
from tensor_models import SIGNATURE, text_inputs, two_heads, write_tensors


def test_artifact_is_read_as_written(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "artifact")
    read = open_artifact(written.path)
    assert read.manifest.named is not None
    assert read.manifest == written.manifest
    assert read.manifest.signature == SIGNATURE
    assert read.manifest.format == 3
    assert "ids int64 (batch, tokens), mask bool (batch, tokens) -> embedding float32 (batch, 24)" in repr(read)
    (inputs, outputs), _ = read.golden()
    assert list(outputs) == ["embedding", "label"]
    assert all(np.array_equal(inputs[name], value) for name, value in text_inputs(2, 9).items())
    assert "inputs_1/mask" in load_file(written.path / "golden.safetensors")
    assert json.loads((written.path / "manifest.json").read_text())["example"] == {"batch": 1, "tokens": 8}


def test_refusal_where_images_are_needed(tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"takes named tensors \(ids int64 .* an image model is needed here: call it from Python"):
        _ = open_artifact(artifact.path).picture


def test_standalone_onnx(tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "artifact")
    file = write_standalone(artifact, tmp_path / "model.onnx")
    proto = onnx.load(file)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"task": "tensors", "artifact": artifact.digest}
    inputs = text_inputs(4, 3)
    for name, value in FloatRun(two_heads())(inputs).items():
        np.testing.assert_allclose(FloatRun(proto)(inputs)[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"golden": []}, "no golden pairs"),
        ({"golden": [({"ids": np.zeros((1, 2), np.int64)}, {})]}, "golden pair 0: no input mask"),
        ({"golden": [(text_inputs(1, 2), {})]}, "golden pair 0: outputs nothing"),
        ({"golden": [(text_inputs(1, 2), {"embedding": np.zeros((2, 24), np.float32), "label": np.zeros(2, int)})]}, "has to be 1"),
        ({"golden": [(text_inputs(1, 2), {"embedding": np.full((1, 24), np.nan, "f4"), "label": np.zeros(1, int)})]}, "NaN"),
        ({"example": {"batch": 1}}, "example with sizes of batch: give one of each free dimension"),
        ({"example": {"batch": 1 << 20, "tokens": 1 << 20}}, "values, more than"),
    ],
)
def test_fields_that_are_refused(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        write_tensors(tmp_path / "artifact", **fields)
    assert not (tmp_path / "artifact").exists()


def test_signatures_that_are_refused() -> None:
    x, y = (TensorInfo(name=name, dtype="float32", shape=("rows", 4)) for name in "xy")
    for fields in (
        {"inputs": (), "outputs": (y,)},
        {"inputs": (x, x), "outputs": (y,)},
        {"inputs": (x,), "outputs": tuple(y.model_copy(update={"name": f"y{n}"}) for n in range(65))},
        {"inputs": (x,), "outputs": (y,), "batch": "columns"},
    ):
        with pytest.raises(ValidationError):
            TensorSignature.model_validate(fields)
    for shape in ((0,), ("",), (1,) * 9, (-1,)):
        with pytest.raises(ValidationError):
            TensorInfo(name="x", dtype="float32", shape=shape)
    with pytest.raises(ValidationError):
        TensorInfo(name="x", dtype="string", shape=())  # type: ignore[arg-type]


def test_golden_tensors_of_other_names(tmp_path: Path) -> None:
    artifact, other = write_tensors(tmp_path / "artifact"), write_tensors(tmp_path / "other", inputs=[text_inputs(1, 3)])
    shutil.copy(other.path / "golden.safetensors", artifact.path / "golden.safetensors")
    with pytest.raises(ArtifactError, match=r"golden\.safetensors: its content is not what the manifest's sha256 says"):
        artifact.golden()
