"""Opening and calling: what is not allowed is refused in one line, whatever the engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.errors import ArtifactError, DataError
from muntin.runtime import ENGINES, load


@pytest.mark.parametrize("engine", list(ENGINES))
def test_scores_have_the_signatures_shape(convolutions: Any, images_of: Callable[..., Any], engine: str) -> None:
    session = load(convolutions.path, engine=engine)
    assert (session.engine, session.signature) == (engine, convolutions.artifact.manifest.signature)
    scores = session(images_of(3, batch=2, height=6, width=7))
    assert (scores.shape, scores.dtype) == ((2, 5, 6, 7), np.float32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), "dtype float32"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\)"),
        (np.zeros((1, 3, 4, 4), np.uint8), r"shape \(1, 3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"shape \(0, 4, 4, 3\)"),
        (np.zeros((1, 0, 4, 3), np.uint8), r"shape \(1, 0, 4, 3\)"),
        ([[1]], "type list"),
    ],
)
def test_wrong_images(convolutions: Any, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(convolutions.path)(images)
    assert "uint8 (B, H, W, 3)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_views_are_read_right(per_pixel: Any, images_of: Callable[..., Any]) -> None:
    session, images = load(per_pixel.path), images_of(4, height=12, width=12)
    np.testing.assert_array_equal(session(images[:, ::2, ::-1]), session(np.ascontiguousarray(images[:, ::2, ::-1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engine": "tensorrt"}, "openvino, onnxruntime"), ({"precision": "int8"}, "recorded, f32"), ({"threads": 0}, "threads=0")],
)
def test_unknown_options(convolutions: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(convolutions.path, **options)


MISSING = """
import sys
from muntin.errors import DependencyError
from muntin.runtime import load
sys.modules[sys.argv[2]] = None  # as if it were not installed
try:
    load(sys.argv[1], engine=sys.argv[2])
except DependencyError as error:
    sys.exit(0 if f"pip install {sys.argv[2]}" in str(error) else 2)
"""


@pytest.mark.parametrize("engine", list(ENGINES))
def test_an_engine_that_is_not_installed_is_named(convolutions: Any, engine: str) -> None:
    code = f"{MISSING}sys.exit(1)"
    assert subprocess.run([sys.executable, "-c", code, str(convolutions.path), engine], check=False).returncode == 0


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_model_that_the_engine_cannot_read(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Any, engine: str
) -> None:
    layers = [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)]
    model = onnx.load_model_from_string(write_layers(tmp_path / "good", layers).artifact.model_bytes())
    model.graph.node[0].op_type = "Kast"
    write_layers(tmp_path / "bad", layers, model=model)
    with pytest.raises(ArtifactError, match=r"cannot (read|open) its model.*(Kast|Conv)") as caught:
        load(tmp_path / "bad", engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_model_that_is_not_what_its_signature_says(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], images_of: Callable[..., Any], tmp_path: Any, engine: str
) -> None:
    six = write_layers(tmp_path / "six", [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)])
    model = onnx.load_model_from_string(six.artifact.model_bytes())
    write_layers(tmp_path / "five", [layer_maker("pixel", 5, 4, 5, 1, scale=0.9, relu=False)], model=model)
    with pytest.raises(ArtifactError, match=r"\(1, 6, 3, 3\).*\(1, 5, 3, 3\)"):
        load(tmp_path / "five", engine=engine)(images_of(4, batch=1, height=3, width=3))
