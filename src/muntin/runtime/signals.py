"""Keeping a library's hands off the stack that signals are handled on.

OpenVINO gives the thread that opens a model an alternate signal stack, and when the model goes it puts back the one it found. With
two models that is the stack of the other one, which may be freed by then: the next signal, Ctrl-C or a server's SIGTERM, is a crash.
Python handles its signals on the alternate stack where there is one, and well without.
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
    """What the block does to this thread's alternate signal stack is undone at its end. Does nothing but on Linux."""
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
