"""Small real models, as an exporter writes them: uint8 (B, H, W, C) in, QDQ convolutions, float32 scores out; and their reference.

`Layer` holds one quantised convolution in plain numpy integers; the same numbers go into the graph and into `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact import Artifact, ClassInfo, GoldenTolerance, LayerRecord, Signature, write_artifact


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution with uint8 inputs (scale, zero point) and symmetric int8 weights (a scale for each output channel)."""

    name: str
    weight: NDArray[np.int8]  # (K, C / groups, k, k)
    weight_scale: NDArray[np.float32]  # (K,)
    bias: NDArray[np.float32]  # (K,)
    scale: np.float32
    zero: int
    groups: int = 1
    relu: bool = True
    quantized: bool = True  # False: the graph holds the same layer in float

    def __call__(self, x_BCHW: NDArray[np.float32]) -> NDArray[np.float64]:
        """Result of integer arithmetic: quantise, multiply and add in int64, scale."""
        quantised = np.clip(np.rint(x_BCHW / self.scale) + self.zero, 0, 255).astype(np.int64) - self.zero
        K, C, k, _ = self.weight.shape
        padded = np.pad(quantised, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
        patches_BCHWkk = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))
        B, _, H, W = quantised.shape
        grouped = patches_BCHWkk.reshape(B, self.groups, C, H, W, k, k)
        weights = self.weight.astype(np.int64).reshape(self.groups, K // self.groups, C, k, k)
        sums = np.einsum("bgchwij,gocij->bgohw", grouped, weights).reshape(B, K, H, W)
        out = sums * (self.weight_scale.astype(np.float64) * self.scale)[:, None, None] + self.bias[:, None, None]
        return np.maximum(out, 0) if self.relu else out

    def nodes(self, x: str) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]], str]:
        n = self.name
        values = {
            f"{n}.scale": np.float32(self.scale),
            f"{n}.zero": np.uint8(self.zero),
            f"{n}.weight": self.weight,
            f"{n}.weight_scale": self.weight_scale,
            f"{n}.weight_zero": np.zeros(len(self.weight), np.int8),
            f"{n}.bias": self.bias,
        }
        pads = [self.weight.shape[2] // 2] * 4
        if not self.quantized:
            weight = self.weight * self.weight_scale[:, None, None, None]
            node = helper.make_node("Conv", [x, f"{n}.weight", f"{n}.bias"], [f"{n}.out"], name=n, pads=pads, group=self.groups)
            return [node], {f"{n}.weight": weight, f"{n}.bias": self.bias}, f"{n}.out"
        nodes = [
            helper.make_node("QuantizeLinear", [x, f"{n}.scale", f"{n}.zero"], [f"{n}.q"], name=f"{n}/quantize"),
            helper.make_node("DequantizeLinear", [f"{n}.q", f"{n}.scale", f"{n}.zero"], [f"{n}.dq"], name=f"{n}/dequantize"),
            helper.make_node(
                "DequantizeLinear",
                [f"{n}.weight", f"{n}.weight_scale", f"{n}.weight_zero"],
                [f"{n}.weight_dq"],
                name=f"{n}/dequantize_weight",
                axis=0,
            ),
            helper.make_node("Conv", [f"{n}.dq", f"{n}.weight_dq", f"{n}.bias"], [f"{n}.out"], name=n, pads=pads, group=self.groups),
        ]
        if self.relu:
            nodes.append(helper.make_node("Relu", [f"{n}.out"], [f"{n}.relu"], name=f"{n}/relu"))
        return nodes, values, f"{n}.relu" if self.relu else f"{n}.out"


def make_layer(
    name: str, seed: int, cin: int, cout: int, k: int, *, scale: float, zero: int = 0, groups: int = 1, relu: bool = True
) -> Layer:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-63, 64, (cout, cin // groups, k, k)).astype(np.int8)  # sums of these are exact without VNNI, too
    gain = 1 / (63 * np.sqrt(cin // groups * k * k))
    return Layer(
        name=name,
        weight=weight,
        weight_scale=(gain * (0.5 + rng.random(cout))).astype(np.float32),
        bias=rng.normal(size=cout).astype(np.float32),
        scale=np.float32(scale),
        zero=zero,
        groups=groups,
        relu=relu,
    )


def reference(layers: Sequence[Layer], images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    x: Any = images_BHWC.astype(np.float32).transpose(0, 3, 1, 2)
    for layer in layers:
        x = layer(x.astype(np.float32))
    return x


def build(layers: Sequence[Layer]) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    values: dict[str, NDArray[Any]] = {}
    x = "x"
    for layer in layers:
        added, held, x = layer.nodes(x)
        nodes += added
        values |= held
    nodes[-1].output[0] = "scores"
    return image_model(nodes, values, layers[0].weight.shape[1] * layers[0].groups, len(layers[-1].weight))


def image_model(nodes: Sequence[onnx.NodeProto], values: dict[str, Any], channels: int, outputs: int, **options: Any) -> onnx.ModelProto:
    """Nodes from "x" (float, (B, channels, H, W)) to "scores" (B, outputs, H, W), after the usual beginning from "images"."""
    first = [
        helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["x"], name="to_nchw", perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(
        [*first, *nodes],
        "images",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", channels])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", outputs, "H", "W"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, ir_version=10, **({"opset_imports": [helper.make_opsetid("", 17)]} | options))
    onnx.checker.check_model(model)
    return model


def random_images(channels: int, batch: int = 2, height: int = 9, width: int = 13, seed: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, channels)).astype(np.uint8)


@dataclass(frozen=True)
class Written:
    """An artefact of these layers; its golden scores are those of the integer reference."""

    path: Path
    artifact: Artifact
    layers: tuple[Layer, ...]

    def reference(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        return reference(self.layers, images_BHWC)


@pytest.fixture(scope="session")
def write_layers() -> Callable[..., Written]:
    def write(path: Path, layers: Sequence[Layer], **changes: Any) -> Written:
        channels, K = layers[0].weight.shape[1] * layers[0].groups, len(layers[-1].weight)
        images = random_images(channels)
        arguments: dict[str, Any] = {
            "model": build(layers),
            "signature": Signature(
                task="segment", channels=channels, classes=tuple(ClassInfo(name=f"class {k}", color=(k, k, k)) for k in range(K))
            ),
            "golden": [(images, reference(layers, images).astype(np.float32))],
            "golden_tolerance": {
                "openvino": {
                    "f32": GoldenTolerance(max_error=0.05, label_agreement=0.97),
                    "bf16": GoldenTolerance(max_error=0.1, label_agreement=0.95),
                },
                "onnxruntime": {"f32": GoldenTolerance(max_error=0.05, label_agreement=0.97)},
            },
            "layers": [
                LayerRecord(name=layer.name, kind="Conv2d", weight_bits=8, activation_bits=8, parameters=layer.weight.size)
                for layer in layers
            ],
        }
        return Written(path, write_artifact(path, **(arguments | changes)), tuple(layers))

    return write


@pytest.fixture(scope="session")
def convolutions(tmp_path_factory: pytest.TempPathFactory, write_layers: Callable[..., Written]) -> Written:
    """3 channels -> 3 x 3 -> 32 -> 3 x 3 -> 32 -> depthwise -> 32 -> 1 x 1 -> 5 classes."""
    layers = [
        make_layer("stem", 0, 3, 32, 3, scale=0.9),
        make_layer("body", 1, 32, 32, 3, scale=1.4),
        make_layer("depthwise", 2, 32, 32, 3, scale=1.1, groups=32),
        make_layer("head", 3, 32, 5, 1, scale=0.8, relu=False),
    ]
    return write_layers(tmp_path_factory.mktemp("artifacts") / "convolutions", layers)


@pytest.fixture(scope="session")
def per_pixel(tmp_path_factory: pytest.TempPathFactory, write_layers: Callable[..., Written]) -> Written:
    """One 1 x 1 convolution, 4 channels -> 6 classes: tiles change nothing."""
    return write_layers(
        tmp_path_factory.mktemp("artifacts") / "per_pixel", [make_layer("pixel", 5, 4, 6, 1, scale=0.9, zero=3, relu=False)]
    )


@pytest.fixture(scope="session")
def layer_maker() -> Callable[..., Layer]:
    return make_layer


@pytest.fixture(scope="session")
def images_of() -> Callable[..., NDArray[np.uint8]]:
    return random_images


@pytest.fixture(scope="session")
def write_graph(write_layers: Callable[..., Written]) -> Callable[..., Written]:
    """`write_graph(path, nodes, values, channels=..., outputs=...)`: an artefact of `image_model`."""

    def write(
        path: Path, nodes: Sequence[onnx.NodeProto], values: dict[str, Any], *, channels: int, outputs: int, **options: Any
    ) -> Written:
        layer = make_layer("only", 0, channels, outputs, 1, scale=1.0)
        return write_layers(path, [layer], model=image_model(nodes, values, channels, outputs, **options))

    return write
