"""ONNX Runtime: the same numbers as OpenVINO, and honest about which layers are integers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.errors import ArtifactError, DataError, DependencyError
from muntin.runtime import load
from muntin.runtime.engines.onnxruntime import OnnxRuntimeSession, Provider
from muntin.runtime.host.quiet_imports import onnxruntime
from muntin.runtime.options import SessionOptions


def test_integer_reference(convolutions: Any, images_of: Callable[..., Any]) -> None:
    session = load(convolutions.path, engine="onnxruntime")
    images = images_of(3, batch=3, height=17, width=11, seed=9)
    head = convolutions.layers[-1]
    step = float((np.abs(head.weight).max(axis=(1, 2, 3)) * head.weight_scale).max() * head.scale)
    difference = np.abs(session(images) - convolutions.reference(images))
    # biases become int32 here, so a value on the edge between two steps may fall on the other side, in several inputs of one score
    assert difference.max() <= 3 * step
    assert difference.mean() <= step / 20


def test_layers_by_name(convolutions: Any) -> None:
    layers = load(convolutions.path, engine="onnxruntime").layers()
    computed = {layer.name: (layer.kind, layer.precision) for layer in layers if layer.compute}
    assert computed.keys() == {"stem", "body", "depthwise", "head"}
    assert computed["body"] == ("QLinearConv", "i8")
    assert computed["head"] == ("Conv", "f32")  # its output is not quantised again, so the pattern does not fuse


def test_model_of_two_inputs(convolutions: Any, write_layers: Callable[..., Any], tmp_path: Path) -> None:
    model = onnx.load_model_from_string(convolutions.artifact.model_bytes())
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "more"], ["scores"]))
    written = write_layers(tmp_path / "a", convolutions.layers, model=model)
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(ArtifactError):
            load(written.path, engine=engine, precision="f32", shapes=[(1, 4, 4)])


def test_precision_is_f32(convolutions: Any) -> None:
    assert load(convolutions.path, engine="onnxruntime", precision="recorded").precision == "f32"
    for precision in ("bf16", "f16"):
        with pytest.raises(DependencyError, match=f"no {precision} kernels"):
            load(convolutions.path, engine="onnxruntime", precision=precision)


@pytest.mark.parametrize(("threads", "streams", "workers"), [(4, 1, 3), (4, 2, 2), (4, 4, 0), (2, 8, 0)])
def test_threads_of_parallel_calls(convolutions: Any, threads: int, streams: int, workers: int) -> None:
    """Each computes on the thread that makes it; the others are of a pool that all calls share."""
    session = load(convolutions.path, engine="onnxruntime", threads=threads, streams=streams, shapes=())
    assert session._session.get_session_options().intra_op_num_threads == 1 + workers  # type: ignore[attr-defined]
    assert min(threads, session.streams + workers) == session.threads == threads


def test_failed_call_keeps_the_provider(convolutions: Any) -> None:
    """ONNX Runtime would, for good, and say so on standard output alone."""
    assert load(convolutions.path, engine="onnxruntime")._session._enable_fallback is False  # type: ignore[attr-defined]


def test_warm_up_without_computing(convolutions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session, computed = load(convolutions.path, engine="onnxruntime", threads=1, shapes=()), []
    infer = session._infer
    monkeypatch.setattr(session, "_infer", lambda inputs, *rest: (computed.append(inputs["images"].shape), infer(inputs, *rest))[1])
    session.warm_up([(1, 9, 8), (2, 4, 4)], compute=False)
    assert computed == []
    for shape in ((1, 0, 8), (1, 8)):
        with pytest.raises(DataError, match="three whole numbers from 1"):
            session.warm_up([shape], compute=False)  # type: ignore[list-item]
    session.warm_up([(1, 9, 8)])
    assert computed == [(1, 9, 8, 3)]


LOAD = "import sys; from muntin.runtime import load; load(sys.argv[1], engine='onnxruntime')"


def test_home_after_import(per_pixel: Any, tmp_path: Path) -> None:
    hidden = ("CI", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    home = environment | {"HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", LOAD, str(per_pixel.path)], env=home, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has a GPU's provider")
@pytest.mark.parametrize(
    ("engine", "provider"), [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")]
)
def test_gpu_engine_without_a_gpu(convolutions: Any, engine: str, provider: str) -> None:
    with pytest.raises(DependencyError, match=f"needs the {provider}.*CPUExecutionProvider.*pip install onnxruntime-gpu") as caught:
        load(convolutions.path, engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_precision_that_a_gpu_provider_lacks(convolutions: Any, engine: str) -> None:
    with pytest.raises(DependencyError, match="no bf16 kernels"):
        load(convolutions.path, engine=engine, precision="bf16")


def test_provider_that_does_not_start(convolutions: Any) -> None:
    """ONNX Runtime goes on with its CPU provider; AzureExecutionProvider, where a build lists it, runs no local model either."""
    provider = Provider(engine="onnxruntime-cuda", name="CUDAExecutionProvider")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxruntime's own, about the same thing
        with pytest.raises(DependencyError, match="could not start it"):
            OnnxRuntimeSession(convolutions.artifact, provider, SessionOptions(threads=1))
