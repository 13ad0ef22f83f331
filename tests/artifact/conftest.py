"""A small model with every kind of initializer that an artefact stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact import Artifact, ClassInfo, GoldenTolerance, LayerRecord, Signature, write_artifact

SIGNATURE = Signature(
    task="segment", channels=3, classes=(ClassInfo(name="sea", color=(0, 0, 99)), ClassInfo(name="land", color=(9, 99, 0)))
)


@pytest.fixture
def model() -> onnx.ModelProto:
    """uint8 (B, H, W, 3) -> float32 (B, 2, H, W): an int8 1 x 1 convolution to 40, a float one to 2, other constants."""
    rng = np.random.default_rng(7)
    tensors = {
        "wide": rng.integers(-8, 8, (40, 3, 1, 1)).astype(np.int8),
        "wide_scale": (rng.random(40) + 0.5).astype(np.float32),
        "wide_zero": np.zeros(40, np.int8),
        "narrow": rng.normal(size=(2, 40, 1, 1)).astype(np.float32),
        "bias": rng.normal(size=(1, 2, 1, 1)).astype(np.float32),
        "positions": np.arange(99, dtype=np.int64),
        "unsigned": rng.integers(0, 4, (5, 17)).astype(np.uint8),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT, doc_string="/home/someone/export.py:12"),
        helper.make_node("Transpose", ["float"], ["nchw"], name="transpose", perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", ["wide", "wide_scale", "wide_zero"], ["wide_float"], name="dequantize", axis=0),
        helper.make_node("Conv", ["nchw", "wide_float"], ["hidden"], name="wide/conv"),
        helper.make_node("Conv", ["hidden", "narrow"], ["logits"], name="narrow/conv"),
        helper.make_node("Add", ["logits", "bias"], ["scores"], name="add"),
    ]
    nodes[0].metadata_props.add(key="stack_trace", value="/home/someone/model.py")
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 2, "H", "W"])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
        doc_string="/home/someone",
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(built)
    return built


@pytest.fixture
def golden() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(8)
    return [
        (rng.integers(0, 256, (batch, 4, 5, 3)).astype(np.uint8), rng.normal(size=(batch, 2, 4, 5)).astype(np.float32)) for batch in (1, 2)
    ]


@pytest.fixture
def write(model: onnx.ModelProto, golden: list[tuple[np.ndarray, np.ndarray]]) -> Callable[..., Artifact]:
    def write(path: Path, **changes: Any) -> Artifact:
        arguments: dict[str, Any] = {
            "model": model,
            "signature": SIGNATURE,
            "golden": golden,
            "golden_tolerance": {"openvino": {"f32": GoldenTolerance(max_error=1e-3, label_agreement=0.999)}},
            "packing": {"wide": 4, "narrow": "f16", "unsigned": 2},
            "layers": [LayerRecord(name="wide", kind="Conv2d", weight_bits=4, activation_bits=None, parameters=120)],
            "passes": [{"name": "quantise", "bits": 4, "share": 0.5}],
            "measured": {"miou": 0.625, "hardware": {"cores": 2}},
            "created": "2026-11-24T16:00:00+00:00",
        }
        return write_artifact(path, **(arguments | changes))

    return write
