"""Small models with named inputs and outputs, and artefacts of them, for the tests of several rooms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from muntin.artifact import Artifact, GoldenTolerance, TensorInfo, TensorSignature, write_artifact
from muntin.graph.float_run import FloatRun

Array = NDArray[Any]
TOLERANCE = {
    "f32": GoldenTolerance(max_error=0.01, label_agreement=1),
    "bf16": GoldenTolerance(max_error=0.5, label_agreement=0.6),
    "f16": GoldenTolerance(max_error=0.5, label_agreement=0.6),
}


def model(text: str, **weights: Array) -> onnx.ModelProto:
    """A model from onnx's text form; `weights` are its constants."""
    proto: onnx.ModelProto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]> agraph {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(proto)
    return proto


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def two_heads() -> onnx.ModelProto:
    """Token ids and a mask in, an embedding and a label out."""
    return model(
        """(int64[batch, tokens] ids, bool[batch, tokens] mask) => (float[batch, 24] embedding, int64[batch] label) {
            vectors = Gather(table, ids)
            kept = Cast<to = 1>(mask)
            last = Constant<value_ints = [2]>()
            column = Unsqueeze(kept, last)
            masked = Mul(vectors, column)
            first = Constant<value_ints = [1]>()
            sum = ReduceSum<keepdims = 0>(masked, first)
            hidden = MatMul(sum, into)
            active = Relu(hidden)
            embedding = MatMul(active, out)
            label = ArgMax<axis = 1, keepdims = 0>(embedding)
        }""",
        table=normal(50, 16),
        into=normal(16, 32, seed=1),
        out=normal(32, 24, seed=2),
    )


def text_inputs(batch: int, tokens: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    mask = random.random((batch, tokens)) < 0.8
    mask[:, 0] = True
    return {"ids": random.integers(0, 50, (batch, tokens)), "mask": mask}


SIGNATURE = TensorSignature(
    inputs=(
        TensorInfo(name="ids", dtype="int64", shape=("batch", "tokens")),
        TensorInfo(name="mask", dtype="bool", shape=("batch", "tokens")),
    ),
    outputs=(
        TensorInfo(name="embedding", dtype="float32", shape=("batch", 24)),
        TensorInfo(name="label", dtype="int64", shape=("batch",)),
    ),
    batch="batch",
)


def write_tensors(path: Path, proto: onnx.ModelProto | None = None, **fields: Any) -> Artifact:
    """An artefact of `two_heads`, or of another model and its fields."""
    proto = proto or two_heads()
    run = FloatRun(proto, exact=True)
    given: list[dict[str, Array]] = fields.pop("inputs", [text_inputs(2, 9), text_inputs(3, 6, seed=1)])
    defaults: Mapping[str, Any] = {
        "signature": SIGNATURE,
        "golden": [(inputs, run(inputs)) for inputs in given],
        "golden_tolerance": {"openvino": TOLERANCE, "onnxruntime": TOLERANCE},
        "example": {"batch": 1, "tokens": 8},
    }
    return write_artifact(path, **{"model": proto, **defaults, **fields})
