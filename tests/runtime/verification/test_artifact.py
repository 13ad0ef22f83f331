"""Verification: a sound artefact passes in every engine, and each kind of fault is found and named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from image_session import ImageSession
from muntin.artifact import ClassInfo, GoldenTolerance, LayerRecord, Signature, write_artifact
from muntin.errors import ArtifactError
from muntin.runtime import ExecutedLayer, verify
from muntin.runtime.engines.onnxruntime import OnnxRuntimeSession
from muntin.runtime.options import SessionOptions
from muntin.runtime.verification.artifact import find_fallbacks
from muntin.runtime.verification.golden import replay


@pytest.fixture
def pixel(layer_maker: Callable[..., Any]) -> list[Any]:
    return [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_verify_of_a_sound_artefact(convolutions: Any, engine: str) -> None:
    stages: list[str] = []
    result = verify(
        convolutions.path, SessionOptions(engine=engine), evaluate=lambda session: float(session.signature.channels), allow_fallbacks=True,
        progress=stages.append,
    )  # fmt: skip
    assert stages == ["opening", "replaying reference inputs", "evaluating"]
    assert result.problems == ()
    assert result.passed
    assert result.digests["manifest.json"] == convolutions.artifact.digest
    assert (result.engine, result.evaluation) == (engine, 3.0)
    assert len(result.golden) == 1
    assert result.golden[0].max_error < 0.05
    assert result.golden[0].label_agreement is not None
    assert result.golden[0].label_agreement > 0.97


def test_batch_whose_images_depend_on_each_other(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    """A mean over the batch, which a batch of one does not reveal."""
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        onnx.helper.make_node("Add", ["x", "mean"], ["scores"]),
    ]
    opset = {"opset_imports": [onnx.helper.make_opsetid("", 18)]}
    model = write_graph(tmp_path / "b", nodes, {"axes": np.array([0], np.int64)}, channels=3, outputs=3, **opset).artifact.model_bytes()
    images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3)).astype(np.uint8)
    write_artifact(
        tmp_path / "a",
        model=onnx.load_model_from_string(model),
        signature=Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abc")),
        golden=[(images, 2 * images.transpose(0, 3, 1, 2).astype(np.float32))],
        golden_tolerance={"openvino": {"f32": GoldenTolerance(max_error=0.05, label_agreement=0.9)}},
    )
    result = verify(tmp_path / "a", SessionOptions(precision="f32"))
    assert all(golden.passed for golden in result.golden)
    (problem,) = result.problems
    assert problem.startswith("2 rows in a call give other scores than each alone: largest error ")


def test_fallbacks_by_engine(convolutions: Any) -> None:
    result = verify(convolutions.path, SessionOptions(engine="onnxruntime"))
    assert result.fallbacks == ("head",)
    assert result.passed
    strict = verify(convolutions.path, SessionOptions(engine="onnxruntime"), allow_fallbacks=False)
    assert not strict.passed
    assert "layer head, recorded with 8-bit activations, ran as Conv in f32" in strict.problems[0]


def test_verify_without_execution_types(convolutions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT, which needs a GPU."""
    monkeypatch.setattr(OnnxRuntimeSession, "layers", lambda session: [])
    result = verify(convolutions.path, SessionOptions(engine="onnxruntime"))
    assert (result.layers, result.fallbacks, result.problems) == ((), (), ())
    strict = verify(convolutions.path, SessionOptions(engine="onnxruntime"), allow_fallbacks=False)
    assert strict.fallbacks == ()
    assert strict.problems == ("onnxruntime does not say what its layers ran in: export for this engine and CPU, or allow fallbacks",)
    sound, manifest = convolutions.artifact, convolutions.artifact.manifest
    floats = write_artifact(
        tmp_path / "floats", model=onnx.load_model_from_string(sound.model_bytes()), signature=manifest.signature, layers=[],
        golden=list(sound.golden()), golden_tolerance=manifest.golden_tolerance,
    )  # fmt: skip
    assert verify(floats.path, SessionOptions(engine="onnxruntime"), allow_fallbacks=False).problems == ()  # nothing has to run on integers


def test_layer_in_float(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    layers = [layer_maker("pixel", 5, 4, 32, 1, scale=0.9, relu=False)]
    layers[0] = type(layers[0])(**(vars(layers[0]) | {"quantized": False}))
    write_layers(tmp_path / "a", layers, golden_tolerance={"openvino": {"f32": GoldenTolerance(max_error=1e9, label_agreement=0)}})
    result = verify(tmp_path / "a", SessionOptions(precision="f32"))
    assert result.fallbacks == ("pixel",)
    assert not result.passed
    assert "layer pixel" in result.problems[0]
    assert verify(tmp_path / "a", SessionOptions(precision="f32"), allow_fallbacks=True).passed


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_other_numbers_are_found(write_layers: Callable[..., Any], pixel: list[Any], tmp_path: Path, engine: str) -> None:
    good = write_layers(tmp_path / "good", pixel)
    ((images, scores),) = good.artifact.golden_images()
    for name, changed in [("shifted", scores + np.float32(scores.std() * 0.2)), ("swapped", scores[:, ::-1].copy())]:
        write_layers(tmp_path / name, pixel, golden=[(images, changed)])
        result = verify(tmp_path / name, SessionOptions(engine=engine, precision="f32"), allow_fallbacks=True)
        assert not result.passed
        assert not result.golden[0].passed
        assert "golden pair 0" in result.problems[0]
    shifted = verify(tmp_path / "shifted", SessionOptions(engine=engine, precision="f32")).golden[0]
    assert shifted.max_error == pytest.approx(0.2, abs=0.02)  # in standard deviations of the golden scores
    assert shifted.label_agreement == pytest.approx(1, abs=0.02)


def test_small_error_of_a_whole_map(write_layers: Callable[..., Any], pixel: list[Any], tmp_path: Path) -> None:
    ((images, scores),) = write_layers(tmp_path / "good", pixel).artifact.golden_images()
    wide = {"openvino": {"f32": GoldenTolerance(max_error=0.5, label_agreement=0)}}
    for share, passed in ((0.1, True), (0.15, False)):
        write_layers(tmp_path / f"{share}", pixel, golden=[(images, scores + np.float32(scores.std() * share))], golden_tolerance=wide)
        result = verify(tmp_path / f"{share}", SessionOptions(precision="f32"), allow_fallbacks=True)
        assert result.passed == passed and result.golden[0].rms_error == pytest.approx(share, abs=0.02)
        assert passed or ", 0.1" in result.problems[0]
        allowed = "(allowed: 0.5, 0.125 in the mean, 0.00% of the labels)"
        assert passed or result.problems[0].endswith(allowed)  # the bound that does not hold is among those that are told


def test_precision_without_tolerance(write_layers: Callable[..., Any], pixel: list[Any], tmp_path: Path) -> None:
    write_layers(tmp_path / "a", pixel, golden_tolerance={"openvino": {"bf16": GoldenTolerance(max_error=0.1, label_agreement=0.9)}})
    result = verify(tmp_path / "a", SessionOptions(precision="f32"), allow_fallbacks=True)
    assert not result.passed
    assert "no golden tolerance is recorded for openvino in f32 (there is: openvino in bf16)" in result.problems[0]


def test_evaluation_without_a_number(per_pixel: Any) -> None:
    result = verify(per_pixel.path, evaluate=lambda session: float("nan"), allow_fallbacks=True)
    assert not result.passed
    assert "evaluate returned nan" in result.problems[0]


def test_verify_of_an_altered_file(write_layers: Callable[..., Any], pixel: list[Any], tmp_path: Path) -> None:
    write_layers(tmp_path / "a", pixel)
    file = tmp_path / "a" / "model.onnx"
    file.write_bytes(file.read_bytes().replace(b"pixel", b"pixes", 1))
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        verify(tmp_path / "a")


def executed(name: str, precision: str, *, compute: bool = True) -> ExecutedLayer:
    return ExecutedLayer(name=name, kind="MatMul", precision=precision, compute=compute)


def test_fallbacks_are_matched_by_name() -> None:
    records = [
        LayerRecord(name="a", kind="Linear", weight_bits=8, activation_bits=8),
        LayerRecord(name="a.b", kind="Linear", weight_bits=8, activation_bits=8),
        LayerRecord(name="c", kind="Linear", weight_bits=8, activation_bits=8),
        LayerRecord(name="d", kind="Linear", weight_bits=8, activation_bits=None),
        LayerRecord(name="e", kind="Linear", weight_bits=8, activation_bits=8),
    ]
    layers = [
        executed("a", "i8"),
        executed("a.b/first", "i8"),
        executed("a.b/second", "bf16"),
        executed("c", "f32", compute=False),
        executed("d", "f32"),
        executed("e/matmul", "i8"),
    ]
    names, reasons = find_fallbacks(records, layers)
    assert names == ("a.b", "c")
    assert "MatMul in bf16" in reasons[0]
    assert "no node of its name" in reasons[1]


WITHOUT = """
import sys
from muntin.errors import DependencyError
from muntin.runtime import SessionOptions, verify
sys.modules["openvino"] = None  # as if it were not installed
options = SessionOptions(engine="onnxruntime")
assert verify(sys.argv[1], options).passed
try:
    verify(sys.argv[1], options, layers=True)
except DependencyError as error:
    sys.exit(0 if "pip install openvino, or leave it out" in str(error) else 2)
sys.exit(1)
"""


def test_verify_layers_without_openvino(convolutions: Any) -> None:
    assert subprocess.run([sys.executable, "-c", WITHOUT, str(convolutions.path)], check=False).returncode == 0


class Answers(ImageSession):
    """A classifier that gives the scores it was made with."""

    def __init__(self, scores: list[list[float]]) -> None:
        classes = tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abc")
        super().__init__(signature=Signature(task="classify", channels=3, classes=classes), engine="none", precision="f32", threads=1)
        self.given = np.array(scores, np.float32)

    def scores(self, images_BHWC: Any) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "agreement"),
    [([2.0, 2.02, -1.0], 1.0), ([2.02, 2.0, -1.0], 1.0), ([2.0, 1.9, 2.05], 0.0), ([-1.0, 2.0, 2.1], 0.0)],
)
def test_label_of_nearly_equal_classes(given: list[float], agreement: float) -> None:
    """The golden scores say a, b is less than the allowed error below it, and c far."""
    golden = np.array([[2.01, 2.0, -1.0]], np.float32)
    tolerance = GoldenTolerance(max_error=0.05, label_agreement=0.95)
    (result,) = replay(Answers([given]), ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, {"scores": golden}), tolerance)
    assert result.label_agreement == agreement
    assert result.passed == (agreement == 1)
