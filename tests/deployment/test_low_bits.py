"""Weights of fewer than 8 bits in an artefact: what is stored, what is recorded, what runs. Axes: B images, C channels, H W map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import muntin
from muntin import create_model
from muntin.artifact import Artifact
from muntin.compression import QuantizedConv2d, QuantizedLinear, freeze, prepare_qat, set_bits
from muntin.compression.quantization.qat import FLOAT
from muntin.deployment.counting import stored_bytes
from muntin.layers import Attention, GlobalAttention
from muntin.runtime.options import SessionOptions

LAYERS = ("stem", "depthwise", "body", "expand", "head")
MIXED = {"depthwise": 8, "body": 2, "expand": FLOAT}


def network(build: type[nn.Module]) -> nn.Module:
    """A convolution, a depthwise one, one of odd length (its last byte is not full), and two Linears."""

    def run(m: Any, x: Tensor) -> Any:
        y = torch.relu(m.depthwise(torch.relu(m.stem(x / 255))))
        y = torch.relu(m.body(y)).permute(0, 2, 3, 1)
        return m.head(torch.relu(m.expand(y))).permute(0, 3, 1, 2)

    return build(
        run,
        stem=nn.Conv2d(3, 32, 3, padding=1),
        depthwise=nn.Conv2d(32, 32, 3, padding=1, groups=32),
        body=nn.Conv2d(32, 33, 3, padding=1),
        expand=nn.Linear(33, 65),
        head=nn.Linear(65, 5),
    )


class Deployed:
    """A network in integers of so many bits, and its artefact."""

    def __init__(
        self, model: nn.Module, example: Tensor, path: Path, *, bits: int, widths: dict[str, int] | None = None, sizes: Any = None
    ) -> None:
        changes = prepare_qat(model, [example], bits=bits)
        set_bits(model, widths or {})
        changes += freeze(model, [example])
        self.model = model
        self.artifact: Artifact = muntin.export(model, example, path, changes=changes, sizes=sizes)

    @property
    def records(self) -> dict[str, Any]:
        return {record.name: record for record in self.artifact.manifest.layers}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, build: type[nn.Module], pixels: Callable[..., Tensor]) -> dict[str, Deployed]:
    """The same network in two widths."""
    root, made = tmp_path_factory.mktemp("bits"), {}
    for name, widths in (("w4", None), ("mixed", MIXED)):
        torch.manual_seed(0)
        made[name] = Deployed(network(build).eval(), pixels(2, 3, 48, 64), root / name, bits=4, widths=widths, sizes="any")
    return made


def integers(model: nn.Module) -> dict[str, QuantizedConv2d | QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedConv2d | QuantizedLinear)}


def stored(artifact: Artifact, like: Tensor) -> Any:
    """How the initializer of a shape that no other has is stored."""
    shape = tuple(like.shape)
    found = [record for record in artifact.manifest.tensors.values() if record.shape == shape and record.packing == "int"]
    assert len(found) == 1
    return found[0]


def test_stored_size_of_4_bits(deployed: dict[str, Deployed]) -> None:
    low = deployed["w4"]
    layers = integers(low.model)
    assert list(layers) == list(LAYERS)
    for layer in layers.values():
        assert layer.bits == 4 and layer.integers.dtype == torch.int8 and 3 < int(layer.integers.abs().max()) <= 7
        assert stored(low.artifact, layer.integers).bits == 4
    data = load_file(low.artifact.path / "weights.safetensors")
    packed = sorted(array.size for name, array in data.items() if low.artifact.manifest.tensors[name].packing == "int")
    assert packed == sorted((layer.integers.numel() + 1) // 2 for layer in layers.values())  # bytes


@pytest.mark.usefixtures("dot_products")
def test_layer_records_of_low_bits(deployed: dict[str, Deployed]) -> None:
    assert {name: (r.weight_bits, r.activation_bits) for name, r in deployed["w4"].records.items()} == dict.fromkeys(LAYERS, (4, 8))
    assert {name: (r.weight_bits, r.activation_bits) for name, r in deployed["mixed"].records.items()} == {
        "stem": (4, 8), "depthwise": (8, 8), "body": (2, 8), "expand": (16, None), "head": (4, 8),
    }  # fmt: skip
    assert deployed["mixed"].records["expand"].note == "16 bits, as assigned"
    passes = {entry["layer"]: entry["done"] for entry in deployed["mixed"].artifact.manifest.passes if entry["pass"] == "quantize"}
    assert passes == {"stem": "W4A8", "depthwise": "W8A8", "body": "W2A8", "expand": "kept", "head": "W4A8"}


@pytest.mark.usefixtures("dot_products")
def test_stored_mixed_widths(deployed: dict[str, Deployed]) -> None:
    mixed = deployed["mixed"]
    bits = {name: stored(mixed.artifact, layer.integers).bits for name, layer in integers(mixed.model).items()}
    assert bits == {"stem": 4, "depthwise": 8, "body": 2, "head": 4}
    halves = [record for record in mixed.artifact.manifest.tensors.values() if record.packing == "f16"]
    assert any(record.shape in ((33, 65), (65, 33)) for record in halves)


@pytest.mark.usefixtures("dot_products")
def test_artefact_size_by_bits(deployed: dict[str, Deployed]) -> None:
    low, mixed = deployed["w4"], deployed["mixed"]
    bits = {"depthwise": 8, "body": 2, "expand": 16}  # the others have 4 in both
    weights = {name: layer.integers.numel() for name, layer in integers(low.model).items()}
    more = sum((weights[name] * width + 7) // 8 - (weights[name] + 1) // 2 for name, width in bits.items())
    sizes = [(made.artifact.path / "weights.safetensors").stat().st_size for made in (low, mixed)]
    assert sizes[1] - sizes[0] == pytest.approx(more, abs=600)  # what a file's header says may differ in length
    assert sizes[0] < 0.9 * sum(weights.values())  # with scales, biases and the header still less than 8 bits without them
    for made in (low, mixed):
        assert stored_bytes(made.model) < made.artifact.bytes
    assert stored_bytes(mixed.model) - stored_bytes(low.model) == more - 4 * 65  # a layer of floats has no scale for each channel


@pytest.mark.usefixtures("dot_products")
def test_execution_of_low_bits(deployed: dict[str, Deployed]) -> None:
    for made in (deployed["w4"], deployed["mixed"]):
        session = muntin.load(made.artifact.path, precision="f32", threads=1)
        executed = {layer.name: layer.precision for layer in session.layers() if layer.compute}
        assert executed == {name: "i8" if record.activation_bits else "f32" for name, record in made.records.items()}
        result = muntin.verify(made.artifact.path, SessionOptions(threads=1), layers=True)
        assert result.passed, result.problems
        assert len(result.checks) == len(integers(made.model))


@pytest.mark.usefixtures("dot_products")
@pytest.mark.parametrize("name", ["w4", "mixed"])
def test_scores_of_the_frozen_model(deployed: dict[str, Deployed], name: str, pictures: Any) -> None:
    made = deployed[name]
    session = muntin.load(made.artifact.path, precision="f32", threads=1)
    images = pictures(2, 41, 60, 3)
    expected = muntin.TorchSession(made.model, made.artifact.manifest.signature)(images)
    error = np.abs(session(images) - expected)
    step = (expected.max() - expected.min()) / 255  # of an 8-bit grid over the scores
    assert error.max() <= step and error.mean() <= step / 20


@pytest.mark.parametrize("name", ["w4", "mixed"])
def test_standalone_of_low_bits(deployed: dict[str, Deployed], name: str, plain_scores: Any, tmp_path: Path) -> None:
    artifact = deployed[name].artifact
    file = muntin.write_standalone(artifact, tmp_path / "plain.onnx")
    session = muntin.load(artifact.path, engine="onnxruntime", threads=1)
    for images, scores in artifact.golden_images():
        plain = plain_scores(file, images)
        np.testing.assert_array_equal(plain, session(images))
        assert (plain.argmax(1) == scores.argmax(1)).mean() > 0.99
    integers = {item.data_type for item in onnx.load(file).graph.initializer if len(item.dims) == 4}
    assert integers == {onnx.TensorProto.INT8}


@pytest.mark.usefixtures("dot_products")
def test_attention_in_8_bits(trained: Any, pixels: Any, tmp_path: Path) -> None:
    options = {"depths": (1,), "dims": (64,), "head_dim": 32, "stem": (16, 16, 32), "latents": 8, "decoder": 16}
    model, example = trained(create_model("hybrid-xs", classes=4, options=options)), pixels(2, 3, 48, 48)
    made = Deployed(model, example, tmp_path / "artifact", bits=4, sizes="fixed")
    attention = "stages.0.blocks.0.attention"
    kinds = {name: record.kind for name, record in made.records.items() if record.kind in ("Product", "SoftmaxProduct")}
    assert kinds == {
        f"{attention}.local.scores": "Product",
        f"{attention}.local.values": "SoftmaxProduct",
        f"{attention}.latent.read": "SoftmaxProduct",
        f"{attention}.latent.write": "SoftmaxProduct",
    }
    for name in kinds:
        record = made.records[name]
        assert (record.weight_bits, record.activation_bits, record.parameters) == (8, 8, 0) and record.macs and record.macs > 0
    assert {record.weight_bits for name, record in made.records.items() if name not in kinds} == {4}
    result = muntin.verify(made.artifact.path, SessionOptions(threads=1), layers=True)
    assert result.passed, result.problems
    assert set(kinds) <= {check.name for check in result.checks}


class _Seeing(nn.Module):
    """Attention over every pixel."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.patch, self.attention, self.head = nn.Conv2d(3, 64, 1), attention, nn.Conv2d(64, 4, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BHWC: Tensor = self.attention(self.patch(x_BCHW / 60 - 2).permute(0, 2, 3, 1))
        scores: Tensor = self.head(y_BHWC.permute(0, 3, 1, 2))
        return scores


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, pixels: Callable[..., Tensor]) -> Deployed:
    torch.manual_seed(0)
    model = _Seeing(GlobalAttention(64, heads=2, latents=8)).eval()
    return Deployed(model, pixels(2, 3, 64, 40), tmp_path_factory.mktemp("seeing") / "artifact", bits=8, sizes="any")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("value", [0, 255])
def test_attention_of_a_uniform_image(seeing: Deployed, engine: str, value: int) -> None:
    """Each token has the same share, the largest there is, of the same value, and 255 · 127 · 262,144 needs 34 bits."""
    session = muntin.load(seeing.artifact.path, engine=engine, precision="f32", threads=1)
    few, many = (session(np.full((1, side, side + 24, 3), value, np.uint8))[0, :, 0, 0] for side in (16, 500))
    np.testing.assert_allclose(many, few, atol=1e-3)
    assert np.abs(few).max() > 0.1


@pytest.mark.usefixtures("dot_products")
def test_attention_sums_on_integers(seeing: Deployed) -> None:
    session = muntin.load(seeing.artifact.path, precision="f32", threads=1)
    session(np.zeros((1, 72, 56, 3), np.uint8))
    executed = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    read = next(name for name in executed if name.endswith(".read"))
    assert executed[read] == "i8", executed


@pytest.mark.usefixtures("dot_products")
def test_dynamic_session_of_global_attention(seeing: Deployed, pictures: Any) -> None:
    """But for values that lie half-way between two levels."""
    images = pictures(2, 70, 50, 3)
    scores, found = (muntin.load(seeing.artifact.path, precision="f32", threads=1, dynamic=free)(images) for free in (False, True))
    assert np.abs(found - scores).max() <= 0.05 * scores.std()
    assert np.abs(found - scores).mean() <= 0.005 * scores.std()
