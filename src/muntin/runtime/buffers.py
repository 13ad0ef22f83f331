"""Arrays whose memory is reused after they and all their views are deleted.

A session returns a new array from each call. Fresh memory of a few megabytes costs a page fault every 4 KiB, and copying into it costs
bandwidth: together about a tenth of a fast model's call. So engines write into the array that the caller gets, and its memory is reused.
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
    """Creates arrays, and keeps the memory of the last `KEPT` deleted ones, at most `KEPT_BYTES` in all.

    Thread-safe. If threads delete arrays at the same time, more may be kept until the next deletion.
    """

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=KEPT)
        """The oldest first; it is dropped first."""
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Returns a new array of this shape with arbitrary values."""
        size = np.dtype(dtype).itemsize * prod(shape)
        with self._lock:
            memory = self._kept(size)
        if memory is None:
            memory = self._new(size)
        # An array over a buffer ends numpy's chain of bases: every view keeps this array alive, so it is deleted last.
        flat = np.frombuffer(memory.data, dtype)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape)

    def _new(self, size: int) -> NDArray[np.uint8]:
        return np.empty(size, np.uint8)

    def _kept(self, size: int) -> NDArray[np.uint8] | None:
        """Removes and returns memory of this size, or None. Pops one by one: other threads may append meanwhile."""
        others: list[NDArray[np.uint8]] = []
        match = None
        while match is None:
            try:
                memory = self._free.pop()
            except IndexError:
                break
            if memory.nbytes == size:
                match = memory
            else:
                others.append(memory)
        self._free.extend(reversed(others))
        return match

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        # No lock: a finaliser may run inside `take`, in the thread that holds it. Each operation of a deque is atomic.
        room = KEPT_BYTES - memory.nbytes
        if room < 0:
            return
        kept = [memory]
        while self._free:
            try:
                earlier = self._free.pop()
            except IndexError:  # another thread has emptied it
                break
            room -= earlier.nbytes
            if room < 0:
                self._free.clear()
                break
            kept.append(earlier)
        self._free.extend(reversed(kept))
