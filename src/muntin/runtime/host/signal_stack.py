"""Protection of the alternate signal stack from OpenVINO.

OpenVINO gives the thread that opens a model an alternate signal stack, and restores the earlier one when the model is deleted. With two
models that is the other model's stack, which may be freed by then: the next signal (Ctrl-C, a server's SIGTERM) would crash the process.
Python needs no alternate stack.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restores this thread's alternate signal stack at the end of the block. Linux only; elsewhere without effect."""
    if not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None)
    before = _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
