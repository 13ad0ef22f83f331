"""The plain ONNX file: what is in it, and the code that docs/artifact.md shows for reading it and the artefact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from muntin.artifact import Artifact, ClassInfo, Signature, write_standalone
from muntin.errors import ArtifactError
from muntin.images import read_image
from muntin.runtime import load, predict

Write = Callable[..., Artifact]
PAGE = Path(__file__).parents[2] / "docs" / "artifact.md"


@pytest.fixture(scope="module")
def examples() -> list[str]:
    """The Python code of the page: reading a weight, computing a picture."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_weights_and_metadata(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    file = write_standalone(tmp_path / "a", tmp_path / "plain.onnx")
    onnx.checker.check_model(str(file), full_check=True)
    plain = onnx.load(file)
    weights = {item.name: numpy_helper.to_array(item) for item in plain.graph.initializer}
    for item in model.graph.initializer:
        original = numpy_helper.to_array(item)
        expected = original.astype(np.float16).astype(np.float32) if item.name == "narrow" else original
        assert weights[item.name].dtype == expected.dtype
        np.testing.assert_array_equal(weights[item.name], expected)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in plain.graph.value_info
    }
    assert shapes["nchw"] == ["batch", 3, "height", "width"]
    assert [axis.dim_param for axis in plain.graph.output[0].type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    metadata = {entry.key: entry.value for entry in plain.metadata_props}
    assert metadata == {"task": "segment", "classes": '["sea", "land"]', "artifact": artifact.digest}
    assert write_standalone(artifact, file).read_bytes() == file.read_bytes()  # replaced


@pytest.mark.parametrize(
    ("name", "message"),
    [("plain.pb", "name a file that ends in .onnx"), ("none/plain.onnx", "its folder does not exist"), ("a/model.onnx", "is an artefact")],
)
def test_refused_files(write: Write, tmp_path: Path, name: str, message: str) -> None:
    artifact = write(tmp_path / "a")
    before = {path.name for path in tmp_path.rglob("*")}
    with pytest.raises(ArtifactError, match=message):
        write_standalone(artifact, tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == before


def test_code_that_reads_a_weight(
    write: Write, model: onnx.ModelProto, examples: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "artifact", packing={"wide": 4, "unsigned": 3})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(examples[0], names)  # noqa: S102 - the page's code
    weight = names["weight"]
    assert callable(weight)
    for item in model.graph.initializer:
        if item.name in json.loads(Path("artifact/manifest.json").read_text())["tensors"]:
            original = numpy_helper.to_array(item)
            np.testing.assert_array_equal(weight(item.name, signed=original.dtype != np.uint8), original)


@pytest.mark.parametrize("side", [None, 6])
def test_code_that_computes_a_picture(
    write: Write, model: onnx.ModelProto, examples: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int | None
) -> None:
    """A segmenter, and a classifier that takes the mean of its scores."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 17, 3), dtype=np.uint8)).save("photo.png")
    if side is None:
        artifact = write(tmp_path / "artifact")
    else:
        mean = onnx.helper.make_node("GlobalAveragePool", ["map"], ["means"])
        flat = onnx.helper.make_node("Flatten", ["means"], ["scores"])
        model.graph.node[-1].output[0] = "map"
        model.graph.node.extend([mean, flat])
        model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["B", 2]))
        classes = (ClassInfo(name="sea", color=(0, 0, 99)), ClassInfo(name="land", color=(9, 99, 0)))
        signature = Signature(task="classify", channels=3, classes=classes, side=side)
        golden = [(np.zeros((1, 6, 6, 3), np.uint8), np.zeros((1, 2), np.float32))]
        artifact = write(tmp_path / "artifact", signature=signature, golden=golden)
    write_standalone(artifact, "photos.onnx")
    names: dict[str, object] = {}
    exec(examples[1], names)  # noqa: S102 - the page's code
    answer = predict(load(artifact.path, engine="onnxruntime"), read_image("photo.png"))
    np.testing.assert_array_equal(names["labels"], answer if side is None else answer.argmax())
    if side is not None:
        np.testing.assert_allclose(np.asarray(names["scores"])[0], answer, rtol=1e-5)
