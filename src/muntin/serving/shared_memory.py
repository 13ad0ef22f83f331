"""Memory that two processes have mapped: arrays of answers, which one writes and the other one reads without a copy.

It has no name that anybody could open: a file descriptor of it goes to the other process over a socket. It is no file of /dev/shm either,
of which a container has 64 MB.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from itertools import count
from math import prod
from mmap import mmap
from threading import local
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muntin.runtime.buffers import Buffers


class Shared(NamedTuple):
    """Memory by a number of its own, and the file that it is."""

    number: int
    file: int
    size: int


def new_file() -> int:
    """A descriptor of a file without a name, in memory where the system has such files; empty."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a sandbox may not allow it
            return os.memfd_create("muntin")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedBuffers(Buffers):
    """As its base, of memory that another process can write to."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = count(1)
        self._shared: dict[int, Shared] = {}  # by address

    def shared(self, answer: NDArray[Any]) -> Shared:
        """What an array that `take` gave lies in."""
        return self._shared[_address(answer)]

    def _new(self, size: int) -> NDArray[np.uint8]:
        file = new_file()
        try:
            os.ftruncate(file, size)
            memory = np.frombuffer(mmap(file, size), np.uint8)
        except BaseException:
            os.close(file)
            raise
        self._shared[_address(memory)] = Shared(next(self._numbers), file, size)
        weakref.finalize(memory, _forget, self._shared, _address(memory)).atexit = False
        return memory


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _forget(shared: dict[int, Shared], address: int) -> None:
    os.close(shared.pop(address).file)


class Places(Buffers):
    """On the other side: where an engine's next answer goes, thread by thread; elsewhere if it is of another size."""

    def __init__(self) -> None:
        super().__init__()
        self._here = local()

    def put(self, memory: mmap) -> None:
        """The answer that the calling thread computes next goes there."""
        self._here.memory = memory

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        memory: mmap | None = getattr(self._here, "memory", None)
        if memory is None or len(memory) != np.dtype(dtype).itemsize * prod(shape):
            return super().take(shape, dtype)
        self._here.memory = None
        self._here.given = given = np.frombuffer(memory, dtype).reshape(shape)
        return given

    def settle(self, answer: NDArray[Any], memory: mmap) -> None:
        """Sees to it that an answer is there: an engine may have written it elsewhere."""
        given, self._here.given, self._here.memory = getattr(self._here, "given", None), None, None
        if answer is not given:
            np.frombuffer(memory, answer.dtype).reshape(answer.shape)[...] = answer
