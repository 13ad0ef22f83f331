"""The server's end of a lane to an engine's process: one call at a time, over memory that both have mapped (`engine_host`)."""

from __future__ import annotations

import os
import socket
import time
from collections import OrderedDict
from math import inf
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.serving.engine_host import CALL, DONE, FAILED, KEPT, OTHER, error_of, receive, remember, send
from muntin.serving.shared_memory import Shared, new_file


class Lane:
    """One call at a time: a connection, and memory for images that both processes have mapped."""

    def __init__(self, control: socket.socket) -> None:
        self.asked_at = inf
        """Since when the process is to answer (`time.monotonic`): then nobody else may ask. inf: it has answered."""
        self._images: NDArray[np.uint8] | None = None
        self._places: OrderedDict[int, None] = OrderedDict()
        self._file = -1
        self._calls, theirs = socket.socketpair()
        with theirs:
            self._file = new_file()
            send(control, {}, theirs.fileno(), self._file)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Raises EOFError or ConnectionError where the process is gone, and what it raised there."""
        self.asked_at = time.monotonic()
        self._calls.sendall(CALL.pack(OTHER, *[0] * 8))
        send(self._calls, question)
        self._await_done()
        return self._message()

    def compute(self, operation: int, images_BHWC: NDArray[np.uint8], place: Shared) -> None:
        """The answer is in its place then. Raises as `ask` does."""
        size = self._put(images_BHWC)
        follows = place.number not in self._places
        self._places[place.number] = None
        remember(self._places, place.number, place.size)
        self.asked_at = time.monotonic()
        try:
            self._calls.sendall(CALL.pack(operation, *images_BHWC.shape, size, place.number, place.size, follows))
            if follows:
                socket.send_fds(self._calls, [b"."], [place.file])
            self._await_done()
            self.asked_at = inf
        finally:
            if size > KEPT:
                self._images = None
                os.ftruncate(self._file, 0)

    def _await_done(self) -> None:
        came = self._calls.recv(1)
        if came == FAILED:
            self._places.clear()
            raise error_of(self._message())
        if came != DONE:
            raise EOFError

    def _message(self) -> dict[str, Any]:
        came = receive(self._calls)
        if came is None:
            raise EOFError
        self.asked_at = inf
        return came[0]

    def _put(self, images_BHWC: NDArray[np.uint8]) -> int:
        wanted = images_BHWC.nbytes
        if self._images is None or self._images.nbytes < wanted:
            size = 1 << max(16, (wanted - 1).bit_length()) if wanted <= KEPT else wanted
            self._images = None
            os.ftruncate(self._file, size)
            self._images = np.frombuffer(mmap(self._file, size), np.uint8)
        self._images[:wanted] = images_BHWC.reshape(-1)
        return self._images.nbytes

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        self._calls.close()

    def __del__(self) -> None:
        if hasattr(self, "_calls"):
            self.close()
