"""What servers are compared with: the engine without a server, and an echo of the same bytes. Each is a process of its own."""

from __future__ import annotations

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

from serving_peers.engine import Engine
from serving_peers.load import HOST


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
