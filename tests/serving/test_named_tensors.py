"""Models with named inputs and outputs behind the whole server, through both of tritonclient's clients."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import numpy_helper
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from muntin.artifact import TensorInfo, TensorSignature, open_any_artifact
from muntin.runtime.engines.registry import load
from muntin.serving.config import ServeConfig
from muntin.serving.server import Server
from muntin.serving.versions.version import RefusedError
from tensor_models import SIGNATURE, Array, model, text_inputs, two_heads, write_tensors

# geventhttpclient, which tritonclient's HTTP client is built on, warns of its own imports and leaves sockets to the collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")


def served(path: Path, **options: Any) -> Server:
    return Server(path, ServeConfig(**({"http_port": 0, "grpc_port": 0, "threads": 1, "name": "m"} | options)))


def opposite() -> onnx.ModelProto:
    """`two_heads` with the signs of its embedding changed."""
    proto = two_heads()
    (weight,) = [item for item in proto.graph.initializer if item.name == "out"]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "out"))
    return proto


def write_all_types(path: Path) -> None:
    """A model that returns its inputs of every type with one more axis, and the places of the true values. It has no batch."""
    onnx_names = {name: "float" if name == "float32" else "double" if name == "float64" else name for name in TYPES}
    given = ", ".join(f"{kind}[n] {name}" for name, kind in onnx_names.items())
    returned = ", ".join(f"{kind}[1, n] {name}_out" for name, kind in onnx_names.items())
    nodes = "\n".join(f"{name}_out = Unsqueeze({name}, axis)" for name in TYPES)
    proto = model(f"({given}) => ({returned}, int64[1, true] places) {{ {nodes} places = NonZero(bool) }}", axis=np.array([0]))
    inputs = tuple(TensorInfo(name=name, dtype=name, shape=("n",)) for name in TYPES)  # type: ignore[arg-type]
    outputs = tuple(TensorInfo(name=f"{name}_out", dtype=name, shape=(1, "n")) for name in TYPES)  # type: ignore[arg-type]
    places = TensorInfo(name="places", dtype="int64", shape=(1, "true"))
    signature = TensorSignature(inputs=inputs, outputs=(*outputs, places))
    write_tensors(path, proto, signature=signature, inputs=[of_all_types(3)], example={"n": 3})


def of_all_types(count: int) -> dict[str, Array]:
    values = np.arange(count) % 100 + 1
    return {name: values.astype(name) for name in TYPES}


class Client:
    """The same questions through either of tritonclient's clients."""

    def __init__(self, server: Server, face: str) -> None:
        self.library: Any = triton_http if face == "http" else triton_grpc
        port = server.http_port if face == "http" else server.grpc_port
        self.client = self.library.InferenceServerClient(f"127.0.0.1:{port}")
        self.http = face == "http"

    def given(self, inputs: dict[str, Array], *, binary: bool = True) -> list[Any]:
        tensors = []
        for name, array in inputs.items():
            tensor = self.library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array, **({"binary_data": binary} if self.http else {}))
            tensors.append(tensor)
        return tensors

    def ask(self, inputs: dict[str, Array], *outputs: str, binary: bool = True) -> tuple[dict[str, Array], str]:
        """The outputs, and the version that gave them."""
        options = {"binary_data": binary} if self.http else {}
        wanted = [self.library.InferRequestedOutput(output, **options) for output in outputs] or None
        result = self.client.infer("m", self.given(inputs, binary=binary), outputs=wanted)
        document = result.get_response() if self.http else result.get_response(as_json=True)
        return {output["name"]: result.as_numpy(output["name"]) for output in document["outputs"]}, document["model_version"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of the model of texts."""
    folder = tmp_path_factory.mktemp("named")
    write_tensors(folder / "1")
    write_tensors(folder / "2", opposite())
    return folder


@pytest.fixture(scope="module")
def sessions(folder: Path) -> dict[str, Any]:
    return {name: load(folder / name, threads=1) for name in ("1", "2")}


@pytest.fixture(scope="module")
def texts(folder: Path) -> Iterator[Server]:
    with served(folder / "1", max_batch=8) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def client(texts: Server, request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(texts, request.param)
    yield client
    client.client.close()


def check(answer: dict[str, Array], due: dict[str, Array]) -> None:
    for name, array in answer.items():
        np.testing.assert_allclose(array, due[name], rtol=0.02, atol=0.05)
        assert array.dtype == due[name].dtype


@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (8, 8), (3, 5)])
def test_all_outputs_and_one(client: Client, sessions: dict[str, Any], batch: int, tokens: int) -> None:
    inputs = text_inputs(batch, tokens, seed=batch)
    due = sessions["1"](inputs)
    answer, version = client.ask(dict(reversed(inputs.items())))  # in any order
    assert (list(answer), version) == (["embedding", "label"], "1")
    check(answer, due)
    (label, _), (both, _) = client.ask(inputs, "label"), client.ask(inputs, "label", "embedding", binary=False)
    assert (list(label), list(both)) == (["label"], ["label", "embedding"])
    check(label, due)
    check(both, due)


def test_metadata(client: Client) -> None:
    options = {} if client.http else {"as_json": True}
    metadata, config = client.client.get_model_metadata("m", **options), client.client.get_model_config("m", **options)
    sizes = [list(map(int, tensor.get("shape", []))) for tensor in (*metadata["inputs"], *metadata["outputs"])]
    assert sizes == [[-1, -1], [-1, -1], [-1, 24], [-1]]
    assert [tensor["datatype"] for tensor in (*metadata["inputs"], *metadata["outputs"])] == ["INT64", "BOOL", "FP32", "INT64"]
    config = config if client.http else config["config"]
    assert (config["max_batch_size"], "dynamic_batching" in config) == (8, True)
    assert client.client.is_model_ready("m")


def without(name: str) -> dict[str, Array]:
    return {other: array for other, array in text_inputs(2, 4).items() if other != name}


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (without("mask"), (), r"no input mask: give ids int64 \(batch, tokens\), mask bool"),
        (text_inputs(2, 4) | {"more": np.zeros((2, 4), np.float32)}, (), "more, which is no input"),
        (without("ids") | {"ids": np.zeros((2, 4), np.int32)}, (), r'input "ids" is INT32: the model takes INT64 \(batch, tokens\)'),
        (
            without("ids") | {"ids": np.zeros((2, 5), np.int64)},
            (),
            "tokens is . in another tensor of the call",
        ),
        (without("ids") | {"ids": np.zeros(2, np.int64)}, (), r"has the shape \(2,\)"),
        (text_inputs(2, 4) | {"ids": np.full((2, 4), 1 << 40)}, (), "computes integers in 32 bits"),
        (text_inputs(9, 4), (), "9 rows: this server computes at most 8 at once"),
        (text_inputs(2, 4), ("logits",), "output 'logits': the model gives embedding and label"),
    ],
)
def test_refused_inputs(client: Client, inputs: dict[str, Array], outputs: tuple[str, ...], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.ask(inputs, *outputs)
    assert str(caught.value.status()) in ("400", "StatusCode.INVALID_ARGUMENT")


def test_best_classes(client: Client, sessions: dict[str, Any]) -> None:
    inputs = text_inputs(2, 8)
    wanted = client.library.InferRequestedOutput("embedding", class_count=2)
    strings = client.client.infer("m", client.given(inputs), outputs=[wanted]).as_numpy("embedding")
    best = [int(row[0].decode().split(":")[1]) for row in strings]
    assert (strings.shape, best) == ((2, 2), sessions["1"](inputs)["label"].tolist())


def test_stream(texts: Server, sessions: dict[str, Any]) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client = Client(texts, "grpc")
    requests = {str(number): text_inputs(2, 8, seed=number) for number in range(6)}
    client.client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for name, inputs in requests.items():
        client.client.async_stream_infer("m", client.given(inputs), request_id=name)
    for _ in requests:
        result, error = answers.get(timeout=30)
        assert error is None
        due = sessions["1"](requests[result.get_response().id])
        check({name: result.as_numpy(name) for name in due}, due)
    client.client.stop_stream()
    client.client.close()


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/predict", b"\x89PNG", "the model takes named tensors"),
        ("/v2/models/m/infer", b"12345678", "raw bytes without JSON"),
    ],
)
def test_bodies_for_models_of_images(texts: Server, path: str, body: bytes, message: str) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{texts.http_port}{path}", body, headers), timeout=30)
    with caught.value as error:
        assert error.code == 400
        assert message in json.loads(error.read())["error"]


@pytest.mark.skipif(sys.platform == "win32", reason="no process of its own")
def test_requests_join_in_batches(texts: Server, sessions: dict[str, Any]) -> None:
    """While the engine is stopped requests wait, those of one size in one group."""
    client = Client(texts, "http")
    for seed in range(3):  # its latency is known
        client.ask(text_inputs(1, 8, seed=seed))
    requests = [text_inputs(1 + number % 2, 8 if number % 3 else 6, seed=number) for number in range(16)]
    before = texts.slot.current
    assert before is not None
    (process,) = before.liveness.process_ids

    def ask(inputs: dict[str, Array]) -> dict[str, Array]:
        own = Client(texts, "http")
        answer, _ = own.ask(inputs)
        own.client.close()
        return answer

    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(ask, inputs) for inputs in requests]
        time.sleep(0.5)
        os.kill(process, signal.SIGCONT)
        for inputs, answer in zip(requests, answers, strict=True):
            check(answer.result(), sessions["1"](inputs))
    statistics = client.client.get_inference_statistics("m")["model_stats"][0]
    assert max(entry["batch_size"] for entry in statistics["batch_stats"]) > 2
    client.client.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no process of its own")
def test_engine_is_started_again(texts: Server, sessions: dict[str, Any]) -> None:
    client, inputs, version = Client(texts, "grpc"), text_inputs(2, 8), texts.slot.current
    assert version is not None
    running = version.session._running  # type: ignore[union-attr]
    running.process.kill()
    running.process.wait(20)
    check(client.ask(inputs)[0], sessions["1"](inputs))
    assert version.deaths == 1
    client.client.close()


def test_swap_while_requests_run(folder: Path, sessions: dict[str, Any], tmp_path: Path) -> None:
    inputs, over, versions, problems = text_inputs(2, 8), threading.Event(), set[str](), list[BaseException]()
    due = {name: session(inputs) for name, session in sessions.items()}
    shutil.copytree(folder / "1", tmp_path / "1")
    with served(tmp_path, max_batch=2, watch=True, watch_seconds=0.1) as server:

        def ask(face: str) -> None:
            client = Client(server, face)
            try:
                while not over.is_set():
                    answer, version = client.ask(inputs)
                    check(answer, due[version])
                    versions.add(version)
            except BaseException as error:  # noqa: BLE001 - the test raises it
                problems.append(error)
            client.client.close()

        clients = [threading.Thread(target=ask, args=(face,)) for face in ("http", "grpc", "http")]
        for thread in clients:
            thread.start()
        shutil.copytree(folder / "2", tmp_path / ".2")
        (tmp_path / ".2").rename(tmp_path / "2")
        deadline = time.monotonic() + 20
        while versions != {"1", "2"} and not problems and time.monotonic() < deadline:
            time.sleep(0.01)
        over.set()
        for thread in clients:
            thread.join()
    assert (problems, versions) == ([], {"1", "2"})


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_every_type_and_sizes_by_values(tmp_path: Path, engine: str) -> None:
    """No batch: each request is computed alone. The last output is larger than the memory that its sizes were reckoned with."""
    write_all_types(tmp_path / "types")
    assert open_any_artifact(tmp_path / "types").manifest.signature.batch is None  # type: ignore[attr-defined]
    with served(tmp_path / "types", engine=engine) as server:
        for face in ("http", "grpc"):
            client = Client(server, face)
            for count in (5, 22_310):
                answer, _ = client.ask(inputs := of_all_types(count))
                for name, array in inputs.items():
                    np.testing.assert_array_equal(answer[f"{name}_out"], array[None])
                    assert answer[f"{name}_out"].dtype == name
                np.testing.assert_array_equal(answer["places"], np.arange(count)[None])
            client.client.close()
        text = Client(server, "http")
        answer, _ = text.ask(inputs := of_all_types(4), "bool_out", "uint64_out", "float32_out", binary=False)
        for name, array in answer.items():
            np.testing.assert_array_equal(array, inputs[name.removesuffix("_out")][None])
        text.client.close()


def test_contract_of_a_new_version(tmp_path: Path, texts: Server) -> None:
    narrower = SIGNATURE.model_copy(update={"outputs": SIGNATURE.outputs[:1]})
    proto = two_heads()
    del proto.graph.output[1]
    write_tensors(tmp_path / "3", proto, signature=narrower)
    with pytest.raises(RefusedError, match=r"output 1 is none where label int64 \(batch\) is served"):
        texts.slot.load(tmp_path / "3", "3")
