"""Arrays whose memory is used again once nobody holds them.

A session answers with an array of its own each time. Fresh memory of a few megabytes costs a page fault every 4 KiB, and copying into it
costs its bandwidth: together about a tenth of a fast model's call. Here an engine writes into the array that the caller gets, and when the
caller has dropped it, and every view of it, its memory serves the next call.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

KEPT = 4


class Buffers:
    """Gives arrays; keeps the memory of at most `KEPT` dropped ones, of whatever type. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array of this shape with arbitrary values, that nobody else holds."""
        size = np.dtype(dtype).itemsize * prod(shape)
        with self._lock:
            key = next((key for key, memory in reversed(self._free.items()) if memory.nbytes == size), None)
            memory = np.empty(size, np.uint8) if key is None else self._free.pop(key)
        # An array over a buffer ends numpy's chain of bases: every view of it keeps this one alive, so that the memory comes back
        # only when the last of them is gone.
        flat = np.frombuffer(memory.data, dtype)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        # No lock: a finaliser may run inside `take`, in the thread that holds it. Single operations of an OrderedDict are atomic.
        self._free[id(memory)] = memory
        while len(self._free) > KEPT:
            try:
                self._free.popitem(last=False)
            except KeyError:
                return
