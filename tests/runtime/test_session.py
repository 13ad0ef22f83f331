"""Opening and calling: what is not allowed is refused in one line, whatever the engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from image_session import compiled_forms
from muntin.errors import ArtifactError, DataError
from muntin.runtime import load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.session import Session


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_shape_of_scores(convolutions: Any, images_of: Callable[..., Any], engine: str) -> None:
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
    if np.ndim(images) != 3:  # which labels take as one image
        with pytest.raises(DataError, match=message):
            load(convolutions.path).labels(images)


def test_views_as_images(per_pixel: Any, images_of: Callable[..., Any]) -> None:
    session, images = load(per_pixel.path), images_of(4, height=12, width=12)
    np.testing.assert_array_equal(session(images[:, ::2, ::-1]), session(np.ascontiguousarray(images[:, ::2, ::-1])))


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


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_missing_engine(convolutions: Any, engine: str) -> None:
    code = f"{MISSING}sys.exit(1)"
    assert subprocess.run([sys.executable, "-c", code, str(convolutions.path), engine], check=False).returncode == 0


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_model_that_cannot_be_read(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Any, engine: str) -> None:
    layers = [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)]
    model = onnx.load_model_from_string(write_layers(tmp_path / "good", layers).artifact.model_bytes())
    model.graph.node[0].op_type = "Kast"
    write_layers(tmp_path / "bad", layers, model=model)
    with pytest.raises(ArtifactError, match=r"cannot (read|open) its model.*(Kast|Conv)") as caught:
        load(tmp_path / "bad", engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_model_that_contradicts_its_signature(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], images_of: Callable[..., Any], tmp_path: Any, engine: str
) -> None:
    six = write_layers(tmp_path / "six", [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)])
    model = onnx.load_model_from_string(six.artifact.model_bytes())
    write_layers(tmp_path / "five", [layer_maker("pixel", 5, 4, 5, 1, scale=0.9, relu=False)], model=model)
    with pytest.raises(ArtifactError, match=r"\(1, 6, 3, 3\).*\(1, 5, 3, 3\)"):
        load(tmp_path / "five", engine=engine)(images_of(4, batch=1, height=3, width=3))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_session_shared_by_threads(convolutions: Any, images_of: Callable[..., Any], engine: str) -> None:
    session = load(convolutions.path, engine=engine, precision="f32", threads=1)
    assert (session.threads, load(convolutions.path, engine=engine).threads) == (1, physical_cores())
    batches = [images_of(3, batch=1, height=8 + seed % 3, width=8, seed=seed) for seed in range(24)]
    alone = [session(images) for images in batches]
    with ThreadPoolExecutor(3) as pool:
        for one, other in zip(alone, pool.map(session, batches), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("streams", [1, 2])
def test_map_in_order(convolutions: Any, images_of: Callable[..., Any], engine: str, streams: int) -> None:
    session = load(convolutions.path, engine=engine, precision="f32", threads=2, streams=streams)
    assert session.streams == streams
    batches = [images_of(3, batch=1 + seed % 2, height=6 + seed % 3, width=7, seed=seed) for seed in range(9)]
    alone = [session(images) for images in batches]
    mapped = list(session.map(iter(batches)))
    assert len(mapped) == len(alone)
    for one, other in zip(alone, mapped, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_map_of_a_reused_array(convolutions: Any, images_of: Callable[..., Any], engine: str) -> None:
    """As readers of videos do."""
    session = load(convolutions.path, engine=engine, precision="f32", threads=2, streams=2)
    batches = [images_of(3, batch=1, height=64, width=64, seed=seed) for seed in range(12)]
    memory = np.empty_like(batches[0])

    def read() -> Iterator[Any]:
        for images in batches:
            memory[...] = images
            yield memory

    for images, mapped in zip(batches, session.map(read()), strict=True):
        np.testing.assert_allclose(mapped, session(images), atol=1e-5)


def test_map_read_ahead(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path, threads=2, streams=2)
    read = []

    def batches() -> Any:
        for index in range(100):
            read.append(index)
            yield images_of(3, batch=1, height=4, width=4)

    answers = session.map(batches())
    for done in range(1, 5):
        next(answers)
        assert len(read) <= done + session.streams


def test_map_with_a_failing_batch(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path)
    good = images_of(3, batch=1, height=4, width=4)
    answers = session.map([good, good.astype(np.float32), good])
    assert next(answers).shape == (1, 5, 4, 4)
    with pytest.raises(DataError, match="float32"):
        next(answers)

    def batches() -> Any:
        yield from (good, good)
        raise OSError("the disk is gone")

    answers = load(convolutions.path, threads=2, streams=2).map(batches())
    assert [next(answers).shape for _ in range(2)] == [(1, 5, 4, 4)] * 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(answers)


def calls_of(session: Session) -> list[tuple[int, ...]]:
    """Shapes of the images that a session computes from now on."""
    seen: list[tuple[int, ...]] = []
    infer = session._infer

    def noting(inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["images"].shape)
        return infer(inputs, *rest)

    session._infer = noting  # type: ignore[method-assign]
    return seen


def test_warm_up_in_every_stream(convolutions: Any) -> None:
    session = load(convolutions.path, threads=2, streams=2)
    seen = calls_of(session)
    session.warm_up([(1, 4, 4), (2, 5, 6)])
    assert sorted(seen) == [(1, 4, 4, 3)] * 2 + [(2, 5, 6, 3)] * 2


def test_load_compiles_the_example(write_layers: Callable[..., Any], convolutions: Any, tmp_path: Path) -> None:
    written = write_layers(tmp_path / "a", convolutions.layers, example=(1, 8, 10))
    assert compiled_forms(load(written.path)) == {((1, 8, 10), False)}
    assert compiled_forms(load(written.path, shapes=())) == set()
    shapes = [(1, np.int64(4 + n), 4) for n in range(7)]
    assert compiled_forms(load(written.path, shapes=shapes)) == {((1, 4 + n, 4), False) for n in range(7)}


def test_size_that_the_model_refuses(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    """A convolution of 3 x 3 without padding has nothing to give for a single pixel."""
    written = write_layers(tmp_path / "a", [layer_maker("pixel", 5, 4, 5, 1, scale=0.9, relu=False)])
    model = onnx.load_model_from_string(written.artifact.model_bytes())
    weight = next(item for item in model.graph.initializer if item.name == "pixel.weight")
    wide = np.repeat(np.repeat(onnx.numpy_helper.to_array(weight), 3, axis=2), 3, axis=3)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(wide), weight.name))
    broken = write_layers(tmp_path / "b", written.layers, model=model)
    for engine in ("openvino", "onnxruntime"):
        with pytest.raises(ArtifactError) as caught:
            load(broken.path, engine=engine)(np.zeros((1, 1, 1, 4), np.uint8))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_labels_are_the_highest_scores(convolutions: Any, images_of: Callable[..., Any], engine: str) -> None:
    session = load(convolutions.path, engine=engine, precision="f32")
    for batch, height, width in ((1, 33, 20), (2, 6, 7), (1, 1, 1)):
        images = images_of(3, batch=batch, height=height, width=width)
        labels = session.labels(images)
        assert (labels.shape, labels.dtype) == ((batch, height, width), np.uint8)
        np.testing.assert_array_equal(labels, session(images).argmax(axis=1))
        one = session.labels(images[0])
        np.testing.assert_array_equal(one, labels[0])
        assert session.class_names[one[0, 0]] == session.signature.classes[labels[0, 0, 0]].name


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_label_of_equal_scores(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], images_of: Callable[..., Any], tmp_path: Any, engine: str
) -> None:
    layer = layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)
    equal = type(layer)(**(vars(layer) | {"weight": np.zeros_like(layer.weight), "bias": np.float32([0, 3, 1, 3, 3, 2])}))
    session = load(write_layers(tmp_path / "equal", [equal]).path, engine=engine)
    for batch, height, width in ((1, 64, 48), (3, 5, 7)):
        assert (session.labels(images_of(4, batch=batch, height=height, width=width)) == 1).all()


def test_warm_up_for_labels(convolutions: Any) -> None:
    session = load(convolutions.path, shapes=())
    session.warm_up([(1, 8, 8)], labels=True)
    assert compiled_forms(session) == {((1, 8, 8), True)}
