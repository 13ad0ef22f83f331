"""Kernels that ONNX Runtime executes: names, work, bytes, connections and time stamps of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import IMAGES, PRODUCTS
from muntin.runtime.profiling.onnxruntime_kernels import onnxruntime_kernels

OPTIONS = SessionOptions(threads=1)
H, W = 24, 40


def images(batch: int = 1) -> Any:
    return np.random.default_rng(0).integers(0, 256, (batch, H, W, 3)).astype(np.uint8)


def test_kernels_of_layers(convolutions: Any) -> None:
    execution = onnxruntime_kernels(convolutions.artifact, images(batch=2), OPTIONS, 3)
    computed = {kernel.name: kernel for kernel in execution.kernels if kernel.compute}
    pixels = 2 * H * W
    assert {name: kernel.macs for name, kernel in computed.items()} == {
        "stem": pixels * 3 * 32 * 9, "body": pixels * 32 * 32 * 9, "depthwise": pixels * 32 * 9, "head": pixels * 32 * 5,
    }  # fmt: skip
    assert all(kernel.group == PRODUCTS and kernel.layer == name for name, kernel in computed.items())
    assert {kernel.precision for kernel in computed.values()} <= {"i8", "f32"}
    assert (execution.precision, execution.threads) == ("f32", 1)
    body = computed["body"]
    assert {32 * 32 * 9, 4 * 32 * 32 * 9} & {operand.bytes for operand in body.inputs if operand.source is None or operand.type == "f32"}
    assert body.kind == "QLinearConv"
    for value in (body.inputs[0], body.outputs[0]):  # channels last in memory, logical shapes here
        assert (value.shape, value.layout) == ((2, 32, H, W), "acdb")
    names = {kernel.name for kernel in execution.kernels}
    assert len(names) == len(execution.kernels)
    sources = {operand.source for kernel in execution.kernels for operand in kernel.inputs} - {None}
    assert IMAGES in sources
    assert sources <= names | {IMAGES}
    (first,) = (kernel for kernel in execution.kernels if any(operand.source == IMAGES for operand in kernel.inputs))
    assert sum(operand.bytes for operand in first.inputs if operand.source == IMAGES) == pixels * 3


def test_time_stamps_do_not_overlap(convolutions: Any) -> None:
    """One thread between operations: a kernel begins when the one before it has ended. Medians over rounds may differ by their spread."""
    execution = onnxruntime_kernels(convolutions.artifact, images(), OPTIONS, 1)
    starts = [kernel.start_ms for kernel in execution.kernels]
    assert all(start is not None and start >= 0 for start in starts)
    timed = sorted((kernel.start_ms or 0.0, kernel.ms) for kernel in execution.kernels)
    assert all(start + ms <= following + 1e-6 for (start, ms), (following, _) in pairwise(timed))
    assert sum(kernel.ms for kernel in execution.kernels) <= execution.profiled_ms


def test_node_without_a_name(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    written = write_layers(
        tmp_path / "named", [layer_maker("a", 0, 3, 8, 3, scale=0.9), layer_maker("b", 1, 8, 4, 1, scale=1.0, relu=False)]
    )
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    for node in model.graph.node:
        node.name = ""
    nameless = write_layers(tmp_path / "nameless", written.layers, model=model).artifact
    kernels = onnxruntime_kernels(nameless, images(), OPTIONS, 3).kernels
    assert sum(kernel.macs for kernel in kernels) == H * W * (3 * 8 * 9 + 8 * 4)


def test_precision_without_kernels(convolutions: Any) -> None:
    with pytest.raises(DependencyError, match="no bf16 kernels on CPUs"):
        onnxruntime_kernels(convolutions.artifact, images(), replace(OPTIONS, precision="bf16"), 3)


def test_model_that_cannot_be_opened(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    written = write_layers(tmp_path / "a", [layer_maker("a", 0, 3, 8, 3, scale=0.9)])
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    model.graph.node[0].op_type = "Unheard"
    broken = write_layers(tmp_path / "broken", written.layers, model=model).artifact
    with pytest.raises(ArtifactError, match="cannot open its model") as caught:
        onnxruntime_kernels(broken, images(), OPTIONS, 3)
    assert "\n" not in str(caught.value)


def float_graph() -> tuple[list[onnx.NodeProto], dict[str, Any], dict[str, Any]]:
    """Float convolutions named after the norms that were folded into them, with what ONNX Runtime fuses: activations, a sum of two.

    3 channels -> 12 -> depthwise -> 12 -> 16 -> sum of two products -> 16 -> 3 -> 5 classes.
    """
    rng, node, values = np.random.default_rng(0), helper.make_node, {"low": np.float32(0), "high": np.float32(6)}

    def conv(x: str, y: str, layer: str, channels: int, outputs: int, k: int, groups: int = 1) -> onnx.NodeProto:
        values[f"model.{layer}.weight"] = rng.normal(size=(outputs, channels // groups, k, k)).astype(np.float32)
        values[f"model.{layer}.bias"] = rng.normal(size=outputs).astype(np.float32)
        weights = [f"model.{layer}.weight", f"model.{layer}.bias"]
        return node("Conv", [x, *weights], [y], name=f"{layer}.norm", pads=[k // 2] * 4, group=groups)

    nodes = [
        conv("x", "a", "first", 3, 12, 3),
        node("Relu", ["a"], ["b"], name="relu"),
        conv("b", "c", "depthwise", 12, 12, 3, groups=12),
        node("Clip", ["c", "low", "high"], ["d"], name="relu6"),
        conv("d", "e", "wide", 12, 16, 1),
        conv("d", "f", "shortcut", 12, 16, 1),
        node("Add", ["e", "f"], ["g"], name="add"),
        node("Relu", ["g"], ["h"], name="relu_of_sum"),
        conv("h", "i", "project", 16, 3, 1),
        conv("i", "scores", "head", 3, 5, 1),
    ]
    return nodes, values, {"opset_imports": [helper.make_opsetid("", 17)]}


FLOAT_MACS = {"first": 3 * 12 * 9, "depthwise": 12 * 9, "wide": 12 * 16, "shortcut": 12 * 16, "project": 16 * 3, "head": 3 * 5}


@pytest.fixture
def floating(write_graph: Any, write_layers: Any, layer_maker: Any, tmp_path: Path) -> Any:
    nodes, values, options = float_graph()
    model = write_graph(tmp_path / "graph", nodes, values, channels=3, outputs=5, **options).artifact.model_bytes()
    recorded = [layer_maker(name, 0, 3 if name == "first" else 5, 5, 1, scale=0.9) for name in FLOAT_MACS]
    return write_layers(tmp_path / "float", recorded, model=onnx.load_model_from_string(model)).artifact


def test_float_layers_with_fusions(floating: Any) -> None:
    kernels = onnxruntime_kernels(floating, images(), OPTIONS, 3).kernels
    assert {kernel.layer: kernel.macs for kernel in kernels if kernel.layer} == {name: H * W * macs for name, macs in FLOAT_MACS.items()}
    assert all(kernel.compute and kernel.group == PRODUCTS for kernel in kernels if kernel.layer)


def test_padded_channels(floating: Any) -> None:
    kernels = onnxruntime_kernels(floating, images(), OPTIONS, 3).kernels
    first = next(kernel for kernel in kernels if kernel.layer == "first")
    assert first.implementation == "com.microsoft.nchwc", "the engine did not lay channels out in blocks: this test plants nothing"
    assert (first.inputs[0].shape, first.outputs[0].shape) == ((1, 3, H, W), (1, 12, H, W))
    project = next(kernel for kernel in kernels if kernel.layer == "project")
    assert project.outputs[0].shape == (1, 3, H, W)


def test_nodes_without_names(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    """HardSwish of what is read once more becomes two nodes without a name."""
    written = write_layers(tmp_path / "a", [layer_maker("a", 0, 3, 8, 3, scale=0.9), layer_maker("b", 1, 8, 4, 1, scale=1.0, relu=False)])
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "HardSwish"
    swish = write_layers(tmp_path / "swish", written.layers, model=model).artifact
    kernels = onnxruntime_kernels(swish, images(), OPTIONS, 3).kernels
    assert {"HardSigmoid", "Mul"} <= {kernel.kind for kernel in kernels}, "the engine has a kernel of its own: this test plants nothing"
    sources = {kernel.name: [operand.source for operand in kernel.inputs if operand.source] for kernel in kernels}
    reached, front = set(), ["b"]
    while front:
        reached.add(front[-1])
        front += [source for source in sources.get(front.pop(), []) if source not in reached]
    assert {"a", IMAGES} <= reached


def test_images_of_a_size_the_model_refuses(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    written = write_layers(tmp_path / "a", [layer_maker("a", 0, 3, 8, 3, scale=0.9)])
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    del conv.attribute[[attribute.name for attribute in conv.attribute].index("pads")]
    strict = write_layers(tmp_path / "strict", written.layers, model=model).artifact
    with pytest.raises(ArtifactError, match=r"cannot run it on images of shape \(1, 2, 2, 3\)") as caught:
        onnxruntime_kernels(strict, images()[:, :2, :2].copy(), OPTIONS, 3)
    assert "\n" not in str(caught.value)
