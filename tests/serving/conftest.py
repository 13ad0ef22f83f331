"""Tiny artefacts whose answers say which version gave them, and versions without an engine, for what a slot decides."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import serving_parts
from image_session import ImageSession
from muntin.artifact import (
    ClassInfo,
    GoldenTolerance,
    LayerRecord,
    Signature,
    Sizes,
    TensorInfo,
    TensorSignature,
    open_artifact,
    write_artifact,
)
from muntin.runtime.options import SessionOptions
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.worker.liveness import Liveness
from muntin.serving.worker.opening import Opened
from tensor_models import model as tensor_model
from tensor_models import write_tensors

NAMES = ("sea", "field", "roof", "road", "tree")


def beside(name: str) -> Any:
    """The module of this name beside this file."""
    spec = importlib.util.spec_from_file_location(f"serving_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def make_signature(channels: int = 3, classes: tuple[str, ...] = NAMES[:4], **changes: Any) -> Signature:
    named = tuple(ClassInfo(name=name, color=(number % 256,) * 3) for number, name in enumerate(classes))
    return Signature(**({"task": "segment", "channels": channels, "classes": named} | changes))


def make_model(label: int, channels: int, classes: int) -> onnx.ModelProto:
    """uint8 (B, H, W, C) -> float32 (B, K, H, W): a 1 x 1 convolution that gives every pixel the same label."""
    weight = np.random.default_rng(label).normal(size=(classes, channels, 1, 1)).astype(np.float32) * 0.01
    bias = np.zeros(classes, np.float32)
    bias[label] = 100
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], name="to_nchw", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weight", "bias"], ["scores"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", channels])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", classes, "H", "W"])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def golden_of(model: onnx.ModelProto, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    weight, bias = (numpy_helper.to_array(item).astype(np.float64) for item in model.graph.initializer)
    scores = np.einsum("bhwc,kc->bkhw", images_BHWC.astype(np.float64), weight[:, :, 0, 0]) + bias[:, None, None]
    return np.asarray(scores, np.float32)


def write(
    path: Path,
    label: int = 0,
    *,
    signature: Signature | None = None,
    model: onnx.ModelProto | None = None,
    shift: float = 0.0,
    activation_bits: int | None = None,
    example: tuple[int, int, int] = (1, 8, 8),
) -> Path:
    """An artefact that answers `label` everywhere. `shift`: of its golden scores, in their own unit. `activation_bits`: what its one layer
    is recorded with; it is a float layer."""
    signature = signature or make_signature()
    answers = make_model(label, signature.channels, len(signature.classes))
    images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, signature.channels)).astype(np.uint8)
    write_artifact(
        path,
        model=model or answers,
        signature=signature,
        golden=[(images, golden_of(answers, images) + np.float32(shift))],
        golden_tolerance={"openvino": {name: GoldenTolerance(max_error=0.05, label_agreement=1) for name in ("f32", "bf16")}},
        example=example,
        layers=[LayerRecord(name="head", kind="Conv2d", weight_bits=32, activation_bits=activation_bits)],
    )
    return path


class Constant(Liveness, ImageSession):
    """Answers its label everywhere, without an engine. `alone`: calls are refused, as of an engine that died several times in a row."""

    def __init__(self, signature: Signature, label: int) -> None:
        Liveness.__init__(self)
        ImageSession.__init__(self, signature=signature, engine="none", precision="f32", threads=1)
        self.label = label
        self.alone = False

    @property
    def able(self) -> bool:
        return not self.alone

    def scores(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = np.zeros(self.signature.scores_shape(*images_BHWC.shape[:3]), np.float32)
        scores[:, self.label] = 1
        return scores


@dataclass
class Shelf:
    """A loader of versions without engines: "3" answers label 3. `trouble`: what opening one raises; `signatures`: where not the usual."""

    trouble: dict[str, Exception] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)

    def open(self, path: Path, *, progress: Callable[[str], None] = print, **_: Any) -> Opened:
        self.tried.append(path.name)
        progress("opening")
        if path.name in self.trouble:
            raise self.trouble[path.name]
        self.opened.append(path.name)
        signature = self.signature_of(path)
        label = int(path.name) % len(signature.classes) if path.name.isdecimal() else 0
        return Opened(session=Constant(signature, label), signature=signature, digest=digest_of(path), calls=())

    def signature_of(self, path: Path) -> Signature:
        return self.signatures.get(path.name, make_signature())


def digest_of(path: Path) -> str:
    return open_artifact(path).digest if path.is_dir() else f"digest of {path.name}"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def eventually(done: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits until `done`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def signature_of() -> Callable[..., Signature]:
    """`signature_of(channels, classes, ...)`: of a segmenting model."""
    return make_signature


@pytest.fixture(scope="session")
def write_version() -> Callable[..., Path]:
    """`write_version(path, label, ...)`: an artefact that answers `label` everywhere."""
    return write


@pytest.fixture(scope="session")
def hostile() -> Any:
    """The module `hostile.py` beside this file."""
    return beside("hostile")


@pytest.fixture(scope="session")
def simulation() -> Any:
    """The module `simulation.py` beside this file."""
    return beside("simulation")


@pytest.fixture(scope="session")
def batching() -> Any:
    """The module `batching.py` beside this file."""
    return beside("batching")


@pytest.fixture(scope="session")
def one_core() -> Any:
    """The module `one_core.py` beside this file."""
    return beside("one_core")


@pytest.fixture
def in_process() -> ArtifactLoader:
    """Opens artefacts in this process."""
    return serving_parts.InProcess(options=SessionOptions(threads=1))


@pytest.fixture
def shelf() -> Shelf:
    """Versions without an engine."""
    return Shelf()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is in a cycle stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def uncollected_starts() -> Iterator[None]:
    """No server collects garbage when it starts: with the objects of all tests it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muntin.serving.server.gc", SimpleNamespace(collect=int, freeze=int, unfreeze=int))
        yield


@pytest.fixture(scope="session")
def make_server() -> Callable[..., Any]:
    """`make_server(path, remote=False, **settings)`: a server on free ports; start it, or use it as a context."""
    return serving_parts.new_server


@pytest.fixture(scope="session")
def socketless() -> Callable[..., Any]:
    """`with socketless(path, **settings) as server`: a server's parts without sockets."""
    return serving_parts.Socketless


@pytest.fixture(scope="session")
def fetch() -> Callable[..., tuple[int, dict[str, str], bytes]]:
    """`fetch(server, path, body=None, headers=None, method=None)`: status, header fields and body of the answer."""
    return serving_parts.fetch_over_http


@pytest.fixture(scope="session")
def call_error() -> type[Exception]:
    """What `Socketless.call` raises: `code`, `details`, `trailing`."""
    return serving_parts.CallError


@pytest.fixture(scope="session")
def ask_app() -> Any:
    """`ask_app(app, method, path, pieces, headers, stays=True)`: sends a request to an ASGI application."""
    return serving_parts.ask_app


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition)`."""
    return eventually


@pytest.fixture(scope="session")
def write_pixels() -> Callable[..., Path]:
    """`write_pixels(path, task=..., sizes=...)`: an artefact whose scores are the pixels' channels, or of a classifier their means.

    `classes`: names and colours; none to restore."""

    def write_it(
        path: Path,
        *,
        task: str = "segment",
        sizes: Sizes = Sizes(),  # noqa: B008 - immutable
        classes: tuple[ClassInfo, ...] | None = None,
    ) -> Path:
        named = make_signature(classes=NAMES[:3]).classes if classes is None else classes
        signature = Signature(task=task, channels=3, classes=named, sizes=sizes)
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw" if task == "classify" else "scores"], name="to_nchw", perm=[0, 3, 1, 2]),
        ]
        shape: list[str | int] = ["B", 3, "H", "W"]
        if task == "classify":
            nodes.append(helper.make_node("ReduceMean", ["nchw", "axes"], ["scores"], name="mean", keepdims=0))
            shape = ["B", 3]
        graph = helper.make_graph(
            nodes,
            "pixels",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")] if task == "classify" else [],
        )
        images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3)).astype(np.uint8)
        scores = images.transpose(0, 3, 1, 2).astype(np.float32)
        write_artifact(
            path,
            model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            signature=signature,
            golden=[(images, scores.mean((2, 3)) if task == "classify" else scores)],
            golden_tolerance={"openvino": {name: GoldenTolerance(max_error=0.05, label_agreement=0.9) for name in ("f32", "bf16")}},
            example=(1, 8, 8),
        )
        return path

    return write_it


@pytest.fixture(scope="session")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that returns its inputs of every type (n,) with one more axis, and the places of the true values. It has no batch."""
    types = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
    names = {name: {"float32": "float", "float64": "double"}.get(name, name) for name in types}
    given = ", ".join(f"{kind}[n] {name}" for name, kind in names.items())
    returned = ", ".join(f"{kind}[1, n] {name}_out" for name, kind in names.items())
    nodes = " ".join(f"{name}_out = Unsqueeze({name}, axis)" for name in types)
    proto = tensor_model(f"({given}) => ({returned}, int64[1, true] places) {{ {nodes} places = NonZero(bool) }}", axis=np.array([0]))
    infos = (
        [(name, name, ("n",)) for name in types],
        [*((f"{name}_out", name, (1, "n")) for name in types), ("places", "int64", (1, "true"))],
    )
    inputs, outputs = (tuple(TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in entries) for entries in infos)
    values = {name: np.arange(1, 4).astype(name) for name in types}
    path = tmp_path_factory.mktemp("types") / "types"
    return write_tensors(path, proto, signature=TensorSignature(inputs=inputs, outputs=outputs), inputs=[values], example={"n": 3}).path
