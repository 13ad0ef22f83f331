"""`muntin.serve`: what the command does, for Python."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.request
from contextlib import suppress
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


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_serve_until_sigterm(write_pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    handler = signal.getsignal(signal.SIGTERM)

    def ready() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def end() -> None:
        wait_until(ready, 120)
        os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=end)
    client.start()
    assert muntin.serve(write_pixels(tmp_path / "pixels"), http_port=port, grpc_port=None, threads=1) == 0
    client.join()
    assert signal.getsignal(signal.SIGTERM) is handler
