"""The whole server, as its users meet it: real clients of the protocol, real sockets, a real engine."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import math
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from muntin.artifact import Sides, Sizes
from muntin.errors import ArtifactError, DataError
from muntin.images import encode_png
from muntin.serving.config import Bounds, ServeConfig
from muntin.serving.http.image_route import ImageRoute
from muntin.serving.inference.executor import Executor
from muntin.serving.inference.outputs import CLASSES
from muntin.serving.server import Server
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.repository import Watcher
from muntin.serving.versions.rollout import Rollout
from muntin.serving.worker.opening import NotReadyError

# geventhttpclient, which tritonclient's HTTP client is built on, warns of its own imports and leaves sockets to the collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def images_of(rows: int, seed: int, height: int = 20, width: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3)).astype(np.uint8)


def served(path: Path, **options: Any) -> Server:
    return Server(path, ServeConfig(**({"http_port": 0, "grpc_port": 0, "threads": 1} | options)))


def test_model_name_from_folder_or_link(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    path = write_pixels(tmp_path / "release 5")
    (tmp_path / "live").symlink_to(path)
    assert served(path).slot.name == "release-5"
    assert served(tmp_path / "live").slot.name == "live"  # clients go on when the link is moved on
    assert served(path / "..").slot.name == served(tmp_path).slot.name


@pytest.fixture(scope="module")
def pixels(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose labels are the brightest channel of each pixel."""
    with served(write_pixels(tmp_path_factory.mktemp("serving") / "pixels"), max_batch=4) as server:
        yield server


@pytest.fixture(scope="module")
def classes(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(write_pixels(tmp_path_factory.mktemp("serving") / "classes", task="classify")) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Client:
    """The same questions through either of tritonclient's clients."""

    def __init__(self, server: Server, face: str) -> None:
        self.library: Any = triton_http if face == "http" else triton_grpc
        port = server.http_port if face == "http" else server.grpc_port
        self.client = self.library.InferenceServerClient(f"127.0.0.1:{port}")
        self.http = face == "http"

    def ask(
        self, images: NDArray[Any], *outputs: str, name: str = "images", model: str = "pixels", **options: Any
    ) -> dict[str, NDArray[Any]]:
        datatype = {"uint8": "UINT8", "float32": "FP32"}[images.dtype.name]
        given = self.library.InferInput(name, images.shape, datatype)
        given.set_data_from_numpy(images)
        wanted = [self.library.InferRequestedOutput(output) for output in outputs] or None
        result = self.client.infer(model, [given], outputs=wanted, **options)
        document = result.get_response() if self.http else result.get_response(as_json=True)
        return {output["name"]: result.as_numpy(output["name"]) for output in document["outputs"]}


@pytest.fixture
def client(pixels: Server, face: str) -> Iterator[Client]:
    made = Client(pixels, face)
    yield made
    made.client.close()


def test_labels_and_scores(client: Client) -> None:
    images = images_of(3, 1)
    found = client.ask(images)
    assert set(found) == {"labels", "scores"}
    np.testing.assert_array_equal(found["labels"], images.argmax(3))
    np.testing.assert_allclose(found["scores"], images.transpose(0, 3, 1, 2), rtol=0.01)
    only = client.ask(images, "labels")
    assert set(only) == {"labels"}
    assert only["labels"].dtype == np.uint8
    np.testing.assert_array_equal(only["labels"], found["labels"])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (129, 65)])
def test_image_sizes(client: Client, height: int, width: int) -> None:
    images = images_of(2, 2, height, width)
    np.testing.assert_array_equal(client.ask(images, "labels")["labels"], images.argmax(3))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (images_of(5, 1), {}, "5 rows.*at most 4"),
        (images_of(1, 1)[..., :2], {}, r"UINT8 \(1, 20, 24, 2\).*height, width, 3"),
        (images_of(1, 1)[0], {}, r"UINT8 \(20, 24, 3\)"),
        (images_of(1, 1).astype(np.float32), {}, "FP32"),
        (images_of(1, 1), {"name": "picture"}, "'picture'.*images"),
        (images_of(1, 1), {"model": "other"}, "'other'.*this server has pixels"),
        (images_of(1, 1), {"model_version": "9"}, "no version '9': there is 1"),
        (images_of(1, 1), {"sequence_id": 4}, "sequence"),
    ],
)
def test_refused_inputs(client: Client, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message):
        client.ask(images, **options)


def test_unknown_output(client: Client) -> None:
    with pytest.raises(InferenceServerException, match=r"'masks'.*labels and scores"):
        client.ask(images_of(1, 1), "masks")


def test_metadata_statistics_and_index(client: Client) -> None:
    asked = client.client
    assert asked.is_server_live()
    assert asked.is_server_ready()
    assert asked.is_model_ready("pixels")
    assert asked.is_model_ready("pixels", "1")
    assert not asked.is_model_ready("other")
    assert not asked.is_model_ready("pixels", "9")
    options = {} if client.http else {"as_json": True}
    metadata = asked.get_model_metadata("pixels", **options)
    assert [(o["name"], o["datatype"], [int(n) for n in o["shape"]]) for o in metadata["outputs"]] == [
        ("labels", "UINT8", [-1, -1, -1]),
        ("scores", "FP32", [-1, 3, -1, -1]),
    ]
    configuration = asked.get_model_config("pixels", **options)
    configuration = configuration if client.http else configuration["config"]
    assert configuration["max_batch_size"] == 4
    before = asked.get_inference_statistics("pixels", **options)["model_stats"][0]
    client.ask(images_of(2, 5))
    after = asked.get_inference_statistics("pixels", **options)["model_stats"][0]
    assert int(after["inference_count"]) - int(before.get("inference_count", 0)) == 2
    index = asked.get_model_repository_index(**options)
    assert (index if client.http else index["models"])[0]["state"] == "READY"


def test_health_in_json(pixels: Server) -> None:
    """As KServe's own client reads it."""
    assert fetch(pixels, "/v2/")[::2] == fetch(pixels, "/v2")[::2]
    found = [json.loads(fetch(pixels, path)[2]) for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/pixels/ready")]
    assert found == [{"live": True}, {"live": True, "ready": True}, {"name": "pixels", "ready": True}]


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "Deflate", "Identity", ""])
def test_content_codings(pixels: Server, coding: str) -> None:
    body = zlib.compress(_ASKED, wbits=31) if "gzip" in coding.lower() else zlib.compress(_ASKED) if coding == "Deflate" else _ASKED
    assert fetch(pixels, "/v2/models/pixels/infer", body, {"Content-Encoding": coding})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"},
    ],
)
def test_packed_picture(pixels: Server, headers: dict[str, str]) -> None:
    status, _, answer = fetch(pixels, "/predict", b"x" * 50_000, headers)
    assert (status, "'gzip': only requests for inference" in json.loads(answer)["error"]) == (415, True)
    assert fetch(pixels, "/predict", encoded(images_of(1, 7)[0], "PNG"), {"Content-Encoding": "Identity"})[0] == 200


@pytest.mark.parametrize(
    ("packed", "status", "message"),
    [
        (zlib.compress(b"x" * 3_000_000), 413, "2,000,000"),
        (zlib.compress(b"{}")[:-3], 400, "ends too early"),
        (zlib.compress(b"{}") + b"more", 400, "something follows"),
        (b"no zip", 400, "neither gzip nor deflate"),
    ],
)
def test_bodies_packed_wrongly(write_pixels: Callable[..., Path], tmp_path: Path, packed: bytes, status: int, message: str) -> None:
    with served(write_pixels(tmp_path / "pixels"), grpc_port=None, bounds=Bounds(body_bytes=2_000_000)) as server:
        found, _, answer = fetch(server, "/v2/models/pixels/infer", packed, {"Content-Encoding": "deflate"})
        assert found == status and message in json.loads(answer)["error"]
        found, _, answer = fetch(server, "/v2/models/pixels/infer", b"x", {"Content-Encoding": "br"})
        assert found == 415 and "gzip, deflate" in json.loads(answer)["error"]


def test_large_answer_in_json(pixels: Server) -> None:
    images = images_of(1, 8, 600, 700)
    asked = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.size}}]}
    head = json.dumps(asked).encode()
    status, headers, body = fetch(
        pixels, "/v2/models/pixels/infer", head + images.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    )
    assert status == 200 and headers["content-type"] == "application/json"
    outputs = {output["name"]: output for output in json.loads(body)["outputs"]}
    np.testing.assert_array_equal(np.array(outputs["labels"]["data"]).reshape(600, 700), images[0].argmax(2))
    assert len(outputs["scores"]["data"]) == images.size


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/models/pixels/load", b""),
        ("/v2/repository/models/pixels/unload", b""),
        ("/predict", b"a picture"),
        ("/v2/models/pixels", None),
        ("/metrics", None),
        ("/page/status", None),
    ],
)
def test_request_of_a_web_page(pixels: Server, headers: dict[str, str], path: str, body: bytes | None) -> None:
    """A request that a browser sends without asking before."""
    status, _, answer = fetch(pixels, path, body, {"Content-Type": "text/plain", **headers})
    assert (status, "evil.example" in json.loads(answer)["error"]) == (403, True)
    assert fetch(pixels, "/v2/models/pixels/ready")[0] == 200
    assert fetch(pixels, "/v2/health/ready", None, headers)[0] == 200


def test_no_redirect_to_the_requested_host(pixels: Server) -> None:
    for host, due in (("evil.example", 403), ("localhost", 404)):
        status, headers, _ = fetch(pixels, "/v2/health/ready/", None, {"Host": host})
        assert (status, "location" in headers) == (due, False)


def test_unsupported_extensions(client: Client) -> None:
    asked = client.client
    for ask, name in (
        (asked.get_trace_settings, "trace settings"),
        (lambda: asked.update_trace_settings("pixels", {"trace_level": "OFF"}), "trace settings"),
        (asked.get_log_settings, "log settings"),
        (lambda: asked.update_log_settings({"log_info": False}), "log settings"),
        (asked.get_system_shared_memory_status, "shared memory"),
        (lambda: asked.register_system_shared_memory("a", "/a", 1), "shared memory"),
        (asked.unregister_cuda_shared_memory, "shared memory"),
    ):
        with pytest.raises(InferenceServerException, match=f"{name}: this server") as caught:
            ask()
        assert caught.value.status() in ("501", "StatusCode.UNIMPLEMENTED")


def test_other_methods(pixels: Server) -> None:
    with socket.create_connection(("127.0.0.1", pixels.http_port), timeout=10) as connection:
        connection.sendall(
            b"HEAD /v2/models/pixels/infer HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
    first, second = found.split(b"\r\n\r\n", 1)
    assert first.startswith(b"HTTP/1.1 405 ") and b"allow: POST" in first
    assert second.startswith(b"HTTP/1.1 200 ")  # what answers HEAD has no body


def test_json_client(pixels: Server) -> None:
    images = images_of(1, 3, 4, 5)
    request = {"id": "a1", "inputs": [{"name": "images", "datatype": "UINT8", "shape": images.shape, "data": images.tolist()}]}
    answer = json.loads(fetch(pixels, "/v2/models/pixels/versions/1/infer", json.dumps(request).encode())[2])
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a1", "pixels", "1")
    labels = next(output for output in answer["outputs"] if output["name"] == "labels")
    assert labels["data"] == images.argmax(3).ravel().tolist()


def test_image_without_json(pixels: Server) -> None:
    images = images_of(1, 3, 16, 16)
    status, headers, body = fetch(pixels, "/v2/models/pixels/infer", images.tobytes(), {"Inference-Header-Content-Length": "0"})
    assert status == 200
    at = int(headers["inference-header-content-length"])
    names = [output["name"] for output in json.loads(body[:at])["outputs"]]
    assert names == ["labels", "scores"]
    assert body[at : at + 256] == images.argmax(3).astype(np.uint8).tobytes()


def test_concurrent_clients(pixels: Server, face: str) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        client = Client(pixels, face)
        for turn in range(25):
            seed = 1000 * number + turn
            images = images_of(1 + turn % 3, seed, 16 + 8 * (turn % 2), 20)
            if not np.array_equal(client.ask(images, "labels", request_id=str(seed))["labels"], images.argmax(3)):
                wrong.append(seed)
        client.client.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_asynchronous_client(pixels: Server) -> None:
    images = images_of(2, 9)

    async def ask() -> NDArray[Any]:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{pixels.http_port}") as client:
            given = triton_aio.InferInput("images", images.shape, "UINT8")
            given.set_data_from_numpy(images)
            results = await asyncio.gather(*(client.infer("pixels", [given]) for _ in range(5)))
            return np.stack([result.as_numpy("labels") for result in results])

    np.testing.assert_array_equal(asyncio.run(ask()), np.stack([images.argmax(3)] * 5))


def test_asynchronous_grpc_client(pixels: Server) -> None:
    images = images_of(2, 9)
    given = triton_grpc.InferInput("images", images.shape, "UINT8")
    given.set_data_from_numpy(images)

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for model in ("pixels", "other", "pixels"):
            yield {"model_name": model, "inputs": [given]}

    async def ask() -> tuple[NDArray[Any], list[Any]]:
        async with triton_grpc_aio.InferenceServerClient(f"127.0.0.1:{pixels.grpc_port}") as client:
            results = await asyncio.gather(*(client.infer("pixels", [given]) for _ in range(5)))
            streamed = [error or result.as_numpy("labels") async for result, error in client.stream_infer(requests())]
            return np.stack([result.as_numpy("labels") for result in results]), streamed

    found, (first, error, last) = asyncio.run(ask())
    np.testing.assert_array_equal(found, np.stack([images.argmax(3)] * 5))
    np.testing.assert_array_equal([first, last], [images.argmax(3)] * 2)
    assert "this server has pixels" in str(error)


def test_classifier(classes: Server, face: str) -> None:
    client = Client(classes, face)
    images = images_of(2, 1)
    images[0, :, :, 2] = 255
    images[1, :, :, 0] = 255
    found = client.ask(images, model="classes")
    np.testing.assert_array_equal(found["labels"], [2, 0])
    assert found["scores"].shape == (2, 3)
    wanted = client.library.InferRequestedOutput("scores", class_count=1)
    given = client.library.InferInput("images", images.shape, "UINT8")
    given.set_data_from_numpy(images)
    best = client.client.infer("classes", [given], outputs=[wanted]).as_numpy("scores")
    assert [text.decode().split(":")[1:] for text in best.ravel()] == [["2", "roof"], ["0", "sea"]]
    client.client.close()


def test_number_of_best_classes(pixels: Server, face: str) -> None:
    client, images = Client(pixels, face), images_of(4, 1, 80, 100)

    def ask(count: int) -> Any:
        given = client.library.InferInput("images", images.shape, "UINT8")
        given.set_data_from_numpy(images)
        wanted = client.library.InferRequestedOutput("scores", class_count=count)
        return client.client.infer("pixels", [given], outputs=[wanted]).as_numpy("scores")

    found = ask(CLASSES // 4).reshape(4, -1)
    assert found.shape == (4, CLASSES // 4)
    assert [text.split(b":")[0] for text in found[:, 0]] == [b"255.0"] * 4
    with pytest.raises(InferenceServerException, match=r"4 rows asks for 65,540 classes: .* at most 65,536"):
        ask(CLASSES // 4 + 1)
    client.client.close()


# ---- pictures ----


def encoded(image: NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def test_picture_outputs(pixels: Server) -> None:
    image = images_of(1, 7, 40, 50)[0]
    status, headers, body = fetch(pixels, "/predict", encoded(image, "PNG"))
    assert (status, headers["content-type"], headers["x-model-version"]) == (200, "image/png", "1")
    mask = Image.open(io.BytesIO(body))
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.array(mask), image.argmax(2))
    grey = np.array(Image.open(io.BytesIO(fetch(pixels, "/predict?output=labels", encoded(image, "PNG"))[2])))
    np.testing.assert_array_equal(grey, image.argmax(2))
    shares = json.loads(fetch(pixels, "/predict?output=json", encoded(image, "PNG"))[2])
    assert [entry["share"] for entry in shares["classes"]] == pytest.approx([float((image.argmax(2) == k).mean()) for k in range(3)])
    over = np.array(Image.open(io.BytesIO(fetch(pixels, "/predict?output=overlay", encoded(image, "WEBP"))[2])))
    assert over.shape == image.shape


@pytest.fixture(scope="module")
def many(
    write_version: Callable[..., Path], signature_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """300 classes; the last one is every pixel's."""
    signature = signature_of(classes=tuple(f"class {number}" for number in range(300)))
    with served(write_version(tmp_path_factory.mktemp("serving") / "many", 299, signature=signature)) as server:
        yield server


def test_labels_of_many_classes(many: Server, face: str) -> None:
    client, images = Client(many, face), images_of(2, 1)
    described = client.client.get_model_metadata("many", **({} if client.http else {"as_json": True}))
    assert [output["datatype"] for output in described["outputs"]] == ["UINT16", "FP32"]
    for outputs in ((), ("labels",)):
        labels = client.ask(images, *outputs, model="many")["labels"]
        assert (labels.dtype, labels.shape) == (np.uint16, images.shape[:3])
        assert (labels == 299).all()
    client.client.close()


@pytest.mark.parametrize("output", ["mask", "labels"])
def test_picture_of_many_classes(many: Server, output: str) -> None:
    """16 bits a pixel, because a palette has at most 256 colours."""
    image = encoded(images_of(1, 1)[0], "PNG")
    labels = np.array(Image.open(io.BytesIO(fetch(many, f"/predict?output={output}", image)[2])))
    assert (labels == 299).all()
    document = json.loads(fetch(many, "/predict?output=json", image)[2])
    assert document["classes"][299] == {"name": "class 299", "share": 1.0}
    assert fetch(many, "/predict?output=overlay", image)[0] == 200


def test_large_picture(pixels: Server) -> None:
    image = images_of(1, 7, 1100, 1300)[0]
    mask = np.array(Image.open(io.BytesIO(fetch(pixels, "/predict", encoded(image, "PNG"))[2])))
    assert (mask == image.argmax(2)).mean() > 0.999


@pytest.fixture(scope="module")
def sized(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Even heights up to 16 and a width of 8."""
    sizes = Sizes(height=Sides(min=2, max=16, multiple=2), width=Sides(min=8, max=8))
    with served(write_pixels(tmp_path_factory.mktemp("serving") / "sized", sizes=sizes), max_batch=4) as server:
        yield server


def test_requests_of_other_sizes(sized: Server, face: str) -> None:
    client = Client(sized, face)
    images = images_of(3, 1, 12, 8)
    np.testing.assert_array_equal(client.ask(images, "labels", model="sized")["labels"], images.argmax(3))
    message = "images of 7 x 9 pixels: the model takes height multiples of 2 from 2 to 16 and width 8: resize or pad them to 8 x 8"
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.ask(images_of(1, 1, 7, 9), model="sized")
    assert client.http is ("400" in str(caught.value.status()))
    metadata = client.client.get_model_metadata("sized", **({} if client.http else {"as_json": True}))
    shapes = {entry["name"]: [int(n) for n in entry["shape"]] for entry in (*metadata["inputs"], *metadata["outputs"])}
    assert shapes == {"images": [-1, -1, 8, 3], "labels": [-1, -1, 8], "scores": [-1, 3, -1, 8]}
    client.client.close()


@pytest.mark.parametrize(("height", "width"), [(5, 3), (16, 8), (21, 30)])
def test_pictures_of_other_sizes(sized: Server, height: int, width: int) -> None:
    image = images_of(1, 7, height, width)[0]
    status, _, body = fetch(sized, "/predict?output=labels", encoded(image, "PNG"))
    assert status == 200
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(body))), image.argmax(2))


def test_picture_for_a_classifier(classes: Server) -> None:
    image = np.zeros((30, 30, 3), np.uint8)
    image[:, :, 1] = 9
    answer = json.loads(fetch(classes, "/predict", encoded(image, "JPEG"))[2])
    assert answer["classes"][0]["name"] == "field"
    assert sum(entry["probability"] for entry in answer["classes"]) == pytest.approx(1)


@pytest.mark.parametrize("size", [7, 700])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_picture_in_a_form(pixels: Server, kind: str, size: int) -> None:
    image = images_of(1, 7, size, size)[0]
    headers = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + encoded(image, kind)
    for body in (part + b"\r\n--b--", iter([part[:50], part[50:], b"\r\n--b--"])):  # the second one in chunks
        status, _, answer = fetch(pixels, "/predict?output=labels", body, headers)
        assert status == 200
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(answer))), image.argmax(2))
    status, _, answer = fetch(pixels, "/predict", part + b"\r\n--b\r\n", headers)
    assert (status, b"several parts" in answer) == (400, True)
    status, _, answer = fetch(pixels, "/predict", b"", headers)
    assert (status, b"does not begin with its boundary" in answer) == (400, True)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
def test_picture_sent_by_curl_as_a_form(pixels: Server, format: str) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    content = encoded(images_of(1, 7)[0], format)
    stripped = content.translate(None, b"\r\n\0")  # by `curl -d @FILE`
    status, _, answer = fetch(pixels, "/predict", stripped, form)
    assert (status, b"--data-binary @FILE" in answer, b".npy" in answer) == (400, True, False), answer
    assert b"PNG, JPEG, WebP, TIFF or BMP" in answer or format in ("JPEG", "BMP")  # whose head is whole
    status, _, answer = fetch(pixels, "/predict", content, form)  # by --data-binary, of the same type
    assert status == 200
    assert b"--data-binary" not in answer


def test_refused_picture_sent_by_curl(pixels: Server) -> None:
    """A whole file of 16 bits a channel: how it was sent is not the mistake."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((7, 9), np.uint16)).save(file, "TIFF")
    form = {"content-type": "application/x-www-form-urlencoded"}
    status, _, answer = fetch(pixels, "/predict", file.getvalue(), form)
    assert (status, b"more than 8 bits" in answer, b"--data-binary" in answer) == (400, True, False), answer


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/predict", b"no picture", 400, "PNG, JPEG, WebP, TIFF or BMP"),
        ("/predict", b"", 400, "PNG, JPEG, WebP, TIFF or BMP"),
        ("/predict", b"\x89PNG\r\n\x1a\n" + b"x" * 50, 400, "the picture"),
        ("/predict", b"MM\x00*" + b"x" * 50, 400, "the picture is damaged"),
        ("/predict?output=poem", b"x", 400, "mask, overlay, labels, json"),
        ("/predict?path=/etc/passwd", b"x", 400, "path"),
        ("/predict?" + "a=1&" * 20, b"x", 400, "16 fields"),
        ("/predict?output=%FF%FE", b"x", 400, "mask, overlay, labels, json"),
        ("/v2/models/pixels/infer", b"", 400, "JSON"),
        ("/v2/models/pixels/infer", b"[" * 100_000, 400, ""),
        (
            "/v2/models/pixels/infer",
            b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,99999999,99999999,3],"data":[]}]}',
            413,
            "",
        ),
        ("/v2/models/pixels/infer", b'{"inputs":[{"name":"images","datatype":"FP32","shape":[1,1,1,3],"data":[NaN,1,1]}]}', 400, ""),
        ("/v2/nowhere", b"x", 404, "openapi.json"),
        ("/predict/", b"x", 404, "openapi.json"),
        ("/v2/trace/settings", b"x", 404, "openapi.json"),
        ("/v2/repository/models/..%2f..%2fetc/load", b"{}", 404, ""),
        ("/v2/repository/models/pixels/load", b'{"parameters":{"version":"../../etc"}}', 404, "no version"),
        ("/v2/repository/models/pixels/load", b'{"parameters":{"config":"{}"}}', 501, "no model from a request"),
        ("/v2/repository/models/pixels/load", b'{"parameters":{"file:1/model.onnx":"AAAA"}}', 501, "no model from a request"),
    ],
)
def test_wrong_requests(pixels: Server, path: str, body: bytes, status: int, message: str) -> None:
    found, headers, answer = fetch(pixels, path, body)
    assert found == status, answer
    assert headers["content-type"].startswith("application/json")
    assert message in json.loads(answer)["error"]
    assert fetch(pixels, "/v2/health/ready")[0] == 200


def test_decompression_bomb(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    bomb = encoded(np.zeros((3000, 3000, 3), np.uint8), "PNG")
    assert len(bomb) < 100_000
    with served(write_pixels(tmp_path / "pixels"), grpc_port=None, bounds=Bounds(image_pixels=1_000_000)) as server:
        status, _, answer = fetch(server, "/predict", bomb)
        assert (status, b"limit of 1,000,000: cut it into smaller pictures (--max-pixels)" in answer) == (413, True)
        images = np.zeros((1, 1001, 1000, 3), np.uint8)
        with pytest.raises(InferenceServerException, match=r"1000x1001 pixels"):
            Client(server, "http").ask(images)


# ---- versions ----


def test_version_changes_under_load(
    write_version: Callable[..., Path], tmp_path: Path, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions come through the watched folder and through both faces, sound ones and broken ones; every answer is whole and of the
    version that it names."""
    models = tmp_path / "models"
    write_version(models / "1", label=1)
    told: list[str] = []
    # how slow a version of some microseconds is beside another says something of the machine alone: judged in `test_rollout`
    rollout = Rollout(for_seconds=0.2, max_slowdown=math.inf)
    config = ServeConfig(http_port=0, grpc_port=0, threads=1, watch=True, watch_seconds=0.05, rollout=rollout, name="m", max_batch=4)
    wrong: list[Any] = []
    seen: set[str] = set()
    stop = threading.Event()

    def ask(face: str, seed: int) -> None:
        client = Client(server, face)
        while not stop.is_set():
            images = images_of(1 + seed % 2, seed, 8, 8)
            given = client.library.InferInput("images", images.shape, "UINT8")
            given.set_data_from_numpy(images)
            try:
                result = client.client.infer("m", [given], outputs=[client.library.InferRequestedOutput("labels")])
            except InferenceServerException as error:
                wrong.append(str(error))
                continue
            response = result.get_response()
            version = response["model_version"] if client.http else response.model_version
            seen.add(version)
            if set(np.unique(result.as_numpy("labels"))) != {int(version) % 4} or len(result.as_numpy("labels")) != len(images):
                wrong.append((version, result.as_numpy("labels")))
        client.client.close()

    with Server(models, config, notify=told.append) as server:
        threads = [threading.Thread(target=ask, args=(("http", "grpc")[n % 2], n)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: "1" in seen)
            (tmp_path / "new").mkdir()
            write_version(tmp_path / "new" / "2", label=2).rename(models / "2")
            wait_until(lambda: "2" in seen)
            broken = write_version(tmp_path / "new" / "3", label=3)
            weights = broken / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
            broken.rename(models / "3")
            wait_until(lambda: any("version 3 is not loaded" in line for line in told))
            write_version(tmp_path / "new" / "4", label=0, shift=50.0).rename(models / "4")
            wait_until(lambda: any("version 4 is not loaded" in line for line in told))
            write_version(tmp_path / "new" / "5", label=1).rename(models / "5")
            wait_until(lambda: "5" in seen)
            for face, version in (("http", "2"), ("grpc", "1")):
                asked = Client(server, face)
                load_version(asked, version)
                assert server.slot.current is not None
                assert server.slot.current.name == version
                with pytest.raises(InferenceServerException, match=r"not loaded.*what served goes on"):
                    load_version(asked, "4")
                assert server.slot.current.name == version, told
                asked.client.close()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert seen == {"1", "2", "5"}


def test_watch_with_broken_versions(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    models, told = tmp_path / "models", list[str]()
    write_version(models / "1", label=1)
    write_version(models / "2", label=2)
    write_version(models / "3", label=3, shift=50.0)  # whole, and wrong
    weights = write_version(models / "4", label=0) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (models / "5").mkdir()
    looks, step = count(1), Watcher.step

    def look(watcher: Watcher) -> str | None:
        found = step(watcher)
        looked.append(next(looks))
        return found

    looked: list[int] = []
    monkeypatch.setattr(Watcher, "step", look)
    config = ServeConfig(http_port=0, grpc_port=None, threads=1, watch=True, watch_seconds=0.01)
    with Server(models, config, notify=told.append) as server:
        wait_until(lambda: len(looked) > 4, 60)
        assert server.slot.current is not None
        assert (server.slot.current.name, server.slot.ready) == ("2", True)
        assert server.slot.current.compiled_sizes == {(8, 8)}
    # What may still be being copied is told at the second look; each is told once.
    assert [line.split(":")[0] for line in told[:4]] == ["version 3 is not loaded", "models", *(f"version {n} is not loaded" for n in "54")]
    assert not any("not loaded" in line for line in told[4:])
    with pytest.raises(ArtifactError), served(models):
        pass


def test_watch_of_an_empty_directory(write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]) -> None:
    (tmp_path / "models").mkdir()
    config = ServeConfig(http_port=0, grpc_port=None, threads=1, watch=True, watch_seconds=0.05, max_batch=3)
    with Server(tmp_path / "models", config) as server:
        write_version(tmp_path / "models" / "1", label=1)
        wait_until(lambda: server.slot.current is not None, 120)
        assert server.slot.current is not None
        assert server.slot.current.compiled_sizes == {(8, 8)}


def test_stop_while_loading(write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, loading = served(write_version(tmp_path / "1")), threading.Event()

    def hang(stopped: Callable[[], bool], **_: Any) -> None:
        loading.set()
        while not stopped():
            pass
        raise NotReadyError("ended")

    monkeypatch.setattr(ArtifactLoader, "open", lambda self, path, **given: hang(**given))
    thread = threading.Thread(target=server.start)
    thread.start()
    assert loading.wait(60)
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert server.http_port == 0  # it never listened


def test_stop_while_serving(write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    loading, held, computing = threading.Event(), threading.Event(), threading.Event()
    compute = Executor.__call__

    def hang(stopped: Callable[[], bool], **_: Any) -> None:
        loading.set()
        while not stopped():
            pass
        raise NotReadyError("ended")

    def hold(self: Executor, batch: Any) -> Any:
        computing.set()
        assert held.wait(60)
        return compute(self, batch)

    told: dict[str, Any] = {}

    def ask(name: str, path: str, body: bytes) -> threading.Thread:
        thread = threading.Thread(target=lambda: told.update({name: fetch(server, path, body)}))
        thread.start()
        return thread

    with served(write_version(tmp_path / "m"), drain_seconds=60) as server:
        monkeypatch.setattr(ArtifactLoader, "open", lambda self, path, **given: hang(**given))
        monkeypatch.setattr(Executor, "__call__", hold)
        asked = [ask("load", "/v2/repository/models/m/load", b"{}"), ask("wait", "/v2/repository/models/m/load", b"{}")]
        image = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
        asked.append(ask("infer", "/v2/models/m/infer", json.dumps({"inputs": [image]}).encode()))
        assert loading.wait(60) and computing.wait(60)
        stop = threading.Thread(target=server.stop)
        stop.start()
        for load in asked[:2]:
            load.join(60)
        for name in ("load", "wait"):
            assert told[name][0] == 503 and "shutting down" in json.loads(told[name][2])["error"]
        wait_until(lambda: not listens(server.grpc_port))
        assert "infer" not in told and stop.is_alive()
        held.set()
        for thread in (*asked, stop):
            thread.join(60)
        assert told["infer"][0] == 200
        assert server.cut_off == 0


def listens(port: int | None) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_request_longer_than_drain_time(write_pixels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    async def slow(self: ImageRoute, *_: Any) -> Any:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(ImageRoute, "answer", slow)
    told: list[Any] = []

    with served(write_pixels(tmp_path / "m"), grpc_port=None, drain_seconds=0) as server:
        thread = threading.Thread(target=lambda: told.append(fetch(server, "/predict", b"x")))
        thread.start()
        assert begun.wait(60)
    thread.join(60)
    ((status, headers, body),) = told
    assert (status, headers["retry-after"], json.loads(body)) == (503, "1", {"error": "the server is shutting down"})
    assert server.cut_off == 1


def test_decoder_longer_than_drain_time(write_pixels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, let_go = threading.Event(), threading.Event()

    def decode(*_: Any, **__: Any) -> Any:
        decoding.set()
        assert let_go.wait(60)

    monkeypatch.setattr("muntin.serving.http.image_route.decode_image", decode)
    body = encoded(images_of(1, 1)[0], "PNG")
    try:
        with served(write_pixels(tmp_path / "m"), grpc_port=None, drain_seconds=1) as server:
            with socket.create_connection(("127.0.0.1", server.http_port)) as client:
                client.sendall(b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                assert decoding.wait(60)
            stop = threading.Thread(target=server.stop)
            stop.start()
            stop.join(20)
            assert not stop.is_alive()
            assert all(thread.daemon for thread in threading.enumerate() if thread.name == "muntin-picture")  # nor does the process
    finally:
        let_go.set()


def load_version(client: Client, version: str) -> None:
    """Through the repository API; neither of tritonclient's methods for it takes a version."""
    if client.http:
        body = json.dumps({"parameters": {"version": version}})
        answer = client.client._post("v2/repository/models/m/load", body, None, None)  # as `load_model` sends it
        if answer.status_code != 200:
            raise InferenceServerException(json.loads(answer.read())["error"])
        return
    request = triton_grpc.service_pb2.RepositoryModelLoadRequest(model_name="m")
    request.parameters["version"].string_param = version
    try:
        client.client._client_stub.RepositoryModelLoad(request)
    except Exception as error:
        raise InferenceServerException(str(error)) from error


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_file_name_that_is_not_text(
    write_version: Callable[..., Path], tmp_path: Path, in_process: ArtifactLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muntin.serving.assembly.ArtifactLoader", type(in_process))
    (tmp_path / "models").mkdir()
    for number in (1, 2):
        write_version(tmp_path / "models" / str(number), number)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/models/2/\xe9t\xe9.txt")).touch()
    with served(tmp_path / "models", watch=True) as server:
        grpc_client = triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        for _ in range(2):
            status, _, body = fetch(server, "/v2/repository/models/models/load", b"{}")
            assert status == 409
            assert b"udce9t" in body
            with pytest.raises(InferenceServerException, match="udce9t"):
                grpc_client.load_model("models")
            status, _, body = fetch(server, "/v2/repository/index", b"")
            assert status == 200
            assert b"udce9t" in body
            assert any("udce9t" in entry.reason for entry in grpc_client.get_model_repository_index().models)


def test_tokens(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    images = images_of(1, 1)
    with served(write_pixels(tmp_path / "pixels"), tokens=("secret",)) as server:
        assert fetch(server, "/v2/health/ready")[0] == 200
        for path in ("/v2", "/metrics", "/v2/models/pixels", "/openapi.json"):
            status, headers, _ = fetch(server, path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert fetch(server, path, None, {"Authorization": "Bearer secret"})[0] == 200
        for face in ("http", "grpc"):
            client = Client(server, face)
            with pytest.raises(InferenceServerException, match="TOKEN"):
                client.ask(images)
            found = client.ask(images, "labels", headers={"authorization": "bearer secret"})["labels"]
            np.testing.assert_array_equal(found, images.argmax(3))
            client.client.close()


@pytest.mark.parametrize("opened", [False, True])
def test_control_without_tokens_beyond_loopback(write_pixels: Callable[..., Path], tmp_path: Path, opened: bool) -> None:
    told: list[str] = []
    config = ServeConfig(host="0.0.0.0", http_port=0, grpc_port=0, threads=1, open_control=opened)  # noqa: S104
    with Server(write_pixels(tmp_path / "pixels"), config, notify=told.append) as server:
        for face in ("http", "grpc"):
            client = Client(server, face)
            if opened:
                client.client.load_model("pixels")
            else:
                with pytest.raises(InferenceServerException, match="load and unload are off"):
                    client.client.unload_model("pixels")
            client.ask(images_of(1, 1))
            client.client.close()
    due = "load and unload versions" if opened else "load and unload are off"
    assert any("0.0.0.0: no tokens (--token-file)" in line and line.endswith(due) for line in told)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    return make_pair(tmp_path_factory.mktemp("tls") / "pair")


def make_pair(made: Path) -> tuple[Path, Path]:
    made.mkdir()
    certificate, key = made / "certificate.pem", made / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *subject], check=True, capture_output=True)
    return certificate, key


def test_body_limit_above_that_of_grpc(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    bounds = Bounds(body_bytes=3 << 30, held_bytes=4 << 30)
    with served(write_pixels(tmp_path / "pixels"), bounds=bounds) as server:
        for face in ("http", "grpc"):
            client = Client(server, face)
            np.testing.assert_array_equal(client.ask(images_of(1, 1), "labels")["labels"], images_of(1, 1).argmax(3))
            client.client.close()
        image = {"name": "images", "datatype": "UINT8", "shape": [1, 10_000, 10_000, 3], "parameters": {"binary_data_size": 1}}
        body = json.dumps({"inputs": [image]}).encode()
        status, _, answer = fetch(server, "/v2/models/pixels/infer", body + b"x", {"inference-header-content-length": str(len(body))})
        assert (status, "takes 300,000,000" in json.loads(answer)["error"]) == (400, True)  # it might have come


def test_tls(write_pixels: Callable[..., Path], tmp_path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = pair
    path = write_pixels(tmp_path / "pixels")
    with served(path, tls_certificate=certificate, tls_key=key) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(f"https://127.0.0.1:{server.http_port}/v2/health/ready", context=context) as answer:
            assert answer.status == 200
        assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []  # what failed in a protocol
        client = triton_grpc.InferenceServerClient(f"localhost:{server.grpc_port}", ssl=True, root_certificates=str(certificate))
        assert client.is_server_ready()
        client.close()
    with pytest.raises(DataError, match="TLS certificate"), served(path, tls_certificate=key, tls_key=certificate):
        pass


def test_renewed_certificate(
    write_pixels: Callable[..., Path], tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr("muntin.serving.server.RENEW_S", 0.02)
    certificate, key = (shutil.copy(file, tmp_path) for file in pair)
    told: list[str] = []
    config = ServeConfig(http_port=0, grpc_port=0, threads=1, tls_certificate=certificate, tls_key=key)
    with Server(write_pixels(tmp_path / "pixels"), config, notify=told.append) as server:

        def shown() -> set[str]:
            return {ssl.get_server_certificate(("127.0.0.1", port or 0)) for port in (server.http_port, server.grpc_port)}

        before = shown()
        assert before == {Path(certificate).read_text()}
        renewed = make_pair(tmp_path / "renewed")
        shutil.copy(renewed[0], certificate)  # without its key for a moment
        wait_until(lambda: any("still shown" in line for line in told))
        assert shown() == before
        shutil.copy(renewed[1], key)
        wait_until(lambda: any("renewed" in line for line in told))
        wait_until(lambda: shown() == {renewed[0].read_text()})


def test_key_with_a_passphrase(write_pixels: Callable[..., Path], tmp_path: Path, pair: tuple[Path, Path]) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(pair[1]), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(DataError, match="has a passphrase"), served(tmp_path, tls_certificate=pair[0], tls_key=locked):
        pass


def asked(images: NDArray[np.uint8], more: bytes = b"") -> bytes:
    """A request for everything about some images, in binary."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    line = b"POST /v2/models/pixels/infer HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n" % (more, len(head) + images.nbytes)
    return line + b"Inference-Header-Content-Length: %d\r\n\r\n" % len(head) + head + images.tobytes()


@contextmanager
def secure(server: Server, certificate: Path) -> Iterator[ssl.SSLSocket]:
    """A connection over TLS that was answered, of a client that never looks at it again."""
    context = ssl.create_default_context(cafile=str(certificate))
    plain = socket.create_connection(("127.0.0.1", server.http_port), timeout=20)
    with context.wrap_socket(plain, server_hostname="localhost") as client:
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b'{"live":true}'):
            found += client.recv(1000)
        yield client


def test_idle_connection_over_tls(write_pixels: Callable[..., Path], tmp_path: Path, pair: tuple[Path, Path], wait_until: Any) -> None:
    certificate, key = pair
    path, files = write_pixels(tmp_path / "pixels"), {"tls_certificate": certificate, "tls_key": key}
    with served(path, bounds=Bounds(idle_seconds=1), **files) as server, secure(server, certificate) as client:
        assert client.recv(1) == b""
    server = served(path, drain_seconds=20, **files)
    server.start()
    with secure(server, certificate):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 20  # the time for draining
    assert server.cut_off == 0


def test_slow_reader_over_tls(write_pixels: Callable[..., Path], tmp_path: Path, pair: tuple[Path, Path]) -> None:
    certificate, key = pair
    with served(write_pixels(tmp_path / "pixels"), tls_certificate=certificate, tls_key=key) as server:
        images = images_of(4, 1, 512, 512)
        with secure(server, certificate) as client:
            client.sendall(asked(images, b"Connection: close\r\n"))
            time.sleep(3)
            found = b""
            while piece := client.recv(1 << 20):
                found += piece
        scores = images.transpose(0, 3, 1, 2).astype(np.float32)
        assert found.endswith(images.argmax(3).astype(np.uint8).tobytes() + scores.tobytes())


def test_unread_answer(write_pixels: Callable[..., Path], tmp_path: Path, wait_until: Any) -> None:
    def held() -> float:
        lines = fetch(server, "/metrics")[2].decode().splitlines()
        return float(next(line for line in lines if line.startswith("muntin_body_bytes ")).split()[1])

    bounds = Bounds(body_seconds=2)
    with (
        served(write_pixels(tmp_path / "pixels"), bounds=bounds) as server,
        socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as client,
    ):
        client.sendall(asked(images_of(4, 1, 1024, 1024)))
        wait_until(lambda: held() > 32 << 20)
        wait_until(lambda: held() == 0, 10)


@pytest.mark.parametrize("face", ["http", "grpc", "both the same"])
def test_taken_port(write_pixels: Callable[..., Path], tmp_path: Path, face: str) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if face == "both the same":
            taken.close()
        ports = {"http_port": 0 if face == "grpc" else port, "grpc_port": 0 if face == "http" else port}
        config = ServeConfig(threads=1, **ports)
        option = "--http-port" if face == "http" else "--grpc-port"
        with (
            pytest.raises(DataError, match=f"Address already in use.*{option}"),
            Server(write_pixels(tmp_path / "m"), config, notify=told.append),
        ):
            pass
    assert told == []


def six() -> bool:
    """Whether there is IPv6 on this machine."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not six(), reason="there is no IPv6")
@pytest.mark.parametrize("host", ["two.example", "::", "127.0.0.1"])
def test_addresses_of_a_host(write_pixels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    look_up = socket.getaddrinfo

    def found(name: Any, *args: Any, **options: Any) -> Any:
        addresses = ("127.0.0.1", "::1", "192.0.2.1") if name == "two.example" else (name,)  # the last is not this machine's
        return [entry for address in addresses for entry in look_up(address, *args, **options)]

    def listening(port: int | None) -> set[str]:
        there = set()
        for address in ("127.0.0.1", "::1"):
            try:
                socket.create_connection((address, port), timeout=5).close()
            except OSError:
                continue
            there.add(address)
        return there

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with served(write_pixels(tmp_path / "m"), host=host) as server:
        wanted = {"127.0.0.1"} if host == "127.0.0.1" else {"127.0.0.1", "::1"}
        assert listening(server.http_port) == listening(server.grpc_port) == wanted


@pytest.mark.parametrize("trouble", ["certificate", "port"])
def test_threads_after_a_failed_start(write_pixels: Callable[..., Path], tmp_path: Path, trouble: str, wait_until: Any) -> None:
    path, before = write_pixels(tmp_path / "pixels"), set(threading.enumerate())
    nothing = tmp_path / "nothing.pem"
    with ExitStack() as taken:
        port = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        taken.pop_all().close()  # somebody takes it while it loads
        options = {"tls_certificate": nothing, "tls_key": nothing} if trouble == "certificate" else {}
        server = Server(
            path,
            ServeConfig(http_port=port, grpc_port=0, threads=1, **options),
            notify=lambda line: taken.enter_context(socket.create_server(("127.0.0.1", port))),
        )
        with pytest.raises(DataError, match="certificate" if trouble == "certificate" else "--http-port"), server:
            pass

    def left() -> set[threading.Thread]:
        return {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("muntin")}

    wait_until(lambda: not left())


def test_missing_artefact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        served(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="neither an artefact nor"), served(tmp_path / "empty"):
        pass


_ASKED = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0]}]}'


@pytest.mark.parametrize(
    ("path", "described", "body", "headers", "status"),
    [
        ("/predict", "/predict", b"no picture", {}, 400),
        ("/v2/models/pixels/infer", "/v2/models/{model}/infer", b"{}", {}, 400),
        ("/v2/models/pixels/infer", "/v2/models/{model}/infer", b"{}", {"content-encoding": "br"}, 415),
        ("/predict", "/predict", b"x", {"content-encoding": "gzip"}, 415),
        ("/v2/repository/index", "/v2/repository/index", b"{}", {"content-encoding": "gzip"}, 415),
        ("/v2/models/other/infer", "/v2/models/{model}/infer", _ASKED, {}, 404),
        ("/v2/models/other", "/v2/models/{model}", None, {}, 404),
        ("/v2/repository/models/pixels/load", "/v2/repository/models/{model}/load", b'{"parameters": {"config": "{}"}}', {}, 501),
        ("/v2/repository/models/pixels/load", "/v2/repository/models/{model}/load", b'{"parameters": {"version": "9"}}', {}, 404),
        ("/v2/repository/models/pixels/unload", "/v2/repository/models/{model}/unload", b"", {"origin": "null"}, 403),
        ("/v2/repository/index", "/v2/repository/index", b'{"ready": 1}', {}, 400),
    ],
)
def test_errors_in_openapi(pixels: Server, path: str, described: str, body: bytes | None, headers: dict[str, str], status: int) -> None:
    found, _, answer = fetch(pixels, path, body, headers)
    assert found == status, answer
    document = json.loads(fetch(pixels, "/openapi.json")[2])
    assert str(status) in document["paths"][described]["get" if body is None else "post"]["responses"]


def test_metrics(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    with served(write_pixels(tmp_path / "pixels"), objective_ms=10_000) as server:
        for face in ("http", "grpc"):
            client = Client(server, face)
            client.ask(images_of(3, 1))
            client.client.close()
        fetch(server, "/v2/models/pixels/infer", b"{}")
        fetch(server, "/predict", encoded(images_of(1, 1)[0], "PNG"))
        fetch(server, "/predict?more=1", b"")
        server.slot.unload()
        assert fetch(server, "/predict", b"")[0] == 503
        server.slot.load(tmp_path / "pixels", "1")
        text = fetch(server, "/metrics")[2].decode()
    for line in (
        'muntin_requests_total{face="http",outcome="answered"} 2.0',
        'muntin_requests_total{face="grpc",outcome="answered"} 1.0',
        'muntin_requests_total{face="http",outcome="wrong"} 2.0',
        'muntin_rows_total{version="1"} 7.0',
        "muntin_ready 1.0",
        "muntin_request_seconds_count 2.0",
        "muntin_objective_missed_total 0.0",
        "muntin_admitted_total 3.0",
        "muntin_dropped_total 0.0",
        "muntin_cancelled_total 0.0",
        "muntin_rows_one_by_one_total 0.0",
        "muntin_images_in_tiles_total 0.0",
        "muntin_hanging 0.0",
        'muntin_engine_deaths_total{version="1"} 0.0',
        'muntin_refused_total{reason="late"} 0.0',
        'muntin_refused_total{reason="large answers"} 0.0',
        'muntin_refused_total{reason="pictures"} 0.0',
        'muntin_refused_total{reason="no version"} 1.0',
    ):
        assert line in text.splitlines(), line
    held = next(line for line in text.splitlines() if line.startswith('muntin_engine_resident_memory_bytes{version="1"}'))
    assert float(held.split()[1]) > 10 << 20


def test_metrics_of_a_reloaded_version(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    """An artefact that is loaded again keeps its name, and the one before stays warm for a while."""
    with served(write_pixels(tmp_path / "pixels")) as server:
        server.slot.load(tmp_path / "pixels", "1")
        assert [version.name for version in server.slot.open] == ["1", "1"]
        lines = [line.partition(" ")[0] for line in fetch(server, "/metrics")[2].decode().splitlines() if not line.startswith("#")]
    assert 'muntin_engine_deaths_total{version="1"}' in lines
    assert len(lines) == len(set(lines))


def test_access_log(write_pixels: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(write_pixels(tmp_path / "pixels"), access_log=True, bounds=Bounds(body_bytes=2000)) as server:
        assert fetch(server, "/v2/models/pixels/infer", bytes(3000))[0] == 413
        assert fetch(server, "/v2/health/live")[0] == 200
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [
        ("POST", "/v2/models/pixels/infer", 413),
        ("GET", "/v2/health/live", 200),
    ]


def test_spans_at_a_collector(write_pixels: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    traces = [f"{number:032x}" for number in (0xABC, 0xDEF, 0xFED)]
    with served(write_pixels(tmp_path / "pixels"), trace=True) as server:
        parents = [{"traceparent": f"00-{trace}-00000000000000ff-01"} for trace in traces]
        for face, parent in zip(("http", "grpc"), parents[:2], strict=True):
            client = Client(server, face)
            client.ask(images_of(1, 1), headers=parent)
            client.client.close()
        assert fetch(server, "/predict", encode_png(images_of(1, 1)[0]), parents[2])[0] == 200
    collector.shutdown()
    collector.server_close()
    for trace in traces:
        assert any(bytes.fromhex(trace) in body for body in received)
    assert any(b"infer pixels" in body for body in received)


def fetch(server: Server, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def test_best_classes_of_labels(classes: Server, face: str) -> None:
    client, images = Client(classes, face), images_of(2, 1)
    given = client.library.InferInput("images", images.shape, "UINT8")
    given.set_data_from_numpy(images)
    wanted = [client.library.InferRequestedOutput("scores"), client.library.InferRequestedOutput("labels", class_count=1)]
    with pytest.raises(InferenceServerException, match="ask it of scores") as caught:
        client.client.infer("classes", [given], outputs=wanted)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    client.client.close()


def test_replaced_version_without_requests(
    write_version: Callable[..., Path], tmp_path: Path, in_process: ArtifactLoader, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr("muntin.serving.assembly.ArtifactLoader", type(in_process))
    monkeypatch.setattr("muntin.serving.server.SETTLE_S", 0.02)
    models = tmp_path / "models"
    for number in (1, 2):
        write_version(models / str(number), number)
    with served(models, grpc_port=None, rollout=Rollout(for_seconds=3.0)) as server:
        server.slot.load(models / "1", "1")
        assert [version.name for version in server.slot.open] == ["1", "2"]
        wait_until(lambda: [version.name for version in server.slot.open] == ["1"])


@pytest.mark.parametrize("status", [499, 408])
def test_incomplete_body(
    write_pixels: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], wait_until: Any, status: int
) -> None:
    bounds = Bounds(body_seconds=60 if status == 499 else 0.5)
    with served(write_pixels(tmp_path / "pixels"), grpc_port=None, access_log=True, bounds=bounds) as server:

        def counted(line: bytes) -> bool:
            return line in fetch(server, "/metrics")[2].splitlines()

        with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nx")
            if status == 499:
                wait_until(lambda: counted(b"muntin_body_bytes 1.0"))  # it is being read
            else:
                assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        outcome = b"cancelled" if status == 499 else b"wrong"
        wait_until(lambda: counted(b'muntin_requests_total{face="http",outcome="%s"} 1.0' % outcome))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines if line["path"] == "/predict"] == [status]
