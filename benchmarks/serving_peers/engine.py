"""The computation of every server here: muntin's engine around one artifact, labels or scores; and what servers are compared with.

All have the same threads and cache of compiled models; each number of rows up to the largest batch is compiled and computed once before a
server is ready. Axes: B images, H rows, W columns, C channels, K classes.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from serving_peers.load import HOST


class Engine:
    """uint8 (B, side, side, C) -> uint8 labels (B, side, side) of a segmentation, float32 scores (B, K) of a classification."""

    def __init__(self, artifact: str, *, side: int, threads: int, max_rows: int) -> None:
        session = muntin.load(artifact, threads=threads, shapes=())
        labels = session.signature.task == "segment"
        self._call = session.labels if labels else session
        self.shape = (side, side, session.signature.channels)
        session.warm_up([(rows, side, side) for rows in range(1, max_rows + 1)], labels=labels)

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        return self._call(images_BHWC)

    def image(self, body: bytes) -> NDArray[np.uint8]:
        """The pixels of one request, a view of its bytes. Raises ValueError for another number of them."""
        return np.frombuffer(body, np.uint8).reshape(self.shape)

    def batch(self, images: list[NDArray[np.uint8]]) -> list[NDArray[Any]]:
        """The answer to each of these (H, W, C) images."""
        return list(self(images[0][None] if len(images) == 1 else np.stack(images)))


def parse(*more: str) -> argparse.Namespace:
    """Read ARTIFACT --side N --threads N --max-rows N --port N --batch-timeout S, and further options as text; all are required."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    for name in ("side", "threads", "max-rows", "port", "batch-timeout", *more):
        parser.add_argument(f"--{name}", type=float if name == "batch-timeout" else str if name in more else int, required=True)
    return parser.parse_args()


# What servers are compared with: the engine without a server, and an echo of the same bytes. Each is a process of its own.


@contextmanager
def child(function: Callable[..., None], cores: set[int], *arguments: Any) -> Iterator[Any]:
    """Call a function in a new process on some cores, with one end of a pipe; yields the other end. The process ends with the block."""
    context, own = get_context("spawn"), os.sched_getaffinity(0)
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    os.sched_setaffinity(0, cores)  # so that it has them from its beginning
    process.start()
    os.sched_setaffinity(0, own)
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def stand_by(pipe: Any, images_BHWC: NDArray[np.uint8], options: dict[str, Any]) -> None:
    """The engine alone: sends its answers to the images, then for each (rows, seconds) images a second and the median of a call. In between
    it sleeps, so it can stay beside a server."""
    engine = Engine(**options)
    pipe.send(np.concatenate([engine(image[None]) for image in images_BHWC]))
    while True:
        rows, seconds = pipe.recv()
        batches = [np.ascontiguousarray(np.resize(np.roll(images_BHWC, n, axis=0), (rows, *engine.shape))) for n in range(4)]
        times: list[float] = []
        started = time.perf_counter()
        while (now := time.perf_counter()) < started + seconds:
            engine(batches[len(times) % 4])
            times.append(time.perf_counter() - now)
        rate = len(times) * rows / (time.perf_counter() - started)
        pipe.send({"rows": rows, "images_per_s": rate, "call_ms": median(times) * 1e3})


def echo(pipe: Any, request_bytes: int, answer: bytes) -> None:
    """The floor of latency: sends its port, then reads requests of a known size and writes an answer, on blocking sockets. Any server takes
    this long for bytes of that size, before it has looked at one of them."""
    buffer, response = memoryview(bytearray(request_bytes)), f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer
    with socket.create_server((HOST, 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                filled = 0
                while count := connection.recv_into(buffer[filled:]):
                    filled += count
                    if filled == request_bytes:
                        connection.sendall(response)
                        filled = 0
