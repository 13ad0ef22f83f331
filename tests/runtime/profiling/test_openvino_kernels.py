"""Kernels that OpenVINO executes: names, work, bytes and connections of its kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from muntin.errors import ArtifactError, DependencyError
from muntin.runtime import load
from muntin.runtime.engines.openvino.compiled import capabilities
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import CONVERT, COPIES, IMAGES, PRODUCTS
from muntin.runtime.profiling.openvino_kernels import openvino_kernels

CAPABILITIES = capabilities(openvino.Core())
OPTIONS = SessionOptions(precision="f32", threads=1)
H, W = 24, 40


def images(channels: int, batch: int = 1) -> Any:
    return np.random.default_rng(0).integers(0, 256, (batch, H, W, channels)).astype(np.uint8)


@pytest.mark.usefixtures("dot_products")
def test_kernels_of_layers(convolutions: Any) -> None:
    execution = openvino_kernels(convolutions.artifact, images(3, batch=2), OPTIONS, 3)
    computed = {kernel.name: kernel for kernel in execution.kernels if kernel.compute}
    pixels = 2 * H * W
    assert {name: kernel.macs for name, kernel in computed.items()} == {
        "stem": pixels * 3 * 32 * 9, "body": pixels * 32 * 32 * 9, "depthwise": pixels * 32 * 9, "head": pixels * 32 * 5,
    }  # fmt: skip
    assert all(kernel.precision == "i8" and kernel.group == PRODUCTS and kernel.layer == name for name, kernel in computed.items())
    assert all(kernel.implementation for kernel in computed.values())
    body = computed["body"]
    assert (body.inputs[0].type, body.inputs[0].shape, body.inputs[0].bytes) == ("u8", (2, 32, H, W), 32 * pixels)
    assert body.inputs[0].layout
    assert body.inputs[1].bytes == 32 * 32 * 9
    assert body.bytes == sum(operand.bytes for operand in (*body.inputs, *body.outputs))
    assert (execution.precision, execution.threads) == ("f32", 1)
    assert execution.profiled_ms > 0


def test_sources_of_kernels(convolutions: Any) -> None:
    execution = openvino_kernels(convolutions.artifact, images(3), OPTIONS, 3)
    names = [kernel.name for kernel in execution.kernels]
    assert len(set(names)) == len(names)
    sources = {kernel.name: [operand.source for operand in kernel.inputs if operand.source] for kernel in execution.kernels}
    assert all(source == IMAGES or source in names[: names.index(name)] for name, read in sources.items() for source in read)
    reached, front = set(), ["head"]
    while front:
        name = front.pop()
        reached.add(name)
        front += [source for source in sources.get(name, []) if source not in reached]
    assert {"stem", "body", "depthwise", IMAGES} <= reached


def attention(rng: np.random.Generator) -> tuple[list[Any], dict[str, Any]]:
    """Scores and values over the H x W tokens of 4 channels: two products of which neither operand is a constant."""
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["k"], name="flatten"),  # (B, 4, HW)
        helper.make_node("Transpose", ["k"], ["q"], name="tokens", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "k"], ["logits"], name="attention.scores"),
        helper.make_node("Softmax", ["logits"], ["weights"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "q"], ["mixed"], name="attention.values"),
        helper.make_node("Transpose", ["mixed"], ["back"], name="channels", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["back", "map"], ["image"], name="unflatten"),
        helper.make_node("Conv", ["image", "w"], ["scores"], name="head"),
    ]
    weight = rng.normal(size=(5, 4, 1, 1)).astype(np.float32)
    return nodes, {"flat": np.array([0, 4, -1]), "map": np.array([0, 4, H, W]), "w": weight}


def test_macs_of_attention(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    nodes, values = attention(np.random.default_rng(1))
    artifact = write_graph(tmp_path / "a", nodes, values, channels=4, outputs=5).artifact
    execution = openvino_kernels(artifact, images(4), OPTIONS, 3)
    tokens = H * W
    assert sum(kernel.macs for kernel in execution.kernels) == 2 * tokens * tokens * 4 + tokens * 4 * 5
    assert all(kernel.compute for kernel in execution.kernels if kernel.macs)


def normalised(path: Path, write_graph: Any, write_layers: Any, layer_maker: Any) -> Any:
    """Float convolutions, one of them depthwise, named after the norms that were folded into them."""
    rng = np.random.default_rng(4)
    nodes = [
        helper.make_node("Conv", ["x", "model.a.0.weight"], ["a"], name="a.1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "model.b.0.weight"], ["c"], name="b.1", pads=[1] * 4, group=16),
        helper.make_node("Conv", ["c", "model.head.weight"], ["scores"], name="head"),
    ]
    shapes = {"model.a.0.weight": (16, 4, 3, 3), "model.b.0.weight": (16, 1, 3, 3), "model.head.weight": (5, 16, 1, 1)}
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    model = onnx.load_model_from_string(write_graph(path / "plain", nodes, values, channels=4, outputs=5).artifact.model_bytes())
    recorded = [layer_maker(name, 0, channels, 5, 1, scale=1.0) for name, channels in (("a.0", 4), ("b.0", 5), ("head", 5))]
    return write_layers(path / "recorded", recorded, model=model).artifact


def test_layers_named_by_folded_norms(
    write_graph: Callable[..., Any], write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    kernels = openvino_kernels(normalised(tmp_path, write_graph, write_layers, layer_maker), images(4), OPTIONS, 3).kernels
    assert {kernel.name: kernel.layer for kernel in kernels if kernel.compute} == {"a.1": "a.0", "b.1": "b.0", "head": "head"}


@pytest.mark.skipif("BF16" not in CAPABILITIES, reason="this CPU has no BF16")
def test_bytes_of_16_bit_weights(
    write_graph: Callable[..., Any], write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path
) -> None:
    artifact = normalised(tmp_path, write_graph, write_layers, layer_maker)
    execution = openvino_kernels(artifact, images(4), replace(OPTIONS, precision="bf16"), 3)
    sizes = {kernel.layer: (kernel.precision, kernel.inputs[1].bytes) for kernel in execution.kernels if kernel.layer}
    assert sizes["b.0"] == ("bf16", 2 * 16 * 9)
    assert sizes["head"] == ("bf16", 2 * 16 * 5)


def test_transposed_convolution(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    nodes = [
        helper.make_node("Conv", ["x", "down"], ["small"], name="down", strides=[2, 2]),
        helper.make_node("ConvTranspose", ["small", "up"], ["scores"], name="up", strides=[2, 2]),
    ]
    values = {"down": rng.normal(size=(8, 4, 2, 2)).astype(np.float32), "up": rng.normal(size=(8, 5, 2, 2)).astype(np.float32)}
    artifact = write_graph(tmp_path / "a", nodes, values, channels=4, outputs=5).artifact
    macs = {kernel.name: kernel.macs for kernel in openvino_kernels(artifact, images(4), OPTIONS, 3).kernels if kernel.compute}
    quarter = H * W // 4
    assert macs == {"down": quarter * 8 * 4 * 4, "up": quarter * 8 * 5 * 4}


def test_profile_of_the_rewritten_ending(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    nodes = [
        helper.make_node("Conv", ["x", "down"], ["small"], name="down", strides=[2, 2]),
        helper.make_node("Conv", ["small", "wide"], ["channels"], name="head"),
        helper.make_node("DepthToSpace", ["channels"], ["scores"], name="pixels", blocksize=2, mode="CRD"),
    ]
    values = {"down": rng.normal(size=(8, 4, 2, 2)).astype(np.float32), "wide": rng.normal(size=(20, 8, 1, 1)).astype(np.float32)}
    artifact = write_graph(tmp_path / "a", nodes, values, channels=4, outputs=5).artifact
    execution = openvino_kernels(artifact, images(4), OPTIONS, 3)
    session = load(artifact.path, precision="f32", threads=1, cache=False)
    session(images(4))
    profiled, deployed = (Counter(one.kind for one in all_) for all_ in (execution.kernels, session.layers()))
    assert profiled.pop("Reorder") <= deployed.pop("Reorder")  # weights are brought into order once
    assert profiled == {kind: count for kind, count in deployed.items() if kind != "Reshape"}  # which computes nothing
    assert not profiled["DepthToSpace"]
    assert [kernel.kind for kernel in execution.kernels if kernel.group == COPIES] == ["Transpose"]


@pytest.mark.usefixtures("dot_products")
def test_quantising_pass(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    """The first layer is in float, so the second's quantiser reads what a kernel before it wrote."""
    layers = [layer_maker("a", 0, 3, 32, 3, scale=0.9), layer_maker("b", 1, 32, 4, 1, scale=1.0, relu=False)]
    layers[0] = type(layers[0])(**(vars(layers[0]) | {"quantized": False}))
    execution = openvino_kernels(write_layers(tmp_path / "a", layers).artifact, images(3), OPTIONS, 3)
    assert {kernel.name: kernel.precision for kernel in execution.kernels if kernel.compute} == {"a": "f32", "b": "i8"}
    assert any(kernel.group == CONVERT for kernel in execution.kernels)


def test_precision_that_the_cpu_lacks(convolutions: Any) -> None:
    lacking = next((name for name, capability in {"f16": "FP16", "bf16": "BF16"}.items() if capability not in CAPABILITIES), None)
    if lacking is None:
        pytest.skip("this CPU has every precision")
    with pytest.raises(DependencyError, match=f'precision="{lacking}"'):
        openvino_kernels(convolutions.artifact, images(3), replace(OPTIONS, precision=lacking), 3)


def test_size_that_the_graph_refuses(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "fixed"], ["scores"], name="add")]
    artifact = write_graph(tmp_path / "a", nodes, {"fixed": np.zeros((1, 4, 7, 7), np.float32)}, channels=4, outputs=4).artifact
    with pytest.raises(ArtifactError, match="cannot compile it for images of shape") as caught:
        openvino_kernels(artifact, images(4), OPTIONS, 3)
    assert "\n" not in str(caught.value)
