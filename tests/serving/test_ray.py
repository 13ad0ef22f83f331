"""The application of Ray Serve: the answers of `muntin serve`, and none lost while replicas die or are replaced."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from muntin.errors import ArtifactError, DataError
from muntin.serving.versions.version import UnknownVersionError
from ray_cluster import ON_LINUX, processes, restored_signals
from serving_parts import image_call
from serving_protocols import Connection

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed", exc_type=ImportError)
import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema
from starlette.requests import Request
from starlette.responses import Response

from muntin.serving.ray import ATTEMPTS, Ingress, Model, RayOptions, app

pytestmark = [
    pytest.mark.skipif(not ON_LINUX, reason="processes are listed on Linux only"),
    pytest.mark.filterwarnings("ignore"),  # of Ray itself
]
TITLE = "ray::ServeReplica:roofs:Model"


def bitmap(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3)).astype(np.uint8)).save(file, "BMP")
    return file.getvalue()


def binary_request(side: int) -> tuple[bytes, dict[str, str]]:
    """The body and headers of an inference request with binary tensors."""
    pixels = np.random.default_rng(side).integers(0, 256, (1, side, side, 3)).astype(np.uint8).tobytes()
    inputs = [{"name": "images", "shape": [1, side, side, 3], "datatype": "UINT8", "parameters": {"binary_data_size": len(pixels)}}]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + pixels, {"inference-header-content-length": str(len(head))}


@pytest.fixture(scope="module")
def models(write_version: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions: 1 answers the label 1 everywhere, 2 the label 2."""
    folder = tmp_path_factory.mktemp("serve") / "roofs"
    for label in (1, 2):
        write_version(folder / str(label), label)
    return folder


@pytest.fixture(scope="module")
def port(ray_address: str, models: Path) -> Iterator[int]:
    """Of Ray Serve, with two replicas of version 1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = int(listener.getsockname()[1])
    with restored_signals():
        ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": free})
            deploy(models, "1")
            yield free
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(models: Path, version: str, *, ingresses: int = 1) -> None:
    serve.run(app(RayOptions(artifact=models, version=version, replicas=2, ingresses=ingresses)), name="roofs")


REQUESTS = {
    "binary": ("POST", "/v2/models/roofs/infer", *binary_request(40)),
    "JSON": (
        "POST", "/v2/models/roofs/infer",
        json.dumps({"inputs": [{"name": "images", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": [7] * 12}]}).encode(), {},
    ),
    "large": ("POST", "/v2/models/roofs/infer", *binary_request(900)),  # its scores are sent in pieces
    "labels": ("POST", "/predict?output=labels", bitmap(50), {}),
    "shares": ("POST", "/predict?output=json", bitmap(50), {}),
    "metadata": ("GET", "/v2/models/roofs", b"", {}),
    "ready": ("GET", "/v2/health/ready", b"", {}),
    "live": ("GET", "/v2/health/live", b"", {}),
    "no picture": ("POST", "/predict", b"no picture", {}),
    "another model": ("POST", "/v2/models/barns/infer", *binary_request(4)),
    "no route": ("GET", "/nothing", b"", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(socketless: Any, models: Path) -> Iterator[Any]:
    """The parts of `muntin serve`, without a socket."""
    with socketless(models.parent / "roofs" / "1", name="roofs", local=False, max_batch=8) as server:
        yield server


def assert_equal(answer: Any, due: Any, name: str) -> None:
    assert answer[::2] == due[::2], name
    for header in ("content-type", "inference-header-content-length", "x-model-version"):
        assert answer[1].get(header) == due[1].get(header), (name, header)


def test_answers_of_the_server(server: Any, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ingress and a replica in this process."""
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)

    async def ask() -> dict[str, Any]:
        model = Model(RayOptions(artifact=models), "1")
        handle = SimpleNamespace(answer=SimpleNamespace(remote=model.answer))
        answers = {}
        for name, (method, path, body, headers) in REQUESTS.items():
            response = await answer_of(handle, method, path, body, headers=headers)
            answers[name] = response.status_code, dict(response.headers), bytes(response.body)
        for method, path in (("GET", "/metrics"), ("GET", "/v2/models/roofs/stats"), ("POST", "/v2/repository/models/roofs/load")):
            response = await answer_of(handle, method, path, b"")
            assert response.status_code == 501 and path in json.loads(response.body)["error"]  # of one replica
        await model.__del__()
        return answers

    for name, answer in asyncio.run(ask()).items():
        method, path, body, headers = REQUESTS[name]
        assert_equal(answer, server.fetch(path, body, headers, method), name)


@contextmanager
def load(port: int) -> Iterator[Counter[tuple[int, str]]]:
    """Requests of three clients, without repetition: (status, version) and their number."""
    outcomes: Counter[tuple[int, str]] = Counter()
    stop, body = threading.Event(), bitmap(900)

    def ask() -> None:
        client = Connection(port)
        while not stop.is_set():
            status, headers, _ = client.fetch("/predict?output=json", body)
            outcomes[status, headers.get("x-model-version", "")] += 1
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_replica_killed_under_load(port: int, server: Any) -> None:
    client = Connection(port)
    for name in ("binary", "large", "labels", "ready", "no picture"):
        method, path, body, headers = REQUESTS[name]
        assert_equal(client.fetch(path, body, headers, method), server.fetch(path, body, headers, method), name)
    client.close()
    with load(port) as outcomes:
        wait_for(lambda: outcomes.total() > 5)
        first, _ = processes(TITLE)
        os.kill(first, signal.SIGKILL)
        before = outcomes.total()
        wait_for(lambda: outcomes.total() > before + 20)
    assert outcomes.keys() == {(200, "1")}


@pytest.mark.soak
def test_all_replicas_killed_under_load(port: int) -> None:
    with load(port) as outcomes:
        wait_for(lambda: outcomes.total() > 5)
        for process in set(processes(TITLE)):
            os.kill(process, signal.SIGKILL)
        before = outcomes.total()
        wait_for(lambda: outcomes.total() > before + 20)
    assert outcomes.keys() == {(200, "1")}


@pytest.mark.soak
def test_rolling_update_under_load(port: int, models: Path) -> None:
    deploy(models, "1", ingresses=2)
    with load(port) as outcomes:
        wait_for(lambda: outcomes.total() > 5)
        deploy(models, "2", ingresses=2)
        before = outcomes[200, "2"]
        wait_for(lambda: outcomes[200, "2"] > before + 5)
    assert outcomes.keys() == {(200, "1"), (200, "2")}
    client = Connection(port)
    assert json.loads(client.fetch("/v2/models/roofs")[2])["versions"] == ["2"]
    client.close()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"version": "3"}, UnknownVersionError, "no version '3'"),
        ({"version": "1"}, ArtifactError, "weights"),
        ({"artifact": "nothing"}, ArtifactError, "no such directory"),
        ({"token_file": "nothing"}, DataError, "No such file"),
    ],
)
def test_refused_before_deployment(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)
    shutil.copytree(models, tmp_path / "roofs")
    weights = tmp_path / "roofs" / "1" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    paths = {name: tmp_path / arguments[name] for name in ("artifact", "token_file") if name in arguments}
    with pytest.raises(error, match=says):
        app(RayOptions(**{"artifact": tmp_path / "roofs", **arguments, **paths}))


def test_configuration_for_production() -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    config = ServeDeploySchema.model_validate(document)
    (application,) = config.applications
    assert config.http_options.host == "127.0.0.1" and application.import_path == f"{app.__module__}:{app.__name__}"
    assert RayOptions.model_validate(application.args).server().objective_ms == 100


def test_wrong_options() -> None:
    for wrong in ({"replicas": 2, "max_replicas": 1}, {"target_requests": 3}, {"batch": 3}):
        with pytest.raises(ValidationError):
            RayOptions(artifact="a", **wrong)


def test_autoscaling_target() -> None:
    """A quarter of the requests that the objective leaves time for, at the size that takes longest."""
    calls = (image_call((1, 8, 8)), image_call((4, 8, 8)), image_call((1, 16, 16)))
    opened: Any = SimpleNamespace(session=Slow(), calls=calls)

    def target(**options: Any) -> Any:
        return RayOptions(artifact="a", max_replicas="4", **options).scaling(opened)["autoscaling_config"]["target_ongoing_requests"]

    assert RayOptions(artifact="a", replicas=3).scaling(opened) == {"num_replicas": 3}
    assert (target(max_batch=5), target(target_requests="2.5")) == (5, 2.5)
    assert 0.1 < target(objective_ms=320) <= 320 / 20 / 4  # the pause may be longer
    opened.calls = ()  # of an artefact that names no size
    assert target(max_batch=5, objective_ms=320) == 5


class Slow:
    """A session that takes 20 ms for 16 x 16 pixels, and no time for fewer."""

    def prepare(self, dims: Any, outputs: Any, **_: Any) -> None:
        time.sleep(0.02 * (dict(dims)["height"] == 16))


class Dying:
    """A handle of replicas: each of the first `deaths` calls ends with its replica."""

    def __init__(self, deaths: int) -> None:
        self.calls, self.deaths, self.read = 0, deaths, False
        self.answer = self

    async def remote(self, scope: Any, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        self.calls += 1
        if self.calls <= self.deaths:
            raise ray.exceptions.ActorDiedError
        return 200, [(b"x-path", scope["path"].encode())], body


async def answer_of(
    handle: Any,
    method: str,
    path: str,
    body: bytes,
    root: str = "",
    *,
    token_file: Path | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """The answer of an ingress."""
    fields = {"content-length": str(len(body)), **(headers or {})}
    scope = {"type": "http", "method": method, "path": path.partition("?")[0], "root_path": root, "client": None}
    scope["query_string"] = path.partition("?")[2].encode()
    scope["headers"] = [(name.encode(), value.encode()) for name, value in fields.items()]

    async def receive() -> dict[str, Any]:
        handle.read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return await Ingress(handle, token_file)(Request(scope, receive))


def through_ingress(
    handle: Dying, path: str, body: bytes = b"pixels", root: str = "", *, token_file: Path | None = None, token: str = ""
) -> Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return asyncio.run(answer_of(handle, "POST", path, body, root, token_file=token_file, headers=headers))


def test_request_that_kills_replicas() -> None:
    answer = through_ingress(last := Dying(ATTEMPTS - 1), "/v2/models/roofs/infer")
    assert (answer.status_code, answer.body, last.calls) == (200, b"pixels", ATTEMPTS)
    answer = through_ingress(all_ := Dying(ATTEMPTS), "/predict")
    assert (answer.status_code, all_.calls) == (500, ATTEMPTS)
    assert f"{ATTEMPTS} replicas ended" in json.loads(answer.body)["error"]


def test_tokens_before_bodies(tmp_path: Path) -> None:
    """A body without a token is not read; health checks need none."""
    file = tmp_path / "tokens"
    file.write_text("one\ntwo\n")
    for token in ("", "three"):
        answer = through_ingress(handle := Dying(0), "/predict", token_file=file, token=token)
        assert (answer.status_code, handle.calls, handle.read) == (401, 0, False)
    assert through_ingress(Dying(0), "/predict", token_file=file, token="two").status_code == 200
    assert through_ingress(Dying(0), "/v2/health/ready", token_file=file).status_code == 200


def test_route_prefix() -> None:
    assert through_ingress(Dying(0), "/eu/predict", root="/eu").headers["x-path"] == "/predict"
    assert through_ingress(Dying(0), "/europe", root="/eu").headers["x-path"] == "/europe"


def test_body_beyond_the_limit() -> None:
    answer = through_ingress(handle := Dying(0), "/predict", bytes((64 << 20) + 1))
    assert (answer.status_code, handle.calls) == (413, 0)


def test_health_of_a_replica(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica whose version is gone asks Serve to replace it."""
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)

    async def check() -> None:
        model = Model(RayOptions(artifact=models), "1")
        model.check_health()
        model._parts.service.draining = True
        with pytest.raises(RuntimeError, match="no version is loaded"):
            model.check_health()
        await model.__del__()

    asyncio.run(check())
