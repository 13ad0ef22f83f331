"""Export of PyTorch models with named tensors in and out."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.artifact import Artifact, TensorInfo, open_artifact
from muntin.errors import ExportError
from muntin.runtime.verification.exactness import sums_saturate
from muntin.runtime.verification.layerwise import verify_layers
from product_model import make_encoder, tokens
from products import product

AXES = {"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return make_encoder()


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    """Of the encoder, calibrated."""
    opened = open_artifact(product("tensors") / "artifact")
    assert opened.manifest.named is not None
    return opened


def test_encoder(encoder: nn.Module, artifact: Artifact) -> None:
    signature, measured = artifact.manifest.signature, artifact.manifest.measured
    assert signature.inputs == tuple(TensorInfo(name=name, dtype="int64", shape=("batch", "tokens")) for name in ("ids", "mask"))
    assert [(info.name, info.dtype, info.shape) for info in signature.outputs] == [
        ("embedding", "float32", ("batch", 32)), ("label", "int64", ("batch",)),
    ]  # fmt: skip
    assert signature.batch == "batch" and (measured["integer_coverage"] == 1.0 or sums_saturate())
    assert muntin.verify(artifact.path).passed
    session = muntin.load(artifact.path)
    for batch, length in ((1, 7), (5, 30)):
        inputs = tokens(batch, length, seed=9)
        with torch.no_grad():
            due = encoder(**inputs)["embedding"].numpy()
        found = session({name: tensor.numpy() for name, tensor in inputs.items()})["embedding"]
        cosine = (found * due).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(due, axis=1)
        assert cosine.min() > 0.99


def test_tuple_and_fixed_axes(tmp_path: Path) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.near, self.far = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 1, 1), nn.Linear(16, 2)

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(pixels).relu()
            return self.near(x), self.far(x.mean((2, 3)))

    torch.manual_seed(0)
    inputs = {"pixels": torch.rand(1, 3, 24, 32)}
    artifact = muntin.export(Depth(), inputs, tmp_path / "a")
    assert artifact.manifest.signature.inputs[0].shape == ("batch", 3, 24, 32)
    assert [(info.name, info.shape) for info in artifact.manifest.signature.outputs] == [
        ("output_0", ("batch", 1, 24, 32)), ("output_1", ("batch", 2)),
    ]  # fmt: skip
    assert not artifact.manifest.integers and muntin.verify(artifact.path).passed


class Halves(nn.Module):
    """Computes otherwise by the values of its input, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def test_refusals(encoder: nn.Module, tmp_path: Path) -> None:
    inputs = tokens(2, 6)
    small = nn.Linear(4, 2)
    cases = [
        (encoder, {"ids": inputs["ids"]}, {}, "the model fails on ids int64 (2, 6): TypeError"),
        (encoder, {**inputs, "extra": inputs["ids"]}, {}, "example names extra: the model's forward takes ids, mask"),
        (encoder, inputs, {"axes": {"ids": ("batch", "tokens")}}, "axes names ids, and the inputs are ids, mask"),
        (encoder, inputs, {"axes": {"ids": ("batch",), "mask": ("batch", "tokens")}}, "it has 2 dimensions"),
        (encoder, inputs, {"sizes": "any"}, "give axes"),
        (encoder, {"ids": 3}, {}, "example 'ids' is of type int: give a torch.Tensor"),
        (encoder, inputs, {"calibration": [{"ids": inputs["ids"]}]}, "a calibration batch has no tensor 'mask'"),
        (Halves(), {"x": torch.ones(2, 3)}, {}, "the model cannot be exported for x (batch, fixed)"),
        (nn.Sequential(small), {"input": torch.ones(2, 4)}, {"axes": {"input": ("batch", "batch", "batch")}}, "it has 2 dimensions"),
    ]
    for model, example, arguments, message in cases:
        with pytest.raises(ExportError) as caught:
            muntin.export(model, example, tmp_path / "a", **arguments)  # type: ignore[call-overload]
        assert message in str(caught.value), str(caught.value)
    with pytest.raises(ExportError, match="axes are of named tensors"):
        muntin.export(small, torch.zeros(1, 3, 8, 8), tmp_path / "a", axes=AXES)  # type: ignore[call-overload]
    assert not list(tmp_path.iterdir())


class Gelu(nn.Module):
    """Two Linears with GELU between them, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(nn.functional.gelu(self.first(x + 1)))
        return out


@pytest.mark.usefixtures("dot_products")
def test_zero_points_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Gelu().eval(), torch.randn(4, 9, 32)
    muntin.prepare_qat(model, [{"x": x}], bits=8)
    muntin.freeze(model)
    assert all(0 < int(layer.input.zero_point) < 128 for layer in (model.first, model.second))
    artifact = muntin.export(model, {"x": x}, tmp_path / "a")
    assert all(check.passed for check in verify_layers(artifact, [{"x": x.numpy()}], threads=1))
    with torch.no_grad():
        due = model(x).numpy()
    for engine in ("openvino", "onnxruntime"):
        session = muntin.load(artifact.path, engine=engine, precision="f32")  # type: ignore[arg-type]
        (output,) = session({"x": x.numpy()}).values()
        step = float(model.second.input.scale) * float(model.second.weight.abs().max())
        assert np.abs(output - due).max() < 1.01 * step + 1e-5  # a value between two levels may be rounded either way
        assert np.median(np.abs(output - due)) < 1e-5
        assert [layer.precision for layer in session.layers() if layer.compute] == ["i8", "i8"]


@pytest.mark.parametrize("trained", [False, True])
def test_quantized_in_pytorch(encoder: nn.Module, trained: bool, tmp_path: Path) -> None:
    model, batches = copy.deepcopy(encoder), [tokens(8, 12, seed) for seed in range(4)]
    if trained:
        muntin.low_rank(model, batches, parameters=0.8, multiple=2)
        muntin.prepare_qat(model, batches, bits=4, keep=("classes",))
        muntin.freeze(model, batches)
    else:
        muntin.quantize(model, [tuple(batch.values()) for batch in batches], keep=("classes",))
    artifact = muntin.export(model, tokens(3, 12), tmp_path / "a", axes=AXES)
    layers = {record.name: (record.weight_bits, record.activation_bits) for record in artifact.manifest.layers}
    assert layers["layer.linear1.reduce" if trained else "layer.linear1"] == (4 if trained else 7 if sums_saturate() else 8, 8)
    assert layers["classes"] == (16, None)
    assert "named in keep" in [entry["reason"] for entry in artifact.manifest.passes if entry["layer"] == "classes"]
    assert muntin.verify(artifact.path).passed
    for engine in ("openvino", "onnxruntime"):
        session = muntin.load(artifact.path, engine=engine)  # type: ignore[arg-type]
        for batch, length in ((1, 7), (5, 30)):
            inputs = tokens(batch, length, seed=9)
            with torch.no_grad():
                due = model(**inputs)["embedding"].numpy()
            output = session({name: tensor.numpy() for name, tensor in inputs.items()})["embedding"]
            assert np.abs(output - due).max() < 0.05 * due.std()
