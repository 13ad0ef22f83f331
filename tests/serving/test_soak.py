"""Long runs of the server: `make soak`, about three quarters of an hour. Left out of `make test`."""

from __future__ import annotations

import http.client
import io
import random
import statistics
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from muntin.images import encode_png
from muntin.runtime.host.memory import resident_of
from muntin.serving.protocol.grpc_codec import SERVICE
from server_process import server_process
from serving_protocols import Connection, OverGrpc, OverHttp

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

MINUTES = 15
LOAD = 0.8
OBJECTIVE_MS, REFUSED = 1000, 0.001
"""So long that nothing is refused at `LOAD`, unless the machine stands still for a while; and the share of the requests that may be."""


def test_ten_million_hostile_inputs(hostile: Any) -> None:
    summary = hostile.run(10_000_000, seed=1)
    assert summary.accepted + summary.refused == 10_000_000


def test_a_million_requests_in_simulated_time(simulation: Any) -> None:
    summary = simulation.simulate(1_000_000, seed=1)
    assert summary.answered > 0
    assert summary.requests <= 1_000_000
    print(summary)


class Way:
    """How a client asks for the labels of one picture (1, H, W, 3): over a connection of its own."""

    def __init__(self, kind: str, addresses: dict[str, str]) -> None:
        self.kind = kind
        self._connection = Connection(int(addresses["http"].rpartition(":")[2]))
        self._channel = grpc.insecure_channel(addresses["grpc"])
        over_grpc = OverGrpc(lambda name, message: [self._channel.unary_unary(f"/{SERVICE}/{name}")(message)], grpc.RpcError)
        self._client = over_grpc if kind == "grpc" else OverHttp(self._connection.fetch)

    def labels(self, images: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """None where the server says that it cannot answer in time."""
        if self.kind == "picture":
            status, _, content = self._connection.fetch("/predict?output=labels", encode_png(images[0]))
            found, error = np.array(Image.open(io.BytesIO(content)))[None] if status == 200 else None, str(content)
        else:
            answer = self._client.infer("pixels", {"images": images}, ["labels"])
            status, error, found = answer.status, answer.error, answer.outputs.get("labels")
        if status not in (200, "OK", 503) and not (status == "UNAVAILABLE" and "try again" in error):  # as a lost connection is, too
            raise ValueError(f"{status}: {error}")
        return found

    def close(self) -> None:
        self._connection.close()
        self._channel.close()


WAYS = ("http", "http", "picture", "grpc")
"""Of each client."""


class Asking:
    """Clients that send pictures of several sizes, at moments of their own choosing, and count what is not answered rightly.

    `addresses`: of each face, as the server says. `wrong`: how often what went wrong. `asked`: by each client. `rates`: requests a second
    of each; who is late catches up. Without one a client asks again as soon as it is answered.
    """

    def __init__(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses
        self.wrong: Counter[str] = Counter()
        self.refused = 0
        self.asked: Counter[int] = Counter()
        self.rates: dict[int, float] = {}
        self.stop = threading.Event()

    def run(self, seed: int) -> None:
        generator, random_ = np.random.default_rng(seed), random.Random(seed)  # noqa: S311 - no secret
        pictures = [generator.integers(0, 256, (1, 8 * n, 8 * n + seed, 3)).astype(np.uint8) for n in (1, 3, 8, 16)]
        way, due = Way(WAYS[seed], self.addresses), 0.0
        while not self.stop.is_set():
            images, renewed = random_.choice(pictures), random_.random() < 0.02  # a client that comes anew
            try:
                labels = way.labels(images)
                self.refused += labels is None
                self.wrong["other labels"] += labels is not None and not np.array_equal(labels, images.argmax(3))
            except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
                self.wrong[repr(error)] += 1
                renewed = True
            self.asked[seed] += 1
            if renewed:
                way.close()
                way = Way(WAYS[seed], self.addresses)
            if seed in self.rates:
                due = (due or time.monotonic()) + random_.expovariate(self.rates[seed])
                time.sleep(max(0.0, due - time.monotonic()))
        way.close()


def resident_mib(pid: int) -> float:
    """Of a process and of those that it began, the engine's among them; memory that they share counts in each."""
    children: list[int] = []
    with suppress(OSError):  # it ends meanwhile: a thread, or a process that tries what is to be compiled
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, listed.read_text("ascii").split())
    return (resident_of(pid) or 0) / 2**20 + sum(map(resident_mib, children))


def test_a_quarter_of_an_hour_under_load_takes_no_memory(write_pixels: Any, tmp_path: Path) -> None:
    path = write_pixels(tmp_path / "pixels")
    with server_process(path, "--grpc-port", "0", "--objective-ms", str(OBJECTIVE_MS)) as (process, addresses):
        asking = Asking(addresses)
        threads = [threading.Thread(target=asking.run, args=(seed,), daemon=True) for seed in range(len(WAYS))]
        for thread in threads:
            thread.start()
        time.sleep(20)  # every size is compiled for, and what is possible is known
        before = asking.asked.copy()
        time.sleep(20)
        most = {client: (asked - before[client]) / 20 for client, asked in asking.asked.items()}
        asking.rates = {client: LOAD * rate for client, rate in most.items()}
        resident, moments, began, before = [], [], time.monotonic(), asking.asked.copy()
        while time.monotonic() - began < 60 * MINUTES:
            time.sleep(2)
            resident.append(resident_mib(process.pid))
            moments.append((time.monotonic() - began) / 60)
        given = (asking.asked - before).total() / (time.monotonic() - began)
        asking.stop.set()
        for thread in threads:
            thread.join()
    assert process.returncode == 0
    assert not +asking.wrong
    assert asking.refused <= REFUSED * asking.asked.total()
    settled = [(moment, size) for moment, size in zip(moments, resident, strict=True) if moment > MINUTES / 3]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    print(
        f"{asking.asked.total():,} requests, {asking.refused} refused, {given:.0f}/s of {sum(most.values()):.0f}; "
        f"{resident[0]:.1f} -> {resident[-1]:.1f} MiB, {slope:+.4f} MiB a minute"
    )
    assert slope < 0.05, "MiB a minute"
