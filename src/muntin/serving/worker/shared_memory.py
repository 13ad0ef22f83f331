"""Memory that two processes have mapped: the images and the answer of a call.

It has no name that others could open: a file descriptor of it goes to the other process over a socket. It is not a file of /dev/shm, of
which a container has 64 MB.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from math import prod
from mmap import mmap
from threading import local
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muntin.runtime.buffers import Buffers


def new_file() -> int:
    """Return a descriptor of an empty file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a sandbox may not allow it
            return os.memfd_create("muntin")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def mapped(file: int, size: int) -> NDArray[np.uint8]:
    """Return the first `size` bytes of a file as an array, shared with other processes."""
    return np.frombuffer(mmap(file, size), np.uint8)


class SharedOutputs(Buffers):
    """The `outputs` of a session whose answers are wanted in shared memory: one answer of each thread at a time.

    `place` names the memory for the next answer of the calling thread; an engine that asks `take` for an array of that size writes into it.
    After the call `settle` copies an answer that the engine wrote elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = local()

    def place(self, memory: NDArray[np.uint8]) -> None:
        self._thread.memory = memory

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        memory: NDArray[np.uint8] | None = getattr(self._thread, "memory", None)
        if memory is None or memory.nbytes != np.dtype(dtype).itemsize * prod(shape):
            return super().take(shape, dtype)
        self._thread.memory = None
        self._thread.placed = placed = memory.view(dtype).reshape(shape)
        return placed

    def settle(self, answer: NDArray[Any], memory: NDArray[np.uint8]) -> None:
        placed, self._thread.placed, self._thread.memory = getattr(self._thread, "placed", None), None, None
        if answer is not placed:
            memory.view(answer.dtype).reshape(answer.shape)[...] = answer
