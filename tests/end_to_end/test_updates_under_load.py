"""Updates of a model while a real server answers a client that never stops: good ones take over, a poisoned and a worse one are refused."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from muntin import load, predict
from muntin.cli import app
from muntin.images import read_image, read_mask, write_image
from muntin.training import fit

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the engine's process is begun as on Linux")]
MODEL = """
from torch import nn

class Small(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make(*, task, classes, channels):
    return Small(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, classes, 1))
"""
QUICK = ["--set", "update.share=0.1", "--threads", "1"]
LOOSE = ["--accept", "max_slowdown=50", "--accept", "min_gain=-0.02"]  # the machine is busy, and scores are high before
SWAPPED, WORSE = {1: 2, 2: 1}, {2: 0}
PLAN: tuple[tuple[dict[int, int], bool, list[str]], ...] = (
    ({}, True, []),
    (SWAPPED, False, []),
    (WORSE, False, ["--set", "update.share=0.5", "--set", "update.learning_rate=0.01", "--set", "update.strategy=naive"]),
    ({}, True, []),
)
"""Values of masks that are changed, whether the update is accepted, and further options."""


def muntin(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of a command, in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@contextmanager
def served(folder: Path, log: Path) -> Iterator[int]:
    """A server of the folder's versions; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    words = ["serve", folder, "--http-port", port, "--no-grpc", "--threads", 1, "--trial", 20]
    with log.open("w") as lines, subprocess.Popen([sys.executable, "-m", "muntin", *map(str, words)], stderr=lines) as process:
        try:
            end = time.monotonic() + 120
            while process.poll() is None and not ready():
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class Client:
    """Sends one picture again and again; keeps the status of each answer and the different bodies."""

    def __init__(self, port: int, picture: bytes) -> None:
        self.port, self.picture = port, picture
        self.statuses: list[int | str] = []
        self.bodies: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self._over.is_set():
            try:
                connection.request("POST", "/predict?output=labels", self.picture, {"content-type": "image/png"})
                answer = connection.getresponse()
                self.bodies.add(answer.read())
                self.statuses.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                self.statuses.append(repr(error))
                connection.close()
            time.sleep(0.02)
        connection.close()


def test_four_updates(
    tmp_path: Path, write_tiny: Callable[..., Any], write_scenes: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_layers_under_load.py").write_text(MODEL)
    training = {"steps": 150, "batch_size": 8, "learning_rate": 0.01, "validate_every": 150, "precision": "fp32"}
    tiny = write_tiny(tmp_path / "data", model={"name": "two_layers_under_load:make", "options": {}}, training=training)
    monkeypatch.syspath_prepend(tmp_path)
    fit(tiny.recipe, directory=tmp_path / "run")
    code, text = muntin("export", tmp_path / "run")
    assert code == 0, text
    versions = tmp_path / "run" / "versions"
    versions.mkdir()
    shutil.copytree(tmp_path / "run" / "artifact", versions / "1")
    picture = (tiny.root / "test" / "images" / "test-0.png").read_bytes()
    with served(versions, tmp_path / "log") as port, Client(port, picture) as client:
        for number, (relabel, accepted, options) in enumerate(PLAN):
            folder = tmp_path / f"new-{number}"
            write_scenes(folder, f"n{number}", 14, 1000 + 100 * number)
            table = np.arange(256, dtype=np.uint8)
            table[list(relabel)] = list(relabel.values())
            for mask in (folder / "masks").iterdir():
                write_image(mask, table[read_mask(mask)])
            url = f"http://127.0.0.1:{port}"
            code, text = muntin("update", tmp_path / "run", "--data", folder, "--push", url, *QUICK, *LOOSE, *options)
            assert code == (0 if accepted else 1), text
            assert accepted or "refused" in text
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/repository/index", b"{}", timeout=30) as answer:
            index = {entry["version"]: entry for entry in json.loads(answer.read())}
    assert set(client.statuses) == {200} and len(client.statuses) > 50
    assert set(index) == {"1", "2", "3"}  # two of four updates were accepted
    assert index["3"]["state"] == "READY" and "accepted: old data" in index["3"]["reason"]
    image = read_image(tiny.root / "test" / "images" / "test-0.png")
    expected = [predict(load(versions / name, threads=1), image) for name in index]
    for body in client.bodies:  # 0 wrong: each answer is that of a version
        labels = np.asarray(Image.open(io.BytesIO(body)))
        assert max(float((labels == one).mean()) for one in expected) > 0.999
    assert len(client.bodies) > 1
