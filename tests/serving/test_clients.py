"""tritonclient over real sockets: each of its clients, many at once, and versions that change while they ask."""

from __future__ import annotations

import asyncio
import json
import math
import queue
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_aio
from onnx import numpy_helper
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from muntin.serving.server import Server
from muntin.serving.versions.rollout import Rollout
from tensor_models import Array, text_inputs, two_heads, write_tensors

# geventhttpclient, which tritonclient's HTTP client is built on, warns of its own imports and leaves sockets to the collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
FACES = ("http", "grpc")


def images_of(rows: int, seed: int, height: int = 20, width: int = 24) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3)).astype(np.uint8)


class Client:
    """The same questions through either of tritonclient's clients."""

    def __init__(self, server: Server, face: str) -> None:
        self.library: Any = triton_http if face == "http" else triton_grpc
        self.client = self.library.InferenceServerClient(f"127.0.0.1:{server.http_port if face == 'http' else server.grpc_port}")
        self.http, self.model = face == "http", server.slot.name

    def given(self, inputs: dict[str, Array]) -> list[Any]:
        made = [self.library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)) for name, array in inputs.items()]
        return [tensor.set_data_from_numpy(array) for tensor, array in zip(made, inputs.values(), strict=True)]

    def ask(self, inputs: dict[str, Array], *outputs: str, **options: Any) -> tuple[dict[str, Array], str]:
        """The outputs, and the version that gave them."""
        wanted = [self.library.InferRequestedOutput(output) for output in outputs] or None
        result = self.client.infer(self.model, self.given(inputs), outputs=wanted, **options)
        document = result.get_response() if self.http else result.get_response(as_json=True)
        return {output["name"]: result.as_numpy(output["name"]) for output in document["outputs"]}, document["model_version"]

    def labels(self, images: Array) -> Array:
        return self.ask({"images": images}, "labels")[0]["labels"]

    def load(self, version: str) -> None:
        """Through the repository API; neither of tritonclient's methods for it takes a version."""
        if self.http:
            body = json.dumps({"parameters": {"version": version}})
            answer = self.client._post(f"v2/repository/models/{self.model}/load", body, None, None)  # as `load_model` sends it
            if answer.status_code != 200:
                raise InferenceServerException(json.loads(answer.read())["error"])
            return
        request = triton_grpc.service_pb2.RepositoryModelLoadRequest(model_name=self.model)
        request.parameters["version"].string_param = version
        try:
            self.client._client_stub.RepositoryModelLoad(request)
        except Exception as error:
            raise InferenceServerException(str(error)) from error


@contextmanager
def client_of(server: Server, face: str) -> Iterator[Client]:
    client = Client(server, face)
    yield client
    client.client.close()


@pytest.fixture(scope="module")
def pixels(make_server: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose labels are the brightest channel of each pixel."""
    with make_server(write_pixels(tmp_path_factory.mktemp("serving") / "pixels"), max_batch=4) as server:
        yield server


@pytest.mark.parametrize("face", FACES)
def test_every_method(pixels: Server, face: str) -> None:
    with client_of(pixels, face) as client:
        asked, options = client.client, {} if client.http else {"as_json": True}
        assert asked.is_server_live() and asked.is_server_ready() and asked.is_model_ready("pixels")
        assert asked.is_model_ready("pixels", "1") and not asked.is_model_ready("other")
        images = images_of(3, 1)
        outputs, version = client.ask({"images": images}, request_id="a")
        assert (list(outputs), version) == (["labels", "scores"], "1")
        np.testing.assert_array_equal(outputs["labels"], images.argmax(3))
        np.testing.assert_allclose(outputs["scores"], images.transpose(0, 3, 1, 2), rtol=0.01)
        best = client.library.InferRequestedOutput("scores", class_count=1)
        (text, *_) = asked.infer("pixels", client.given({"images": images}), outputs=[best]).as_numpy("scores").ravel()
        assert float(text.split(b":")[0]) == pytest.approx(images[0].max(), rel=0.01)
        with pytest.raises(InferenceServerException, match="5 rows") as caught:
            client.labels(images_of(5, 1))
        assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
        assert asked.get_server_metadata(**options)["name"] == "muntin"
        assert asked.get_model_metadata("pixels", **options)["versions"] == ["1"]
        config = asked.get_model_config("pixels", **options)
        assert (config if client.http else config["config"])["max_batch_size"] == 4
        assert int(asked.get_inference_statistics("pixels", **options)["model_stats"][0]["inference_count"]) >= 3
        asked.unload_model("pixels")
        asked.load_model("pixels")
        index = asked.get_model_repository_index(**options)
        assert (index if client.http else index["models"])[0]["state"] == "READY"
        for unsupported in (asked.get_trace_settings, asked.get_log_settings, asked.get_system_shared_memory_status):
            with pytest.raises(InferenceServerException, match="this server"):
                unsupported()


def test_asynchronous_clients(pixels: Server) -> None:
    images = images_of(2, 9)

    def given(library: Any) -> list[Any]:
        tensor = library.InferInput("images", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        return [tensor]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for model in ("pixels", "other", "pixels"):
            yield {"model_name": model, "inputs": given(triton_grpc)}

    async def ask() -> list[Any]:
        answers = []
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{pixels.http_port}") as client:
            answers += await asyncio.gather(*(client.infer("pixels", given(triton_aio)) for _ in range(5)))
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{pixels.grpc_port}") as client:
            answers += await asyncio.gather(*(client.infer("pixels", given(triton_grpc)) for _ in range(5)))
            answers += [error or result async for result, error in client.stream_infer(requests())]
        return answers

    *answers, before, error, after = asyncio.run(ask())
    for answer in (*answers, before, after):
        np.testing.assert_array_equal(answer.as_numpy("labels"), images.argmax(3))
    assert len(answers) == 10 and "this server has pixels" in str(error)


def test_stream(pixels: Server) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with client_of(pixels, "grpc") as client:
        client.client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for seed in range(6):
            client.client.async_stream_infer("pixels", client.given({"images": images_of(2, seed)}), request_id=str(seed))
        for seed in range(6):
            result, error = answers.get(timeout=30)
            assert error is None and result.get_response().id == str(seed)
            np.testing.assert_array_equal(result.as_numpy("labels"), images_of(2, seed).argmax(3))
        client.client.stop_stream()


def test_concurrent_clients(pixels: Server) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        with client_of(pixels, FACES[number % 2]) as client:
            for turn in range(12):
                seed = 1000 * number + turn
                images = images_of(1 + turn % 3, seed, 16 + 8 * (turn % 2), 20)
                if not np.array_equal(client.labels(images), images.argmax(3)):
                    wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- versions ----


@contextmanager
def asking(server: Server, ask: Callable[[Client, int], str]) -> Iterator[set[str]]:
    """Four clients that ask again and again while the block runs. `ask`: checks an answer, and returns its version. Yields those seen."""
    seen, problems, stop = set[str](), list[BaseException](), threading.Event()

    def run(number: int) -> None:
        try:
            with client_of(server, FACES[number % 2]) as client:
                while not stop.wait(0.002):
                    seen.add(ask(client, number))
        except BaseException as error:  # noqa: BLE001 - raised below
            problems.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []


def test_version_changes_under_load(make_server: Any, write_version: Any, tmp_path: Path, wait_until: Any) -> None:
    """Versions come through the watched folder and through both faces, sound ones and broken ones; every answer is whole and of the
    version that it names."""
    models, told = tmp_path / "models", list[str]()
    write_version(models / "1", label=1)
    # how slow a version of some microseconds is beside another says something of the machine alone: judged in `test_rollout`
    rollout = Rollout(for_seconds=0.2, max_slowdown=math.inf)

    def ask(client: Client, number: int) -> str:
        images = images_of(1 + number % 2, number, 8, 8)
        outputs, version = client.ask({"images": images}, "labels")
        assert outputs["labels"].shape == images.shape[:3] and set(np.unique(outputs["labels"])) == {int(version) % 4}
        return version

    def come(name: str, **fields: Any) -> Path:
        return write_version(tmp_path / "new" / name, **fields).rename(models / name)

    (tmp_path / "new").mkdir()
    settings = {"watch": True, "watch_seconds": 0.05, "rollout": rollout, "name": "m", "max_batch": 4}
    with make_server(models, notify=told.append, **settings) as server, asking(server, ask) as seen:
        wait_until(lambda: "1" in seen)
        come("2", label=2)
        wait_until(lambda: "2" in seen)
        broken = write_version(tmp_path / "new" / "3", label=3)
        weights = broken / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        broken.rename(models / "3")
        come("4", label=0, shift=50.0)
        for name in "34":
            wait_until(lambda name=name: any(f"version {name} is not loaded" in line for line in told))
        come("5", label=1)
        wait_until(lambda: "5" in seen)
        for face, version in (("http", "2"), ("grpc", "1")):
            with client_of(server, face) as client:
                client.load(version)
                assert server.slot.current.name == version
                with pytest.raises(InferenceServerException, match=r"not loaded.*what served goes on"):
                    client.load("4")
                assert server.slot.current.name == version, told
    assert seen == {"1", "2", "5"}


@pytest.mark.slow
def test_swap_of_named_tensors(make_server: Any, fetch: Any, tmp_path: Path, wait_until: Any) -> None:
    """With engines in processes of their own."""
    opposite = two_heads()
    (weight,) = [item for item in opposite.graph.initializer if item.name == "out"]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "out"))
    write_tensors(tmp_path / "models" / "1")
    write_tensors(tmp_path / "2", opposite)
    inputs, due = text_inputs(2, 8), dict[str, Array]()

    def ask(client: Client, _: int) -> str:
        outputs, version = client.ask(inputs, "embedding")
        np.testing.assert_array_equal(outputs["embedding"], due.setdefault(version, outputs["embedding"]))
        return version

    with make_server(tmp_path / "models", remote=True, watch=True, watch_seconds=0.1) as server, asking(server, ask) as seen:
        wait_until(lambda: seen == {"1"})
        shutil.copytree(tmp_path / "2", tmp_path / "models" / ".2")
        (tmp_path / "models" / ".2").rename(tmp_path / "models" / "2")
        wait_until(lambda: seen == {"1", "2"})
        lines = dict(line.rsplit(" ", 1) for line in fetch(server, "/metrics")[2].decode().splitlines())
        assert float(lines['muntin_engine_resident_memory_bytes{version="2"}']) > 10 << 20
    np.testing.assert_allclose(due["2"], -due["1"], rtol=0.02, atol=0.05)
