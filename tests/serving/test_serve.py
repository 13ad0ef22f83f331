"""`muntin.serve`: what the command does, for Python."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import muntin
from muntin.errors import DataError
from muntin.serving.config import Bounds, ServeConfig


def test_settings_and_result(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Ended:
        cut_off = 3

        def __init__(self, path: Any, config: Any, *, notify: Any) -> None:
            told.extend((path, config))
            notify("a line")

        def run(self) -> None:
            return

    monkeypatch.setattr("muntin.serving.server.Server", Ended)
    assert muntin.serve("artefact", notify=told.append, objective_ms=50, bounds={"connections": 7}) == 3
    assert told == ["artefact", ServeConfig(objective_ms=50, bounds=Bounds(connections=7)), "a line"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 5}, "serve: port: Extra inputs"),
        ({"bounds": {"body_bytes": 5}}, r"serve: bounds\.body_bytes: .*1024"),
        ({"tls_key": "key.pem"}, "serve: .*certificate and its key"),
    ],
)
def test_invalid_settings_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        muntin.serve("artefact", **settings)


def test_serve_until_sigterm(write_pixels: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    code = "import sys, muntin; sys.exit(muntin.serve(sys.argv[1], http_port=int(sys.argv[2]), grpc_port=None, threads=1))"
    command = [sys.executable, "-c", code, str(write_pixels(tmp_path / "pixels")), str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or ready(), 120)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said
