"""What ONNX Runtime really executes: names, work, bytes, connections and time stamps of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.errors import ArtifactError, DependencyError
from muntin.runtime.kernels import IMAGES, PRODUCTS
from muntin.runtime.onnxruntime_kernels import onnxruntime_kernels

OPTIONS: dict[str, Any] = {"precision": "recorded", "threads": 1, "rounds": 3}
H, W = 24, 40


def images(batch: int = 1) -> Any:
    return np.random.default_rng(0).integers(0, 256, (batch, H, W, 3)).astype(np.uint8)


def test_kernels_are_the_layers_with_their_work(convolutions: Any) -> None:
    execution = onnxruntime_kernels(convolutions.artifact, images(batch=2), **OPTIONS)
    computed = {kernel.name: kernel for kernel in execution.kernels if kernel.compute}
    pixels = 2 * H * W
    assert {name: kernel.macs for name, kernel in computed.items()} == {
        "stem": pixels * 3 * 32 * 9, "body": pixels * 32 * 32 * 9, "depthwise": pixels * 32 * 9, "head": pixels * 32 * 5,
    }  # fmt: skip
    assert all(kernel.group == PRODUCTS and kernel.layer == name for name, kernel in computed.items())
    assert {kernel.precision for kernel in computed.values()} <= {"i8", "f32"}
    assert (execution.precision, execution.threads) == ("f32", 1)


def test_every_kernel_has_its_time_stamp_and_they_do_not_overlap(convolutions: Any) -> None:
    """One thread between operations: a kernel begins when the one before it has ended. Medians over rounds may differ by their spread."""
    execution = onnxruntime_kernels(convolutions.artifact, images(), **(OPTIONS | {"rounds": 1}))
    starts = [kernel.start_ms for kernel in execution.kernels]
    assert all(start is not None and start >= 0 for start in starts)
    timed = sorted((kernel.start_ms or 0.0, kernel.ms) for kernel in execution.kernels)
    assert all(start + ms <= following + 1e-6 for (start, ms), (following, _) in pairwise(timed))
    assert sum(kernel.ms for kernel in execution.kernels) <= execution.profiled_ms


def test_kernels_name_their_sources_back_to_the_image(convolutions: Any) -> None:
    execution = onnxruntime_kernels(convolutions.artifact, images(), **OPTIONS)
    names = {kernel.name for kernel in execution.kernels}
    assert len(names) == len(execution.kernels)
    sources = {operand.source for kernel in execution.kernels for operand in kernel.inputs} - {None}
    assert IMAGES in sources
    assert sources <= names | {IMAGES}


def test_bytes_are_those_of_inputs_weights_and_outputs(convolutions: Any) -> None:
    execution = onnxruntime_kernels(convolutions.artifact, images(), **OPTIONS)
    (first,) = (kernel for kernel in execution.kernels if any(operand.source == IMAGES for operand in kernel.inputs))
    assert sum(operand.bytes for operand in first.inputs if operand.source == IMAGES) == H * W * 3
    body = next(kernel for kernel in execution.kernels if kernel.name == "body")
    assert {32 * 32 * 9, 4 * 32 * 32 * 9} & {operand.bytes for operand in body.inputs if operand.source is None or operand.type == "f32"}


def test_a_node_without_a_name_is_counted_too(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    written = write_layers(
        tmp_path / "named", [layer_maker("a", 0, 3, 8, 3, scale=0.9), layer_maker("b", 1, 8, 4, 1, scale=1.0, relu=False)]
    )
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    for node in model.graph.node:
        node.name = ""
    nameless = write_layers(tmp_path / "nameless", written.layers, model=model).artifact
    kernels = onnxruntime_kernels(nameless, images(), **OPTIONS).kernels
    assert sum(kernel.macs for kernel in kernels) == H * W * (3 * 8 * 9 + 8 * 4)


def test_a_precision_without_kernels_is_refused(convolutions: Any) -> None:
    with pytest.raises(DependencyError, match="no bf16 kernels on CPUs"):
        onnxruntime_kernels(convolutions.artifact, images(), **(OPTIONS | {"precision": "bf16"}))


def test_a_model_that_it_cannot_open_is_one_line(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    written = write_layers(tmp_path / "a", [layer_maker("a", 0, 3, 8, 3, scale=0.9)])
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    model.graph.node[0].op_type = "Unheard"
    broken = write_layers(tmp_path / "broken", written.layers, model=model).artifact
    with pytest.raises(ArtifactError, match="cannot open its model") as caught:
        onnxruntime_kernels(broken, images(), **OPTIONS)
    assert "\n" not in str(caught.value)
