"""What versions are compiled for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.artifact import TensorInfo, TensorSignature
from muntin.artifact.store import read_manifest
from muntin.errors import DataError
from muntin.serving.worker.calls import Call, call_from_json, starting_calls
from serving_parts import image_call
from tensor_models import model, write_tensors

LABELS, TEXTS = image_call((1, 8, 8), labels=True), Call((("batch", 2), ("tokens", 8)), "batch")


@pytest.mark.parametrize("call", [LABELS, image_call((2, 4, 6)), TEXTS, Call(())])
def test_calls_as_json(call: Any) -> None:
    again = call_from_json(json.loads(json.dumps(call)))
    assert (again, type(again)) == (call, type(call))


def test_calls_of_named_tensors(tmp_path: Path) -> None:
    manifest = read_manifest(write_tensors(tmp_path / "texts").path)
    sizes = [dict(call.dims) for call in starting_calls(manifest, 2, dims=[{"tokens": 16}, {"tokens": 8}])]
    assert sizes == [{"batch": rows, "tokens": tokens} for tokens in (8, 16) for rows in (1, 2)]
    assert starting_calls(manifest, 0) == ()
    for dims in ({"batch": 2, "tokens": 8}, {"words": 8}):
        with pytest.raises(DataError, match=r"give a size of each free dimension \(tokens\)"):
            starting_calls(manifest, 2, dims=[dims])
    with pytest.raises(DataError, match="--sizes: the model takes named tensors"):
        starting_calls(manifest, 2, [(8, 8)])


def test_calls_without_free_dimensions(tmp_path: Path) -> None:
    x, y = (TensorInfo(name=name, dtype="float32", shape=(3,)) for name in "xy")
    proto = model("(float[3] x) => (float[3] y) { y = Relu(x) }")
    inputs = [{"x": np.float32([1, -2, 3])}]
    written = write_tensors(tmp_path / "one", proto, signature=TensorSignature(inputs=(x,), outputs=(y,)), inputs=inputs, example=None)
    assert starting_calls(read_manifest(written.path), 8) == (Call(()),)


def test_advice() -> None:
    assert LABELS.advice == ("images of 8x8 pixels", "--sizes 8x8")
    assert TEXTS.advice == ("inputs of tokens=8", "--dims tokens=8")
