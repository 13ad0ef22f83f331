"""Updates of a model while a real server answers a client that never stops: good ones take over, a poisoned one is refused."""

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

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from muntin import load, predict
from muntin.cli import app
from muntin.images import read_mask, write_image
from products import copy_of, product

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the engine's process is begun as on Linux")]
QUICK = ["--set", "update.share=0.1", "--threads", "1"]
LOOSE = ["--accept", "max_slowdown=50", "--accept", "min_gain=-0.02"]  # the machine is busy, and scores are high before
PLAN: tuple[tuple[dict[int, int], bool], ...] = (({}, True), ({1: 2, 2: 1}, False), ({}, True))
"""Values of masks that are changed, and whether the update is accepted."""


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


@pytest.fixture(scope="module")
def trained() -> Path:
    return product("trained")


def test_three_updates(trained: Path, tmp_path: Path, write_scenes: Callable[..., None]) -> None:
    copy_of(trained / "run", tmp_path)
    versions = tmp_path / "run" / "versions"
    versions.mkdir()
    shutil.copytree(tmp_path / "run" / "artifact", versions / "1")
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)  # noise, of which each version says something else
    write_image(tmp_path / "noise.png", image)
    with served(versions, tmp_path / "log") as port, Client(port, (tmp_path / "noise.png").read_bytes()) as client:
        for number, (relabel, accepted) in enumerate(PLAN):
            folder = tmp_path / f"new-{number}"
            write_scenes(folder, f"n{number}", 14, 1000 + 100 * number)
            table = np.arange(256, dtype=np.uint8)
            table[list(relabel)] = list(relabel.values())
            for mask in (folder / "masks").iterdir():
                write_image(mask, table[read_mask(mask)])
            url = f"http://127.0.0.1:{port}"
            code, text = muntin("update", tmp_path / "run", "--data", folder, "--push", url, *QUICK, *LOOSE)
            assert code == (0 if accepted else 1), text
            assert accepted or "refused" in text
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/repository/index", b"{}", timeout=30) as answer:
            index = {entry["version"]: entry for entry in json.loads(answer.read())}
    assert set(client.statuses) == {200} and len(client.statuses) > 50
    assert set(index) == {"1", "2", "3"}  # two of three updates were accepted
    assert index["3"]["state"] == "READY" and "accepted: old data" in index["3"]["reason"]
    expected = [predict(load(versions / name, threads=1), image) for name in index]
    for body in client.bodies:  # 0 wrong: each answer is that of a version
        labels = np.asarray(Image.open(io.BytesIO(body)))
        assert max(float((labels == one).mean()) for one in expected) > 0.999
    assert len(client.bodies) > 1
