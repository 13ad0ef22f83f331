"""The whole server over real sockets: where it listens, how it starts and ends, versions that come, and limits at the socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, DataError
from muntin.images import encode_png
from muntin.serving.config import Bounds
from muntin.serving.http.image_route import ImageRoute
from muntin.serving.inference.executor import Executor
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.repository import Watcher
from muntin.serving.versions.rollout import Rollout
from muntin.serving.worker.opening import NotReadyError
from serving_parts import has_ipv6, listens

PIXEL = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}]}'
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def path(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("serving") / "pixels")


def test_model_name_from_folder_or_link(make_server: Any, write_pixels: Any, tmp_path: Path) -> None:
    path = write_pixels(tmp_path / "release 5")
    (tmp_path / "live").symlink_to(path)
    assert make_server(path).slot.name == "release-5"
    assert make_server(tmp_path / "live").slot.name == "live"  # clients go on when the link is moved on
    assert make_server(path / "..").slot.name == make_server(tmp_path).slot.name


# ---- addresses ----


@pytest.mark.parametrize("face", ["http", "grpc", "both the same"])
def test_taken_port(make_server: Any, path: Path, face: str) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if face == "both the same":
            taken.close()
        ports = {"http_port": 0 if face == "grpc" else port, "grpc_port": 0 if face == "http" else port}
        option = "--http-port" if face == "http" else "--grpc-port"
        with pytest.raises(DataError, match=f"Address already in use.*{option}"), make_server(path, notify=told.append, **ports):
            pass
    assert told == []


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
@pytest.mark.parametrize("host", ["two.example", "::", "127.0.0.1"])
def test_addresses_of_a_host(make_server: Any, path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    look_up = socket.getaddrinfo

    def found(name: Any, *args: Any, **options: Any) -> Any:
        addresses = ("127.0.0.1", "::1", "192.0.2.1") if name == "two.example" else (name,)  # the last is not this machine's
        return [entry for address in addresses for entry in look_up(address, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with make_server(path, host=host) as server:
        for port in (server.http_port, server.grpc_port):
            assert listens(port) and listens(port, "::1") == (host != "127.0.0.1")


@pytest.mark.parametrize("opened", [False, True])
def test_control_without_tokens_beyond_loopback(make_server: Any, fetch: Any, path: Path, opened: bool) -> None:
    told: list[str] = []
    with make_server(path, host="0.0.0.0", open_control=opened, notify=told.append) as server:  # noqa: S104
        status, _, body = fetch(server, "/v2/repository/models/pixels/load", b"{}")
        assert status == (200 if opened else 403)
        assert opened or "load and unload are off" in json.loads(body)["error"]
        assert fetch(server, "/v2/models/pixels/infer", PIXEL)[0] == 200
    due = "load and unload versions" if opened else "load and unload are off"
    assert any("0.0.0.0: no tokens (--token-file)" in line and line.endswith(due) for line in told)


# ---- start ----


@pytest.mark.parametrize("trouble", ["certificate", "port"])
def test_threads_after_a_failed_start(make_server: Any, path: Path, tmp_path: Path, trouble: str, wait_until: Any) -> None:
    before, nothing = set(threading.enumerate()), tmp_path / "nothing.pem"
    with ExitStack() as taken:
        port = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        taken.pop_all().close()  # somebody takes it while it loads
        options = {"tls_certificate": nothing, "tls_key": nothing} if trouble == "certificate" else {}

        def take(line: str) -> None:
            taken.enter_context(socket.create_server(("127.0.0.1", port)))

        with (
            pytest.raises(DataError, match="certificate" if trouble == "certificate" else "--http-port"),
            make_server(path, http_port=port, notify=take, **options),
        ):
            pass
    wait_until(lambda: not any(thread.name.startswith("muntin") for thread in set(threading.enumerate()) - before))


def test_missing_artefact(make_server: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        make_server(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="neither an artefact nor"), make_server(tmp_path / "empty"):
        pass


# ---- versions ----


def test_watch_with_broken_versions(
    make_server: Any, write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    models, told, looked = tmp_path / "models", list[str](), list[int]()
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

    monkeypatch.setattr(Watcher, "step", look)
    with make_server(models, grpc_port=None, watch=True, watch_seconds=0.01, notify=told.append) as server:
        wait_until(lambda: len(looked) > 4, 60)
        assert (server.slot.current.name, server.slot.ready) == ("2", True)
        assert server.slot.current.compiled_sizes == {(("height", 8), ("width", 8))}
    # What may still be being copied is told at the second look; each is told once.
    assert [line.split(":")[0] for line in told[:4]] == ["version 3 is not loaded", "models", *(f"version {n} is not loaded" for n in "54")]
    assert not any("not loaded" in line for line in told[4:])
    with pytest.raises(ArtifactError), make_server(models):
        pass


def test_watch_of_an_empty_directory(make_server: Any, write_version: Any, tmp_path: Path, wait_until: Any) -> None:
    (tmp_path / "models").mkdir()
    with make_server(tmp_path / "models", grpc_port=None, watch=True, watch_seconds=0.05, max_batch=3) as server:
        write_version(tmp_path / "models" / "1", label=1)
        wait_until(lambda: server.slot.current is not None, 120)
        assert server.slot.current.compiled_sizes == {(("height", 8), ("width", 8))}


def test_replaced_version_without_requests(
    make_server: Any, write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr("muntin.serving.server.SETTLE_S", 0.02)
    for number in (1, 2):
        write_version(tmp_path / str(number), number)
    with make_server(tmp_path, grpc_port=None, rollout=Rollout(for_seconds=1.5)) as server:
        server.slot.load(tmp_path / "1", "1")
        assert [version.name for version in server.slot.open] == ["1", "2"]
        wait_until(lambda: [version.name for version in server.slot.open] == ["1"])


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_file_name_that_is_not_text(socketless: Any, call_error: Any, write_version: Any, tmp_path: Path) -> None:
    write_version(tmp_path / "models" / "1", 1)
    with socketless(tmp_path / "models") as server:
        write_version(tmp_path / "models" / "2", 2)
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/models/2/\xe9t\xe9.txt")).touch()
        for _ in range(2):
            status, _, body = server.fetch("/v2/repository/models/models/load", b"{}")
            assert (status, b"udce9t" in body) == (409, True)
            with pytest.raises(call_error, match="udce9t"):
                server.call("RepositoryModelLoad", b"\x12\x06models")
            status, _, body = server.fetch("/v2/repository/index", b"")
            assert (status, b"udce9t" in body) == (200, True)
            assert b"udce9t" in server.call("RepositoryIndex", b"")[0]


# ---- end ----


def hang(stopped: Callable[[], bool], begun: threading.Event) -> None:
    """Stand in for a loader that hangs until the server ends."""
    begun.set()
    while not stopped():
        pass
    raise NotReadyError("ended")


def test_stop_while_loading(make_server: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, loading = make_server(path), threading.Event()
    monkeypatch.setattr(ArtifactLoader, "open", lambda self, path, *, stopped, **_: hang(stopped, loading))
    thread = threading.Thread(target=server.start)
    thread.start()
    assert loading.wait(60)
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert server.http_port == 0  # it never listened


def test_stop_while_serving(make_server: Any, fetch: Any, path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    loading, held, computing = threading.Event(), threading.Event(), threading.Event()
    compute, told = Executor.__call__, dict[str, Any]()

    def hold(self: Executor, batch: Any) -> Any:
        computing.set()
        assert held.wait(60)
        return compute(self, batch)

    def ask(name: str, path: str, body: bytes) -> threading.Thread:
        thread = threading.Thread(target=lambda: told.update({name: fetch(server, path, body)}))
        thread.start()
        return thread

    with make_server(path, drain_seconds=60) as server:
        monkeypatch.setattr(ArtifactLoader, "open", lambda self, path, *, stopped, **_: hang(stopped, loading))
        monkeypatch.setattr(Executor, "__call__", hold)
        asked = [ask(name, "/v2/repository/models/pixels/load", b"{}") for name in ("load", "wait")]
        asked.append(ask("infer", "/v2/models/pixels/infer", PIXEL))
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


def test_request_longer_than_drain_time(make_server: Any, fetch: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, told = threading.Event(), list[Any]()

    async def slow(self: ImageRoute, *_: Any) -> Any:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(ImageRoute, "answer", slow)
    with make_server(path, grpc_port=None, drain_seconds=0) as server:
        thread = threading.Thread(target=lambda: told.append(fetch(server, "/predict", b"x")))
        thread.start()
        assert begun.wait(60)
    thread.join(60)
    ((status, headers, body),) = told
    assert (status, headers["retry-after"], json.loads(body)) == (503, "1", {"error": "the server is shutting down"})
    assert server.cut_off == 1


def test_decoder_longer_than_drain_time(make_server: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, let_go = threading.Event(), threading.Event()

    def decode(*_: Any, **__: Any) -> Any:
        decoding.set()
        assert let_go.wait(60)

    monkeypatch.setattr("muntin.serving.http.image_route.decode_image", decode)
    body = encode_png(np.zeros((20, 24, 3), np.uint8))
    try:
        with make_server(path, grpc_port=None, drain_seconds=0.1) as server:
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


# ---- at the socket ----


def test_other_methods_and_paths(make_server: Any, fetch: Any, path: Path) -> None:
    with make_server(path, grpc_port=None) as server:
        with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as connection:
            connection.sendall(
                b"HEAD /v2/models/pixels/infer HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            found = b""
            while not found.endswith(b"}"):
                found += connection.recv(65536)
        first, second = found.split(b"\r\n\r\n", 1)
        assert first.startswith(b"HTTP/1.1 405 ") and b"allow: POST" in first
        assert second.startswith(b"HTTP/1.1 200 ")  # what answers HEAD has no body
        assert fetch(server, "/v2/repository/models/..%2f..%2fetc/load", b"{}")[0] == 404


def test_body_limit_above_that_of_grpc(make_server: Any, fetch: Any, path: Path) -> None:
    with make_server(path, bounds=Bounds(body_bytes=3 << 30, held_bytes=4 << 30)) as server:
        assert listens(server.grpc_port)
        image = {"name": "images", "datatype": "UINT8", "shape": [1, 10_000, 10_000, 3], "parameters": {"binary_data_size": 1}}
        body = json.dumps({"inputs": [image]}).encode()
        status, _, answer = fetch(server, "/v2/models/pixels/infer", body + b"x", {"inference-header-content-length": str(len(body))})
        assert (status, "takes 300,000,000" in json.loads(answer)["error"]) == (400, True)  # it might have come


def test_unread_answer(make_server: Any, fetch: Any, path: Path, wait_until: Any) -> None:
    """It counts as held until the client has not read it for `Bounds.body_seconds`."""

    def held() -> float:
        lines = fetch(server, "/metrics")[2].decode().splitlines()
        return float(next(line for line in lines if line.startswith("muntin_body_bytes ")).split()[1])

    head = (
        b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [2, 1024, 1024, 3], "parameters": {"binary_data_size": 6291456}}],'
    )
    head += b'"parameters": {"binary_data_output": true}}'
    lines = b"POST /v2/models/pixels/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n"
    with (
        make_server(path, bounds=Bounds(body_seconds=1)) as server,
        socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as client,
    ):
        client.sendall(lines % (len(head) + (6 << 20), len(head)) + head + bytes(6 << 20))
        wait_until(lambda: held() > 16 << 20)
        wait_until(lambda: held() == 0, 10)


@pytest.mark.parametrize("status", [499, 408])
def test_incomplete_body(
    make_server: Any, fetch: Any, path: Path, capsys: pytest.CaptureFixture[str], wait_until: Any, status: int
) -> None:
    bounds = Bounds(body_seconds=60 if status == 499 else 0.3)
    with make_server(path, grpc_port=None, access_log=True, bounds=bounds) as server:

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
