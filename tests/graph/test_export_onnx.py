"""From ONNX files of any kind to verified artefacts: signatures, golden pairs, and what engines compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import muntin
from muntin.artifact import Artifact
from muntin.errors import ExportError
from muntin.graph.artifacts import export as export_module
from muntin.graph.artifacts.engine_check import FallbackError
from muntin.graph.float_run import FloatRun
from muntin.runtime import SessionOptions
from muntin.training.config import QuantizationConfig
from tensor_models import Array, model, normal, text_inputs, two_heads


class Encoder(nn.Module):
    """A text encoder: logits, a normalised vector and a label of token ids and a mask of padding."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(100, size), nn.Embedding(64, size)
        block = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, batch_first=True, activation="gelu")
        self.blocks = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        self.head, self.projection = nn.Linear(size, 5), nn.Linear(size, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = self.blocks(x, src_key_padding_mask=attention_mask == 0)
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1)
        logits = self.head(mean)
        return logits, nn.functional.normalize(self.projection(mean), dim=-1), logits.argmax(1)


def sentences(batch: int, tokens: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    mask = (np.arange(tokens) < random.integers(tokens // 2, tokens + 1, (batch, 1))).astype(np.int64)
    return {"input_ids": random.integers(1, 100, (batch, tokens)) * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, onnx.ModelProto]:
    torch.manual_seed(0)
    net = Encoder().eval()
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=64)}
    example = {name: torch.from_numpy(value) for name, value in sentences(2, 12).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter
        program = torch.onnx.export(
            net, tuple(example.values()), dynamo=True, verbose=False, opset_version=20, input_names=list(example),
            output_names=["logits", "vector", "label"], dynamic_shapes=dict.fromkeys(example, free),
        )  # fmt: skip
    assert program is not None
    return net, program.model_proto


def verified(artifact: Artifact) -> None:
    for engine in ("openvino", "onnxruntime"):
        result = muntin.verify(artifact.path, SessionOptions(engine=engine), layers=engine == "openvino")
        assert result.passed, result.problems
        assert all(check.error == 0 for check in result.checks)


@pytest.mark.usefixtures("dot_products")
def test_text_encoder_in_integers(encoder: tuple[nn.Module, onnx.ModelProto], tmp_path: Path) -> None:
    net, proto = encoder
    artifact = muntin.export_onnx(proto, tmp_path / "artifact", calibration=[sentences(4, 16, seed) for seed in range(6)])
    manifest = artifact.manifest
    assert manifest.signature.text == (
        "input_ids int64 (batch, tokens), attention_mask int64 (batch, tokens) -> "
        "logits float32 (batch, 5), vector float32 (batch, 16), label int64 (batch)"
    )
    assert (manifest.signature.batch, manifest.example) == ("batch", {"batch": 1, "tokens": 16})
    assert [inputs["input_ids"].shape for inputs, _ in artifact.golden()] == [(3, 16), (2, 11)]
    assert manifest.measured["integer_coverage"] == 1
    assert all(layer.activation_bits == 8 and layer.macs for layer in manifest.layers)
    assert {layer.kind for layer in manifest.layers} == {"MatMul"}
    rounding = manifest.measured["rounding"]
    assert isinstance(rounding, dict)
    assert 0 < rounding["vector"]["rms_error"] < 0.15
    assert artifact.bytes < len(proto.SerializeToString()) / 2.5
    verified(artifact)
    inputs = sentences(5, 23, seed=9)
    with torch.no_grad():
        expected = net(*(torch.from_numpy(value) for value in inputs.values()))
    answer = muntin.load(artifact.path)(inputs)
    cosines = (answer["vector"] * expected[1].numpy()).sum(1)
    assert cosines.min() > 0.98
    assert np.array_equal(answer["label"], answer["logits"].argmax(1))


def test_two_heads_in_floats(tmp_path: Path) -> None:
    onnx.save(two_heads(), tmp_path / "model.onnx")
    artifact = muntin.export_onnx(tmp_path / "model.onnx", tmp_path / "artifact", example=text_inputs(1, 7), dims={"batch": 4, "tokens": 9})
    assert artifact.manifest.signature.batch == "batch"
    assert artifact.manifest.example == {"batch": 4, "tokens": 9}
    assert artifact.manifest.measured["integer_coverage"] == 0
    assert [(layer.name, layer.activation_bits, layer.macs) for layer in artifact.manifest.layers] == [
        ("hidden", None, 512),
        ("embedding", None, 768),
    ]
    (inputs, _), _ = artifact.golden()
    assert inputs["ids"].shape == (3, 7)  # the only row, three times
    verified(artifact)


def image_map() -> onnx.ModelProto:
    """A map of an image whose sides are even: down, up, and a sum with the image's own sides."""
    return model(
        """(float[?, 4, H, W] image) => (float[?, 8, H, W] map, float[?, ?] mean) {
            wide = Conv<pads = [1, 1, 1, 1]>(image, first)
            down = Conv<strides = [2, 2], pads = [0, 0, 0, 0]>(wide, second)
            active = Relu(down)
            up = ConvTranspose<strides = [2, 2]>(active, third)
            map = Add(wide, up)
            axes = Constant<value_ints = [2, 3]>()
            mean = ReduceMean<keepdims = 0>(map, axes)
        }""".replace("?", "N"),
        first=normal(8, 4, 3, 3) / 4,
        second=normal(16, 8, 2, 2, seed=1) / 4,
        third=normal(16, 8, 2, 2, seed=2) / 4,
    )


def unnamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.ClearField("dim_param")
    return proto


@pytest.mark.usefixtures("dot_products")
def test_map_of_even_sides_and_unnamed_dimensions(tmp_path: Path) -> None:
    batches = [normal(2, 4, 24, 32, seed=seed) for seed in range(4)]
    artifact = muntin.export_onnx(unnamed(image_map()), tmp_path / "artifact", calibration=batches)
    assert artifact.manifest.signature.text == (
        "image float32 (batch, 4, image_2, image_3) -> map float32 (batch, 8, image_2, image_3), mean float32 (batch, 8)"
    )
    assert [inputs["image"].shape for inputs, _ in artifact.golden()] == [(3, 4, 24, 32), (2, 4, 12, 16)]  # odd sides fail
    assert artifact.manifest.measured["notes"] == []
    verified(artifact)
    assert muntin.load(artifact.path, dynamic=True)(normal(1, 4, 6, 10))["map"].shape == (1, 8, 6, 10)


@pytest.mark.parametrize("named", [True, False])
def test_dimension_that_equals_the_batch_by_chance(tmp_path: Path, named: bool) -> None:
    proto = model("(float[N, 4, H, W] image) => (float[N, 8, P, Q] map) { map = Conv<strides = [8, 8]>(image, w) }", w=normal(8, 4, 1, 1))
    artifact = muntin.export_onnx(proto if named else unnamed(proto), tmp_path / "artifact", example=normal(3, 4, 24, 80))
    assert [outputs["map"].shape for _, outputs in artifact.golden()] == [(3, 8, 3, 10), (2, 8, 2, 7)]
    assert artifact.manifest.signature.outputs[0].shape == (("N", 8, "P", "Q") if named else ("batch", 8, "map_2", "map_3"))
    verified(artifact)


def test_rows_that_depend_on_each_other(tmp_path: Path) -> None:
    points = model("(float[points, 8] x) => (float[points, 4] y) { s = Softmax<axis = 0>(x)\n y = MatMul(s, w) }", w=normal(8, 4))
    artifact = muntin.export_onnx(points, tmp_path / "artifact", example=normal(6, 8))
    assert artifact.manifest.signature.text == "x float32 (points, 8) -> y float32 (points, 4)"
    assert artifact.manifest.signature.batch is None
    assert artifact.manifest.example == {"points": 6}
    verified(artifact)


def test_dimensions_of_one_name_and_two_sizes(tmp_path: Path) -> None:
    proto = model(
        """(float[N, 8] x, float[N, N] other) => (float[N, N] y, float[N, M] cut) {
            y = MatMul(x, w)
            s = ReduceSum<keepdims = 0>(other)
            c = Mul(x, s)
            from = Constant<value_ints = [1]>()
            to = Constant<value_ints = [99]>()
            cut = Slice(c, from, to, from)
        }""",
        w=normal(8, 4),
    )
    artifact = muntin.export_onnx(proto, tmp_path / "artifact", example={"x": normal(5, 8), "other": normal(3, 2)})
    assert artifact.manifest.signature.text == (
        "x float32 (N, 8), other float32 (other_0, other_1) -> y float32 (N, 4), cut float32 (N, 7)"
    )
    verified(artifact)


def test_operator_that_openvino_lacks(tmp_path: Path) -> None:
    proto = model("(float[B, 3, 3] x) => (float[B] y) { y = Det(x) }")
    artifact = muntin.export_onnx(proto, tmp_path / "artifact", example=normal(4, 3, 3))
    assert list(artifact.manifest.golden_tolerance) == ["onnxruntime"]
    (note,) = artifact.manifest.measured["notes"]  # type: ignore[misc]
    assert str(note).startswith('to be opened with engine="onnxruntime": OpenVINO')
    assert muntin.verify(artifact.path, SessionOptions(engine="onnxruntime")).passed


@pytest.mark.usefixtures("dot_products")
def test_products_that_fall_back_stay_in_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export_module.write_checked

    def fall_back_once(path: Path, content: dict[str, Any], notes: list[str], *rest: Any) -> Artifact:
        if all(layer.activation_bits for layer in content["layers"]):
            raise FallbackError({"hidden": "it ran in f32"})
        return write(path, content, notes, *rest)

    monkeypatch.setattr(export_module, "write_checked", fall_back_once)
    artifact = muntin.export_onnx(two_heads(), tmp_path / "artifact", calibration=[text_inputs(4, 9, seed) for seed in range(3)])
    assert [(layer.name, layer.activation_bits, layer.weight_bits) for layer in artifact.manifest.layers] == [
        ("hidden", None, 16),
        ("embedding", 8, 8),
    ]
    assert artifact.manifest.layers[0].note == "it ran in f32"
    verified(artifact)


@pytest.mark.parametrize(
    ("proto", "options", "words"),
    [
        (two_heads, {}, "no inputs: give calibration"),
        (two_heads, {"calibration": []}, "calibration is empty"),
        (two_heads, {"example": text_inputs(1, 2), "keep": ["hidden"]}, "keep names hidden, and without calibration"),
        (two_heads, {"example": {"ids": np.zeros((1, 2), np.int64)}}, "example names ids, and the model takes ids, mask"),
        (two_heads, {"example": text_inputs(1, 2), "dims": {"batch": 1}}, "dims with sizes of batch: give one of each"),
        (lambda: model("(string[N] x) => (string[N] y) { y = Identity(x) }"), {"example": np.array(["a"], object)}, "STRING"),
        (lambda: model("(float[N] x) => (float[N] y) { y = Log(x) }"), {"example": -np.ones(3, np.float32)}, "'y' holds NaN or infinity"),
        (lambda: model("(float[N] x) => (float[N] y) { y = RandomNormalLike(x) }"), {"example": np.ones(9, np.float32)}, "random numbers"),
        (lambda: model("(float[N] x) => (bfloat16[N] y) { y = Cast<to = 16>(x) }"), {"example": np.ones(3, np.float32)}, "'y' is BFLOAT16"),
    ],
)  # fmt: skip
def test_models_and_inputs_that_are_refused(
    proto: Callable[[], onnx.ModelProto], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=words):
        muntin.export_onnx(proto(), tmp_path / "artifact", **options)
    assert not (tmp_path / "artifact").exists()


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank=st.integers(0, 3), rows=st.integers(1, 4), sides=st.lists(st.integers(1, 6), min_size=3, max_size=3), free=st.booleans())
def test_signatures_of_random_shapes(tmp_path: Path, rank: int, rows: int, sides: list[int], free: bool) -> None:
    names = ["N", *"ABC"[:rank]]
    shape = [rows, *sides[:rank]]
    declared = ", ".join(names if free else map(str, shape))
    nodes = "f = Cast<to = 1>(n)\n y = Mul(x, f)\n size = Shape(x)"
    proto = model(f"(float[{declared}] x, int32 n) => (float[{declared}] y, int64[{rank + 1}] size) {{ {nodes} }}")
    inputs = {"x": np.ones(shape, np.float32), "n": np.array(3, np.int32)}
    artifact = muntin.export_onnx(proto, tmp_path / "artifact", example=inputs)
    dims = tuple(names if free else shape)
    assert [info.shape for info in artifact.manifest.signature.outputs] == [dims, (rank + 1,)]
    answer = muntin.load(artifact.path, cache=False)(inputs)
    assert np.array_equal(answer["y"], 3 * inputs["x"])
    assert answer["size"].tolist() == shape
    assert np.array_equal(FloatRun(proto)(inputs)["y"], answer["y"])


def test_export_takes_onnx_files(tmp_path: Path, encoder: tuple[nn.Module, onnx.ModelProto]) -> None:
    onnx.save(encoder[1], tmp_path / "encoder.onnx")
    batches = [sentences(4, 12, seed) for seed in range(2)]
    same = muntin.export_onnx(tmp_path / "encoder.onnx", tmp_path / "same", calibration=batches)
    artifact = muntin.export(str(tmp_path / "encoder.onnx"), path=tmp_path / "artifact", calibration=batches)
    assert artifact.model_bytes() == same.model_bytes()
    quantization = QuantizationConfig(keep=[same.manifest.layers[0].name])
    kept = muntin.export(encoder[1], path=tmp_path / "kept", calibration=batches, quantization=quantization)
    assert kept.manifest.layers[0].note == "named in keep"
