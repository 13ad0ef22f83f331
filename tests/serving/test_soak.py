"""Long runs of the server: `make soak`, about three quarters of an hour. Left out of `make test`."""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

MINUTES = 15
LOAD = 0.8
CLIENTS = 4


def test_ten_million_hostile_inputs(hostile: Any) -> None:
    summary = hostile.run(10_000_000, seed=1)
    assert summary.accepted + summary.refused == 10_000_000


def test_a_million_requests_in_simulated_time(simulation: Any) -> None:
    summary = simulation.simulate(1_000_000, seed=1)
    assert summary.answered > 0
    assert summary.requests <= 1_000_000
    print(summary)


class Asking:
    """Clients that send pictures of several sizes, at moments of their own choosing, and count what is not answered rightly."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.wrong = 0
        self.answered = 0
        self.stop = threading.Event()
        self.pause = 0.0

    def run(self, seed: int) -> None:
        generator, random_ = np.random.default_rng(seed), random.Random(seed)  # noqa: S311 - no secret
        pictures = [generator.integers(0, 256, (1, 8 * n, 8 * n + seed, 3)).astype(np.uint8) for n in (1, 3, 8, 16)]
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        while not self.stop.is_set():
            images = random_.choice(pictures)
            if random_.random() < 0.02:  # a client that comes anew
                connection.close()
            try:
                if labels_of(connection, images) != images.argmax(3).astype(np.uint8).tobytes():
                    self.wrong += 1
            except (OSError, http.client.HTTPException, KeyError, ValueError):
                self.wrong += 1
                connection.close()
            self.answered += 1
            if self.pause:
                time.sleep(random_.expovariate(1 / self.pause))
        connection.close()


def labels_of(connection: http.client.HTTPConnection, images: NDArray[np.uint8]) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.nbytes}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "labels", "parameters": {"binary_data": True}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    connection.request("POST", "/v2/models/pixels/infer", head + images.tobytes(), headers)
    answer = connection.getresponse()
    body = answer.read()
    return body[int(answer.headers["Inference-Header-Content-Length"]) :]


def test_a_quarter_of_an_hour_under_load_takes_no_memory(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    path = write_pixels(tmp_path / "pixels")
    command = [sys.executable, "-m", "muntin", "serve", str(path), "--http-port", "0", "--no-grpc", "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            while not text.endswith("}\n"):
                text += process.stdout.readline()
            asking = Asking(int(json.loads(text)["http"].rpartition(":")[2]))
            threads = [threading.Thread(target=asking.run, args=(seed,)) for seed in range(CLIENTS)]
            for thread in threads:
                thread.start()
            time.sleep(20)  # every size is compiled for, and what is possible is known
            before = asking.answered
            time.sleep(20)
            most = (asking.answered - before) / 20
            asking.pause = CLIENTS * (1 / (LOAD * most) - 1 / most)
            resident, moments, began = [], [], time.monotonic()
            while time.monotonic() - began < 60 * MINUTES:
                time.sleep(2)
                pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
                moments.append((time.monotonic() - began) / 60)
            asking.stop.set()
            for thread in threads:
                thread.join()
        finally:
            process.terminate()
    assert process.returncode == 0
    assert asking.wrong == 0
    settled = [(moment, size) for moment, size in zip(moments, resident, strict=True) if moment > MINUTES / 3]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    print(
        f"{asking.answered:,} answers, {LOAD:.0%} of {most:.0f}/s; {resident[0]:.1f} -> {resident[-1]:.1f} MiB, {slope:+.4f} MiB a minute"
    )
    assert slope < 0.05, "MiB a minute"
