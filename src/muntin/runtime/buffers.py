"""Arrays whose memory is used again once nobody holds them.

A session answers with an array of its own each time. Fresh memory of a few megabytes costs a page fault every 4 KiB, and copying into it
costs its bandwidth: together about a tenth of a fast model's call. Here an engine writes into the array that the caller gets, and when the
caller has dropped it, and every view of it, its memory serves the next call.
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEPT = 4
KEPT_BYTES = 256 << 20


class Buffers:
    """Gives arrays; keeps the memory of dropped ones, of whatever type: of the last `KEPT`, and of no more than `KEPT_BYTES` in all.

    Safe to use from several threads. Where they drop arrays at the same time, more may be kept until the next one is dropped.
    """

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=KEPT)
        """What came back last at the end; what came first makes room."""
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array of this shape with arbitrary values, that nobody else holds."""
        size = np.dtype(dtype).itemsize * prod(shape)
        with self._lock:
            memory = self._kept(size)
        if memory is None:
            memory = self._new(size)
        # An array over a buffer ends numpy's chain of bases: every view of it keeps this one alive, so that the memory comes back
        # only when the last of them is gone.
        flat = np.frombuffer(memory.data, dtype)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape)

    def _new(self, size: int) -> NDArray[np.uint8]:
        return np.empty(size, np.uint8)

    def _kept(self, size: int) -> NDArray[np.uint8] | None:
        """Takes memory of this size out, if there is any. Piece by piece, for others may come back meanwhile, from any thread."""
        others = []
        found = None
        while found is None:
            try:
                memory = self._free.pop()
            except IndexError:
                break
            if memory.nbytes == size:
                found = memory
            else:
                others.append(memory)
        self._free.extend(reversed(others))
        return found

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        # No lock: a finaliser may run inside `take`, in the thread that holds it. Single operations of a deque are atomic.
        room = KEPT_BYTES - memory.nbytes
        if room < 0:
            return
        kept = [memory]
        while self._free:
            try:
                earlier = self._free.pop()
            except IndexError:  # another thread was faster
                break
            room -= earlier.nbytes
            if room < 0:
                self._free.clear()
                break
            kept.append(earlier)
        self._free.extend(reversed(kept))
