"""OpenVINO: integer numerics and integer kernels, precisions, sizes, threads, and no word to the network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from image_session import compiled_forms
from muntin.artifact import ClassInfo, GoldenTolerance, Signature, write_artifact
from muntin.errors import ArtifactError, DependencyError
from muntin.runtime import load
from muntin.runtime.engines.openvino.compiled import FREE, capabilities
from muntin.runtime.engines.openvino.output_fusion import ending_in_labels, ending_in_scores
from muntin.runtime.engines.openvino.session import open_openvino
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import STATIC_SHAPES

CAPABILITIES = capabilities(openvino.Core())


@pytest.mark.usefixtures("dot_products")
def test_integer_reference(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path, precision="f32")
    images = images_of(3, batch=3, height=17, width=11, seed=9)
    expected = convolutions.reference(images)
    # one step of the last layer's input moves a score by this much at most; what remains after exact integers is float rounding
    head = convolutions.layers[-1]
    step = float((np.abs(head.weight).max(axis=(1, 2, 3)) * head.weight_scale).max() * head.scale)
    difference = np.abs(session(images) - expected)
    assert difference.max() <= step
    assert difference.mean() <= step / 100


@pytest.mark.usefixtures("dot_products")
@pytest.mark.parametrize("called", [True, False])
def test_runs_on_integer_kernels(convolutions: Any, images_of: Callable[..., Any], called: bool) -> None:
    session = load(convolutions.path, precision="f32")
    if called:
        session(images_of(3))
    computed = {layer.name: layer.precision for layer in session.layers() if layer.compute}
    assert computed == {"stem": "i8", "body": "i8", "depthwise": "i8", "head": "i8"}


def test_float_layer(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    layers = [layer_maker("a", 0, 3, 32, 3, scale=0.9), layer_maker("b", 1, 32, 4, 1, scale=1.0, relu=False)]
    layers[1] = type(layers[1])(**(vars(layers[1]) | {"quantized": False}))
    session = load(write_layers(tmp_path / "a", layers).path, precision="f32")
    assert {layer.name: layer.precision for layer in session.layers() if layer.compute}["b"] == "f32"


@pytest.mark.parametrize(("precision", "capability"), [("f32", "FP32"), ("bf16", "BF16"), ("f16", "FP16")])
def test_precision_of_the_cpu(convolutions: Any, precision: str, capability: str) -> None:
    if capability in CAPABILITIES:
        assert load(convolutions.path, precision=precision).precision == precision
    else:
        with pytest.raises(DependencyError, match=f"no {capability}.*FP32") as caught:
            load(convolutions.path, precision=precision)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recorded", ["f32", "bf16", "f16"])
def test_recorded_precision_or_f32(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], images_of: Callable[..., Any], tmp_path: Path, recorded: str
) -> None:
    written = write_layers(tmp_path / "a", [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)], precision=recorded)
    session = load(written.path)
    expected = {"f32": "f32", "bf16": "bf16" if "BF16" in CAPABILITIES else "f32", "f16": "f16" if "FP16" in CAPABILITIES else "f32"}
    assert session.precision == expected[recorded]
    assert session(images_of(4)).dtype == np.float32


def test_static_and_dynamic_sizes_agree(convolutions: Any, images_of: Callable[..., Any]) -> None:
    static, dynamic = (open_openvino(convolutions.artifact, SessionOptions(precision="f32", dynamic=dynamic)) for dynamic in (False, True))
    sizes = [(1, 1), (1, 7), (8, 8), (9, 3), (16, 5), (8, 8)]
    for height, width in sizes:
        images = images_of(3, batch=1, height=height, width=width)
        scores = static(images)
        assert scores.shape == (1, 5, height, width)
        np.testing.assert_allclose(scores, dynamic(images), atol=1e-4)
    assert len(static._compiled) == STATIC_SHAPES
    assert compiled_forms(dynamic) == {(None, False)}
    # With batch, height and width free at once OpenVINO 2026.4 computes some trained networks wrongly (docs/log.md).
    assert dynamic._compiled[FREE].model.input(0).partial_shape[0].get_length() == 1


def test_warmed_up_shapes_are_kept(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path, dynamic=True, shapes=[(1, 4 + n, 4) for n in range(STATIC_SHAPES + 2)])
    session.warm_up([(2, 3, 3)], labels=True)
    warmed_up = {((1, 4 + n, 4), False) for n in range(STATIC_SHAPES + 2)} | {((2, 3, 3), True)}
    assert compiled_forms(session) == warmed_up
    session(images_of(3, batch=1, height=5, width=4))
    assert compiled_forms(session) == warmed_up
    session.labels(images_of(3, batch=1, height=30, width=4))
    assert compiled_forms(session) == warmed_up | {(None, True)}


def test_one_answer_for_a_warm_size(convolutions: Any, images_of: Callable[..., Any]) -> None:
    """In any batch and for any output, it comes from models of that size."""
    session = load(convolutions.path, dynamic=True, shapes=[(2, 8, 8)])
    images = images_of(3, batch=5, height=8, width=8)
    scores, labels = session(images), session.labels(images)
    np.testing.assert_array_equal(labels, scores.argmax(1))
    for number in range(5):
        np.testing.assert_array_equal(session(images[number : number + 1])[0], scores[number])
    variants = {((2, 8, 8), False), ((1, 8, 8), False), ((1, 8, 8), True)}
    assert compiled_forms(session) == variants


def test_calls_during_a_compilation(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path, dynamic=True, shapes=[(1, 8, 8)])
    session(images_of(3, batch=1, height=9, width=9))
    with session._compiling:  # type: ignore[attr-defined]
        assert session(images_of(3, batch=1, height=8, width=8)).shape == (1, 5, 8, 8)
        assert session(images_of(3, batch=1, height=30, width=7)).shape == (1, 5, 30, 7)


def test_scores_are_the_callers_own(per_pixel: Any, images_of: Callable[..., Any]) -> None:
    session = load(per_pixel.path)
    first = session(images_of(4, seed=1))
    kept = first.copy()
    second = session(images_of(4, seed=2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writable, and nobody else's
    np.testing.assert_array_equal(session(images_of(4, seed=1)), kept)


@pytest.fixture
def brittle(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> Any:
    """An artefact of dynamic sizes that in truth takes 9 x 13 alone: it compiles, and fails when it computes."""
    layers = [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)]
    model = onnx.load_model_from_string(write_layers(tmp_path / "good", layers).artifact.model_bytes())
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 6, 9, 13]), "sides"))
    model.graph.node[-1].output[0] = "free"
    model.graph.node.append(onnx.helper.make_node("Reshape", ["free", "sides"], ["fixed"]))
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["fixed"], ["sum"], keepdims=0))
    model.graph.node.append(onnx.helper.make_node("Add", ["free", "sum"], ["scores"]))
    return write_layers(tmp_path / "brittle", layers, model=model).artifact


def test_images_that_cannot_be_computed(brittle: Any, images_of: Callable[..., Any]) -> None:
    session = open_openvino(brittle, SessionOptions(dynamic=True))
    with pytest.raises(ArtifactError, match=r"brittle: OpenVINO .* cannot compute images \(1, 8, 13, 4\): .") as caught:
        session(images_of(4, batch=1, height=8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streams", [1, 2])
def test_failing_call_beside_others(brittle: Any, images_of: Callable[..., Any], streams: int) -> None:
    """OpenVINO 2026.4 refuses the size before a failure, too, until another one comes."""
    session = open_openvino(brittle, SessionOptions(threads=2, streams=streams, dynamic=True))
    good, bad = images_of(4, batch=1), images_of(4, batch=1, height=8)
    expected = session(good)

    def fails() -> None:
        with pytest.raises(ArtifactError, match="cannot compute"):
            session(bad)

    for _ in range(2):
        fails()
        np.testing.assert_array_equal(session(good), expected)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(session, good) if number % 4 else pool.submit(fails) for number in range(200)]
        for number, answer in enumerate(answers):
            assert not number % 4 or np.array_equal(answer.result(), expected)
            answer.result()


NO_MEMORY = """
import resource, sys
import numpy as np
from muntin.errors import ArtifactError
from muntin.runtime import load
from muntin.runtime.host.memory import no_memory
session = load(sys.argv[1], shapes=[(1, 8, 8)], dynamic=True, cache=False)
call = session.labels if sys.argv[2] == "labels" else session
call(np.zeros((1, 9, 9, 3), np.uint8))
images = np.zeros((1, 2000, 2000, 3), np.uint8)  # 512 MB for each map of 32 channels
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (int(sys.argv[3]) << 20),) * 2)
try:
    call(images)
except ArtifactError as error:
    sys.exit(0 if no_memory(error) and "\\n" not in str(error) else str(error))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count pages for us")
@pytest.mark.parametrize(("answer", "mebibytes"), [("scores", 200), ("scores", 300), ("labels", 60), ("labels", 200)])
def test_lack_of_memory(convolutions: Any, answer: str, mebibytes: int) -> None:
    """OpenVINO raises, or returns and has written nothing."""
    command = [sys.executable, "-c", f"{NO_MEMORY}sys.exit(3)", str(convolutions.path), answer, str(mebibytes)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("labels", [True, False])
def test_answer_that_was_not_written(
    convolutions: Any, images_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, labels: bool
) -> None:
    """It would be what lay in that memory: an answer to somebody else."""
    session = open_openvino(convolutions.artifact, SessionOptions(precision="f32", dynamic=True))
    call = session.labels if labels else session
    images = images_of(3, batch=1, height=9, width=7, seed=1)
    expected = call(images)
    write_to, elsewhere = session._write_to, np.zeros_like(expected)  # it stays: an engine writes there

    with monkeypatch.context() as patch:
        patch.setattr(session, "_write_to", lambda request, index, answer: write_to(request, index, elsewhere))
        with pytest.raises(ArtifactError, match=r"returned without an answer.*out of memory"):
            call(images)
    np.testing.assert_array_equal(call(images), expected)


def shuffled(mode: str, *crops: tuple[int, int, int]) -> onnx.ModelProto:
    """float32 (B, 3, H, W) -> (B, 5, 2H, 2W), of small whole numbers so that many are equal. `crops`: (axis, from, to)."""
    weight = np.random.default_rng(3).integers(-1, 2, (20, 3, 1, 1)).astype(np.float32)
    constants, nodes, last = {"weight": weight}, [helper.make_node("Conv", ["images", "weight"], ["wide"])], "s"
    nodes.append(helper.make_node("DepthToSpace", ["wide"], [last], blocksize=2, mode=mode))
    for number, bounds in enumerate(crops):
        inputs = []
        for name, value in zip(("starts", "ends", "axes"), (bounds[1], bounds[2], bounds[0]), strict=True):
            constants[f"{name}{number}"] = np.array([value], np.int64)
            inputs.append(f"{name}{number}")
        nodes.append(helper.make_node("Slice", [last, *inputs], [f"s{number}"]))
        last = f"s{number}"
    nodes[-1].output[:] = ["scores"]
    graph = helper.make_graph(
        nodes,
        "shuffled",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", "K", "Y", "X"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("mode", "crops", "early"),
    [
        ("CRD", [], True),
        ("CRD", [(2, 0, 9), (3, 1, 10**9)], True),
        ("CRD", [(-1, 0, -1)], True),
        ("CRD", [(1, 0, 4), (2, 0, 9)], False),
        ("DCR", [(2, 0, 9)], False),
    ],
)
def test_pixel_shuffle_of_scores_and_labels(mode: str, crops: list[tuple[int, int, int]], early: bool, static: bool) -> None:
    model = openvino.Core().read_model(model=shuffled(mode, *crops).SerializeToString(), weights=b"")
    ending, scoring = ending_in_labels(model.clone(), np.dtype(np.uint8)), ending_in_scores(model.clone())
    kinds, scoring_kinds = ([node.get_type_name() for node in one.get_ordered_ops()] for one in (ending, scoring))
    assert ("DepthToSpace" not in scoring_kinds) == ("DepthToSpace" not in kinds) == early
    to_pixels = kinds[::-1].index("Transpose" if early else "DepthToSpace")  # from the end
    assert (kinds[::-1].index("TopK") > to_pixels) == early  # labels become pixels, and not scores
    for shape in ([2, 3, 5, 6], [1, 3, 7, 2]):
        images = np.random.default_rng(shape[2]).integers(0, 3, shape).astype(np.float32)
        answers = []
        for one in (model.clone(), ending.clone(), scoring.clone()):
            if static:
                one.reshape(shape)
            with signal_stack_kept():
                compiled = openvino.Core().compile_model(one, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                answers.append(compiled([images])[0].copy())
                del compiled
        scores, labels, scores_in_one_pass = answers
        np.testing.assert_array_equal(scores_in_one_pass, scores)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, scores.argmax(1))


SILENT = """
import sys
calls = []
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.posix_spawn")
sys.addaudithook(lambda event, args: calls.append((event, args)) if event in watched else None)
import numpy as np
from muntin.runtime import load
load(sys.argv[1])(np.zeros((1, 4, 4, 4), np.uint8))
import openvino_telemetry  # hidden from openvino only
sys.exit(str(calls) if calls else 2 if "torch" in sys.modules else 0)
"""


def test_no_network_and_no_torch(per_pixel: Any, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}  # these silence it too
    home = environment | {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", SILENT, str(per_pixel.path)], env=home, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []  # no client identifier


def plain_model(outputs: int, *, rows: int = 0) -> onnx.ModelProto:
    """Three channels to so many by a 1 x 1 convolution. `rows`: so many of them are left out at the end."""
    weight = np.random.default_rng(0).normal(size=(outputs, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weight"], ["scores" if not rows else "all"], name="head"),
    ]
    constants = [numpy_helper.from_array(weight, "weight")]
    if rows:  # of large images alone
        nodes += [
            helper.make_node("Shape", ["all"], ["height"], start=2, end=3),
            helper.make_node("Greater", ["height", "limit"], ["large"]),
            helper.make_node("Cast", ["large"], ["count"], to=TensorProto.INT64),
            helper.make_node("Sub", ["height", "count"], ["end"]),
            helper.make_node("Slice", ["all", "zero", "end", "axis"], ["scores"]),
        ]
        constants += [
            numpy_helper.from_array(np.array([value], np.int64), name) for name, value in {"limit": 64, "zero": 0, "axis": 2}.items()
        ]
    graph = helper.make_graph(
        nodes, "plain",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", outputs, "H2", "W"])],
        constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_plain(path: Path, model: onnx.ModelProto, classes: int = 4) -> Path:
    signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=str(k), color=(k, k, k)) for k in range(classes)))
    weight = numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == "weight"))[:classes, :, 0, 0]
    images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3)).astype(np.uint8)
    scores = np.einsum("bhwc,kc->bkhw", images, weight).astype(np.float32)
    limits = {"openvino": {"f32": GoldenTolerance(max_error=0.05, label_agreement=0.9)}}
    write_artifact(path, model=model, signature=signature, golden=[(images, scores)], golden_tolerance=limits)
    return path


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_answer_of_another_shape(tmp_path: Path, images_of: Callable[..., Any], dynamic: bool, labels: bool) -> None:
    """A smaller output would leave a part of the answer's memory unwritten, which may hold another answer."""
    session = load(write_plain(tmp_path / "a", plain_model(4, rows=1)), precision="f32", dynamic=dynamic, shapes=())
    call = session.labels if labels else session
    assert call(images_of(3, batch=1, height=64, width=5)).shape[-2:] == (64, 5)
    with pytest.raises(ArtifactError, match=r"(where|than) its signature says"):
        call(images_of(3, batch=1, height=65, width=5))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_labels_of_a_model_with_more_classes(tmp_path: Path, images_of: Callable[..., Any], engine: str) -> None:
    path = write_plain(tmp_path / "a", plain_model(21))
    with pytest.raises(ArtifactError, match=r"(where|than) its signature says"):
        load(path, engine=engine, precision="f32", shapes=()).labels(images_of(3))


def test_compile_options(
    write_layers: Callable[..., Any], layer_maker: Callable[..., Any], images_of: Callable[..., Any], tmp_path: Path
) -> None:
    """By what the engine says of its own compiled model, and, of the precision, of the layer that it ran."""
    layers = [type(layer)(**(vars(layer) | {"quantized": False})) for layer in (layer_maker("a", 0, 3, 32, 3, scale=0.9),)]
    written = write_layers(tmp_path / "a", layers)
    for precision, capability in (("f32", "FP32"), ("bf16", "BF16")):
        if capability not in CAPABILITIES:
            continue
        session: Any = load(written.path, precision=precision, threads=2, streams=2)
        session(images_of(3))
        assert {layer.precision for layer in session.layers() if layer.compute} == {precision}
        kind = openvino.Type.f32 if precision == "f32" else openvino.Type.bf16
        expected = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 2}
        for compiled in session._compiled.values():
            assert {name: compiled.model.get_property(name) for name in expected} == expected
