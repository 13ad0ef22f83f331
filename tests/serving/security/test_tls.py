"""A certificate on the disk, and connections over TLS."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from muntin.errors import DataError
from muntin.serving.config import Bounds
from muntin.serving.security.tls import Certificate

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")


def make(folder: Path) -> tuple[Path, Path]:
    """A certificate and its key."""
    folder.mkdir(exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *kind, *subject], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def path(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("tls") / "pixels")


def test_unusable_files_keep_the_certificate(tmp_path: Path) -> None:
    files, others = make(tmp_path), make(tmp_path / "other")
    certificate = Certificate(*files)
    before = certificate.pem
    assert before == (files[1].read_bytes(), files[0].read_bytes())
    assert not certificate.changed()
    shutil.copy(others[0], files[0])
    for _ in range(2):
        assert certificate.changed()
        with pytest.raises(DataError, match="cannot be used"):
            certificate.load()
        assert not certificate.changed()  # so that it is reported once
        files[0].write_text("nonsense")
    files[0].unlink()
    assert certificate.changed()
    with pytest.raises(DataError, match=r"cannot be used.*No such file"):
        certificate.load()
    assert certificate.pem is before
    for file, other in zip(files, others, strict=True):
        shutil.copy(other, file)
    assert certificate.changed()
    certificate.load()
    assert certificate.pem == (others[1].read_bytes(), others[0].read_bytes())


def test_keys_that_do_not_fit(make_server: Any, path: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(pair[1]), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for certificate, key, message in ((pair[0], locked, "has a passphrase"), (pair[1], pair[0], "TLS certificate")):
        with pytest.raises(DataError, match=message), make_server(path, tls_certificate=certificate, tls_key=key):
            pass


@contextmanager
def secure(server: Any, certificate: Path) -> Iterator[ssl.SSLSocket]:
    """A connection over TLS that was answered, of a client that never looks at it again."""
    context = ssl.create_default_context(cafile=str(certificate))
    plain = socket.create_connection(("127.0.0.1", server.http_port), timeout=20)
    with context.wrap_socket(plain, server_hostname="localhost") as client:
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b'{"live":true}'):
            found += client.recv(1000)
        yield client


def test_both_faces_and_a_slow_reader(make_server: Any, path: Path, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = pair
    images = np.random.default_rng(1).integers(0, 256, (2, 512, 512, 3)).astype(np.uint8)
    entry = {"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    lines = b"POST /v2/models/pixels/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n"
    lines += b"Inference-Header-Content-Length: %d\r\n\r\n"
    with make_server(path, tls_certificate=certificate, tls_key=key) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(f"https://127.0.0.1:{server.http_port}/v2/health/ready", context=context) as answer:
            assert answer.status == 200
        assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []  # what failed in a protocol
        client = triton_grpc.InferenceServerClient(f"localhost:{server.grpc_port}", ssl=True, root_certificates=str(certificate))
        assert client.is_server_ready()
        client.close()
        with secure(server, certificate) as connection:
            connection.sendall(lines % (len(head) + images.nbytes, len(head)) + head + images.tobytes())
            time.sleep(1)
            found = b""
            while piece := connection.recv(1 << 20):
                found += piece
    scores = images.transpose(0, 3, 1, 2).astype(np.float32)
    assert found.endswith(images.argmax(3).astype(np.uint8).tobytes() + scores.tobytes())


def test_renewed_certificate(
    make_server: Any, path: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr("muntin.serving.server.RENEW_S", 0.02)
    certificate, key = (shutil.copy(file, tmp_path) for file in pair)
    told: list[str] = []
    with make_server(path, tls_certificate=certificate, tls_key=key, notify=told.append) as server:

        def shown() -> set[str]:
            return {ssl.get_server_certificate(("127.0.0.1", port)) for port in (server.http_port, server.grpc_port)}

        before = shown()
        assert before == {Path(certificate).read_text()}
        renewed = make(tmp_path / "renewed")
        shutil.copy(renewed[0], certificate)  # without its key for a moment
        wait_until(lambda: any("still shown" in line for line in told))
        assert shown() == before
        shutil.copy(renewed[1], key)
        wait_until(lambda: any("renewed" in line for line in told))
        wait_until(lambda: shown() == {renewed[0].read_text()})


def test_idle_connection(make_server: Any, path: Path, pair: tuple[Path, Path]) -> None:
    files = {"tls_certificate": pair[0], "tls_key": pair[1]}
    with make_server(path, bounds=Bounds(idle_seconds=0.5), **files) as server, secure(server, pair[0]) as client:
        assert client.recv(1) == b""
    server = make_server(path, drain_seconds=20, **files)
    server.start()
    with secure(server, pair[0]):
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 20  # the time for draining
    assert server.cut_off == 0
